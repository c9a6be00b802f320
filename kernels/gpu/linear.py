"""Products with a weight at the pace device memory delivers it, for the few rows of a decoding
step.

The weight is the left operand of the tensor cores ("swap AB"), so that 64 or more of its rows
fill them however few rows x has. Programs are no more than run at the same time and do equal
work: then it does not matter how they fall on the multiprocessors, for all of them draw on the
same memory. Where tiles of the result are too few for that, the sum over K is split, and whoever
reads the result adds the parts up.

Between two kernels device memory would be idle. A program therefore starts as soon as the one
before it has left its place (programmatic dependent launch), asks for its first weights, and only
then waits for the results of earlier kernels.
"""

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.gpu.blocks import processors
from specdec.kernels.gpu.ring import ring_descriptor, ring_kernel
from specdec.kernels.gpu.shared import FEW_ROWS, SharedParts
from specdec.kernels.gpu.stream import (
    FLOAT8_ROWS,
    PROGRAMS,
    SPLIT_COLUMNS,
    STREAM_ROWS,
    Stream,
    box_rows,
    choose_stream,
    few_enough,
    gated,
    padded_rows,
    stream_kernel,
)
from specdec.kernels.gpu.widen import wide_mm
from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight, Weight

BULK_ALIGNMENT = 16  # bytes, of the rows the bulk copy engine reads


def linear(
    x: Tensor,
    weight: Weight,
    *,
    blocks: Stream | None = None,
    exact: bool = False,
    shared: SharedParts | None = None,
) -> Tensor:
    """As `specdec.kernels.reference.linear`: float32 parts, or one part in the type of x where
    torch's product is faster.

    Args:
        blocks: launch parameters, for tuning; None chooses them by the shape.
        exact: float32 parts for any number of rows, whose bits do not depend on it.
        shared: where the parts go, those of many rows in the type of x; None: anywhere.
    """
    blocks = blocks or _choose(x, weight, exact=exact)
    if blocks is None:
        return mm(x, weight)[None]
    chunk, splits = _chunks(x.shape[1], blocks, isinstance(weight, Fp8Weight))
    shape = splits, len(x), weight.shape[0]
    if shared is None:
        parts = x.new_empty(shape, dtype=torch.float32)
    else:
        wide = exact or len(x) <= FEW_ROWS
        parts = shared.place(shape, torch.float32 if wide else x.dtype)
    _stream(parts, x, weight, blocks, chunk)
    return parts


def project(
    x: Tensor, weight: Weight, *, blocks: Stream | None = None, exact: bool = False
) -> Tensor:
    """As `specdec.kernels.reference.project`; `blocks`, of one split, and `exact` as in
    `linear`."""
    blocks = blocks or _choose(x, weight, whole=True, exact=exact)
    if blocks is None:
        return mm(x, weight)
    out = x.new_empty(len(x), weight.shape[0])
    _stream(out, x, weight, blocks, x.shape[1])
    return out


