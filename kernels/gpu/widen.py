"""Products of so many rows with a weight in float8 that torch computes them, in a wide type."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight

AT_ONCE = 2**26  # numbers of a weight that are wide at the same time


def wide_mm(x: Tensor, weight: Fp8Weight) -> Tensor:
    """x @ weight.T in the type of x, [M, K] and [N, K] to [M, N]; some rows of the weight after
    the other are made wide, so that a large one needs little memory."""
    if triton.knobs.runtime.interpret:  # as exact, and seconds faster
        return torch.mm(x, weight.dequantised(x.dtype).T)
    outputs, inputs = weight.shape
    out = x.new_empty(len(x), outputs)
    step = max(SCALED_BLOCK, AT_ONCE // inputs // SCALED_BLOCK * SCALED_BLOCK)
    for start in range(0, outputs, step):
        some = slice(start, start + step)
        torch.mm(x, widened(weight, x.dtype, some).T, out=out[:, some])
    return out


def widened(weight: Fp8Weight, dtype: torch.dtype, some: slice) -> Tensor:
    """Some rows of `weight.dequantised(dtype)`, from a multiple of 128 on."""
    values = weight.values[some]
    block = SCALED_BLOCK if weight.blocked else 1
    scale = weight.scale[some.start // block :]
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows, inputs = values.shape
    if out.numel():
        widen_kernel[(rows, triton.cdiv(inputs, 2048))](
            out, values, scale, DEPTH=inputs, SCALED=block if weight.blocked else 0, BLOCK=2048
        )
    return out


@triton.jit
def widen_kernel(
    out_ptr,  # [N, K]
    values_ptr,  # [N, K]
    scale_ptr,  # [N] or [N / SCALED, K / SCALED]
    DEPTH: tl.constexpr,  # K
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for some columns of one row."""
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < DEPTH
    here = row.to(tl.int64) * DEPTH + offs
    values = tl.load(values_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        offs = row // SCALED * tl.cdiv(DEPTH, SCALED) + offs // SCALED
        values *= tl.load(scale_ptr + offs, mask=inside, other=0.0)
    else:
        values *= tl.load(scale_ptr + row)
    tl.store(out_ptr + here, values.to(out_ptr.dtype.element_ty), mask=inside)
