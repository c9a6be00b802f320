"""Other implementations of tree attention: torch's SDPA with a dense mask, with and without a
gather of the pages, and FlexAttention.

All but the gather get what they like best: contiguous keys and values, context and tree together,
and masks made beforehand. FlexAttention is told which blocks need no mask at all.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specdec.experiments.bench.cases import Case, Shape, index_rows, select_rows
from specdec.experiments.bench.clock import Call, Start

FLEX_BLOCK = 128  # of a BlockMask, queries and keys
PROCESSORS = 132  # of an H100 or H200
# BLOCK_M, BLOCK_N, warps, stages: for few rows of queries, and for many.
FLEX_FEW, FLEX_MANY = (64, 128, 4, 3), (128, 64, 8, 3)
COMPILE_SECONDS = 180  # for all variants of FlexAttention, side by side


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute a case.

    Args:
        name: of the variant.
        start: begins a forward pass and gives the call of its layers, as `GraphClock.time` wants
            it.
        unpack: brings what a call gives to [B, N, HQ, D]; not part of the time.
    """

    name: str
    start: Start
    unpack: Callable[[Tensor], Tensor]


class Contiguous:
    """A case's keys and values as the peers read them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.query = case.query.contiguous()  # [B, HQ, N, D]
        pairs = [case.contiguous(copy) for copy in range(case.copies)]
        self.keys, self.values = [k for k, _ in pairs], [v for _, v in pairs]


# SDPA


def sdpa(data: Contiguous) -> Iterator[Contender]:
    """Every backend with every form of the queries and the mask."""
    for name, attend, unpack in _sdpa_forms(data):
        call = partial(_on_contiguous, attend, data)
        yield Contender(name, partial(_same, call), unpack)


def sdpa_with_gather(data: Contiguous, only: str | None) -> Iterator[Contender]:
    """The variants of `sdpa`, or only the one of this name, after copying the pages of the
    sequences together."""
    for name, attend, unpack in _sdpa_forms(data):
        if only in (None, name):
            for pick in (select_rows, index_rows):
                call = partial(_on_pages, attend, pick, data.case)
                yield Contender(f"{pick.__name__}, {name}", partial(_same, call), unpack)


def _same(call: Call) -> Call:
    return call


def _on_contiguous(attend: Callable[..., Tensor], data: Contiguous, copy: int) -> Tensor:
    return attend(data.keys[copy], data.values[copy])


def _on_pages(
    attend: Callable[..., Tensor], pick: Callable[[Tensor, Tensor], Tensor], case: Case, copy: int
) -> Tensor:
    keys, values = case.key_pages[copy], case.value_pages[copy]
    return attend(case.gather(keys, pick=pick), case.gather(values, pick=pick))


def _sdpa_forms(
    data: Contiguous,
) -> Iterator[tuple[str, Callable[..., Tensor], Callable[[Tensor], Tensor]]]:
    case = data.case
    shape = case.shape
    visible = case.mask()  # [B, 1, N, K]
    additive = torch.zeros_like(visible, dtype=data.query.dtype).masked_fill(
        ~visible, float("-inf")
    )
    group = shape.heads // shape.kv_heads
    masks: dict[str, Tensor | None] = {"bool": visible, "additive": additive}
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    if shape.nodes == 1:  # the root sees everything
        masks = {"no mask": None}
        backends.append(SDPBackend.FLASH_ATTENTION)
    # Query heads of a group as further queries of one head: [B, HKV, G * N, D].
    folded = data.query.reshape(shape.batch, shape.kv_heads, group * shape.nodes, -1)
    for kind, mask in masks.items():
        repeated = None if mask is None else mask.repeat(1, 1, group, 1)
        for backend in backends:
            name = f"{backend.name.removesuffix('_ATTENTION').lower()}, {kind}"
            whole = partial(_sdpa, backend, data.query, mask, case.scale)
            yield name, whole, partial(torch.transpose, dim0=1, dim1=2)
            rows = partial(_sdpa, backend, folded, repeated, case.scale)
            yield f"{name}, folded", rows, partial(_unfold, shape.nodes)


def _sdpa(
    backend: SDPBackend,
    query: Tensor,
    mask: Tensor | None,
    scale: float,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )


def _unfold(nodes: int, out: Tensor) -> Tensor:
    return out.unflatten(2, (-1, nodes)).flatten(1, 2).transpose(1, 2)


# FlexAttention


def flex_options(shape: Shape) -> dict[str, list[dict[str, Any]]]:
    """Kernel options to try: none; good block sizes; the same with the undocumented SPLIT_KV."""
    rows = shape.nodes * shape.heads // shape.kv_heads
    pairs = shape.batch * shape.kv_heads
    tuned, split = [], []
    for block_m, block_n, warps, stages in (FLEX_FEW, FLEX_MANY):
        if block_m > max(64, rows):
            continue
        options = {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "num_warps": warps,
            "num_stages": stages,
        }
        tuned.append(options)
        programs = pairs * -(-rows // block_m)
        own = max(1, PROCESSORS // pairs * 2)  # FlexAttention's own choice
        for splits in (1, 2, 4, 8, 16, 32, 64):
            # From half a wave of programs to four.
            if splits != own and PROCESSORS <= 2 * programs * splits <= 8 * PROCESSORS:
                split.append({**options, "SPLIT_KV": splits})
    return {"flex default": [{}], "flex tuned": tuned, "flex split": split}


def flex(data: Contiguous, options: dict[str, Any]) -> Contender:
    """FlexAttention with these kernel options, compiled anew."""
    case = data.case
    mask = block_mask(case)
    cuda = data.query.device.type == "cuda"
    attend: Any = _compiled_flex() if cuda else flex_attention
    run = partial(
        attend, block_mask=mask, scale=case.scale, enable_gqa=True, kernel_options=options
    )
    call = partial(_on_contiguous, partial(run, data.query), data)
    name = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
    return Contender(name, partial(_same, call), partial(torch.transpose, dim0=1, dim1=2))


def _compiled_flex() -> Callable[..., Any]:
    torch._dynamo.reset()  # each set of options counts against one limit of recompilations
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_mask(case: Case) -> BlockMask:
    """Blocks of the context are full, those from the first tree key on are masked by ancestors."""
    shape, visible, device = case.shape, case.visible, case.parents.device
    context, last = shape.context, shape.nodes - 1
    blocks, full = -(-shape.keys // FLEX_BLOCK), context // FLEX_BLOCK

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < context) | visible[b, q.clamp(max=last), (k - context).clamp(0, last)]

    def some(first: int, count: int) -> tuple[Tensor, Tensor]:
        # The kernels look at entries past the count, so those must be block numbers, too.
        order = (torch.arange(blocks, dtype=torch.int32, device=device) + first) % blocks
        number = torch.tensor([[[count]]], dtype=torch.int32, device=device)
        return number, order.view(1, 1, 1, -1).contiguous()

    return BlockMask.from_kv_blocks(
        *some(full, blocks - full),
        *some(0, full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=seen,
        seq_lengths=(shape.nodes, shape.keys),
    )


def compile_ahead(shapes: Sequence[Shape], page_size: int) -> dict[str, Any]:
    """Compile the variants of FlexAttention side by side, into torch's cache on disk; one after
    the other they would take most of the run."""
    begun, workers = time.perf_counter(), max(1, min(12, (os.cpu_count() or 1) - 2))
    spawn = multiprocessing.get_context("spawn")
    shares = [(shapes, page_size, number, workers) for number in range(workers)]
    running = [spawn.Process(target=compile_share, args=share) for share in shares]
    for process in running:
        process.start()
    for process in running:
        process.join(max(1.0, COMPILE_SECONDS - (time.perf_counter() - begun)))
        if process.exitcode is None:
            process.kill()
            process.join()
    faults = [f"exit {process.exitcode}" for process in running if process.exitcode]
    return {"seconds": time.perf_counter() - begun, "processes": workers, "faults": faults}


@torch.no_grad()
def compile_share(shapes: Sequence[Shape], page_size: int, number: int, of: int) -> None:
    """Compile every `of`-th variant of FlexAttention from `number` on, in a process of its own."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    torch.manual_seed(0)
    variants = [
        (shape, chosen)
        for shape in shapes
        for options in flex_options(shape).values()
        for chosen in options
    ]
    device = torch.device("cuda")
    for shape, chosen in variants[number::of]:
        case = Case(shape, copies=1, page_size=page_size, dtype=torch.bfloat16, device=device)
        with contextlib.suppress(Exception):  # what fails here fails again where it is measured
            flex(Contiguous(case), chosen).start()(0)