def gated_linear(
    x: Tensor, weight: Weight, *, blocks: Stream | None = None, exact: bool = False
) -> Tensor:
    """As `specdec.kernels.reference.gated_linear`; `blocks` and `exact` as in `linear`, where
    splits, or torch, leave the gate to a second kernel."""
    blocks = blocks or _choose(x, weight, gated=True, exact=exact)
    if blocks is None:
        return gate(mm(x, weight)[None])
    if blocks.splits > 1:
        return gate(linear(x, weight, blocks=blocks), x.dtype)
    out = x.new_empty(len(x), weight.shape[0] // 2)
    _stream(out, x, weight, blocks, x.shape[1], with_gate=True)
    return out


def gate(parts: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[S, M, 2 I], gate and up, to [M, I]: silu(gate) * up."""
    splits, rows, outputs = parts.shape
    out = parts.new_empty(rows, outputs // 2, dtype=dtype or parts.dtype)
    interpreting = triton.knobs.runtime.interpret
    block = 512
    if rows:
        gate_kernel[(rows, triton.cdiv(outputs // 2, block))](
            out,
            parts,
            rows,
            WIDTH=outputs // 2,
            SPLITS=splits,
            BLOCK=block,
            OVERLAP=not interpreting,
            num_warps=4,
            launch_pdl=not interpreting,
        )
    return out


def mm(x: Tensor, weight: Weight) -> Tensor:
    """[M, N] in the type of x, by torch."""
    return wide_mm(x, weight) if isinstance(weight, Fp8Weight) else torch.mm(x, weight.T)


def _choose(
    x: Tensor, weight: Weight, *, whole: bool = False, gated: bool = False, exact: bool
) -> Stream | None:
    """How to read the weight; None leaves the product to torch, in the interpreter too, which
    would take minutes for those of a model."""
    outputs, inputs = weight.shape
    float8 = isinstance(weight, Fp8Weight)
    if float8:
        ours = len(x) <= FLOAT8_ROWS
    else:
        ours = few_enough(len(x), outputs, inputs, gated) and (
            x.itemsize == 2 or len(x) <= STREAM_ROWS
        )
    if not exact and (not ours or triton.knobs.runtime.interpret):
        return None
    return choose_stream(
        rows=len(x),
        outputs=outputs,
        inputs=inputs,
        dtype=x.dtype,
        whole=whole,
        gated=gated,
        exact=exact,
        float8=float8,
        processors=_processors(x.device),
    )


@lru_cache
def _processors(device: torch.device) -> int:
    return processors(device) if device.type == "cuda" else PROGRAMS


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    """The ring's products are instructions of Hopper's alone."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _chunks(inputs: int, blocks: Stream, float8: bool = False) -> tuple[int, int]:
    """Columns of a split, and how many splits that makes."""
    unit = 2 * SPLIT_COLUMNS if float8 else SPLIT_COLUMNS  # of which a tile has at most as many
    chunk = triton.cdiv(triton.cdiv(inputs, blocks.splits), unit) * unit
    return chunk, triton.cdiv(inputs, chunk)


def _stream(
    out: Tensor, x: Tensor, given: Weight, blocks: Stream, chunk: int, with_gate: bool = False
) -> None:
    """Launch the kernel, by the ring or not. (Long for what it hands to either.)

    Args:
        out: [S, M, N] or [M, N], dense.
        chunk: columns of a split.
    """
    rows, inputs = x.shape
    weight, scale = given if isinstance(given, Fp8Weight) else (given, None)
    blocked = scale is not None and scale.dim() == 2
    if weight.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"a weight of strides {weight.stride()} must be contiguous")
    if blocked and x.itemsize == 2 and blocks.columns != SCALED_BLOCK:  # whose sums are kept apart
        stages = max(2, blocks.stages * blocks.columns // SCALED_BLOCK)
        blocks = replace(blocks, columns=SCALED_BLOCK, stages=stages)
    if x.stride(1) != 1:
        x = x.contiguous()
    if not out.numel():
        return
    width = out.shape[-1]
    block_m = padded_rows(rows, gated=with_gate, blocked=blocked)
    bulk = blocks.bulk and _aligned(x) and _aligned(weight)
    interpreting = triton.knobs.runtime.interpret
    x_tiles = triton.cdiv(rows, block_m)
    grid = (triton.cdiv(width, blocks.rows) * x_tiles, triton.cdiv(inputs, chunk))
    shared = {
        "WIDTH": width,
        "DEPTH": inputs,
        "CHUNK": chunk,
        "BLOCK_M": block_m,
        "BLOCK_N": blocks.rows,
        "BLOCK_K": blocks.columns,
        "WITH_GATE": with_gate,
        "SCALED": SCALED_BLOCK if blocked else 0,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
        "launch_pdl": not interpreting,
    }
    tiles = ((x, [block_m, blocks.columns]), (weight, [blocks.rows, blocks.columns]))
    if bulk and blocks.ring and not interpreting and _on_hopper(x.device):
        boxes = ((x, [box_rows(rows, block_m), blocks.columns]), tiles[1])
        descriptors = [ring_descriptor(tensor, tile) for tensor, tile in boxes]
        ring_kernel[grid](out, *descriptors, scale, rows, x_tiles, **shared)
        return
    stream_kernel[grid](
        out,
        x,
        weight,
        *(TensorDescriptor.from_tensor(*tile) if bulk else None for tile in tiles),
        scale,
        rows,
        x_tiles,
        x.stride(0),
        BULK=bulk,
        PRECISION="ieee" if x.dtype == torch.float32 else None,
        UPCAST=interpreting and x.dtype == torch.bfloat16,
        OVERLAP=not interpreting,
        **shared,
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether the bulk copy engine can read its rows."""
    row = tensor.stride(0) * tensor.itemsize
    return row % BULK_ALIGNMENT == 0 and tensor.data_ptr() % BULK_ALIGNMENT == 0


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    out_ptr,  # [M, I]
    parts_ptr,  # [S, M, 2 I]
    rows,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program for some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < WIDTH
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    here = parts_ptr + row * (2 * WIDTH) + offs  # one part as it is: zero and -0.0 make 0.0
    opening = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(here + WIDTH, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        here = parts_ptr + (split * rows + row) * (2 * WIDTH) + offs
        opening += tl.load(here, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(here + WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = gated(opening, up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + offs, result.to(out_ptr.dtype.element_ty), mask=inside)
