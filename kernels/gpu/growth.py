"""Which nodes a growing tree gets: scores, the choice of the best, and the tree without the rest.

Legend: B sequences, F expanded nodes, W children of each, T nodes offered, N nodes of the tree.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_NODES = 32  # nodes of a program
BLOCK_OTHERS = 64  # nodes it compares its own with at a time
BLOCK_SLOTS = 256
MOST_TOGETHER = 2048  # nodes that one program moves at a time
SIGN = tl.constexpr(2**63 - 1)
LOWEST = tl.constexpr(-(2**63))


def extend(scores: Tensor, probs: Tensor) -> Tensor:
    """As `specdec.kernels.reference.extend`, to the rounding of a logarithm."""
    batch, nodes, width = probs.shape
    out = torch.empty(batch, nodes, width, dtype=torch.float64, device=probs.device)
    slots = nodes * width
    _extend_kernel[(triton.cdiv(slots, BLOCK_SLOTS), batch)](
        out,
        scores.contiguous(),
        probs,
        nodes,
        width,
        *probs.stride(),
        BLOCK=min(BLOCK_SLOTS, triton.next_power_of_2(slots)),
        num_warps=1 if slots <= 64 else 4,
    )
    return out


@triton.jit(do_not_specialize=["nodes", "width", "stride_b", "stride_f", "stride_w"])
def _extend_kernel(
    out_ptr,  # [B, F, W]
    scores_ptr,  # [B, F]
    probs_ptr,
    nodes,
    width,
    stride_b,
    stride_f,
    stride_w,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < nodes * width
    node = slot // width
    at = probs_ptr + row * stride_b + node * stride_f + slot % width * stride_w
    probs = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    scores = tl.load(scores_ptr + row * nodes + node, mask=inside, other=0.0)
    found = scores + tl.minimum(tl.log(tl.where(probs > 0.0, probs, 1.0)), 0.0)
    found = tl.where((probs > 0.0) & (scores == scores), found, float("-inf"))
    tl.store(out_ptr + row * nodes * width + slot, found, mask=inside)


def best(scores: Tensor, count: int) -> Tensor:
    """As `specdec.kernels.reference.best`."""
    batch, total = scores.shape
    chosen = torch.empty(batch, total, dtype=torch.bool, device=scores.device)
    _best_kernel[(triton.cdiv(total, BLOCK_NODES), batch)](
        chosen,
        scores.contiguous(),
        total,
        count,
        BLOCK_NODES=BLOCK_NODES,
        BLOCK_OTHERS=BLOCK_OTHERS,
        num_warps=4,
    )
    return chosen


@triton.jit(do_not_specialize=["total", "count"])
def _best_kernel(
    chosen_ptr,  # [B, T]
    scores_ptr,  # [B, T]
    total,
    count,
    BLOCK_NODES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """A node is chosen if fewer than `count` others go before it. Nothing need be sorted."""
    row = tl.program_id(1).to(tl.int64)
    scores_ptr += row * total
    offs_node = tl.program_id(0) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    mine = _ordered(tl.load(scores_ptr + offs_node, mask=offs_node < total, other=0.0))
    before = tl.zeros([BLOCK_NODES], tl.int32)
    for begin in range(0, total, BLOCK_OTHERS):
        offs_other = begin + tl.arange(0, BLOCK_OTHERS)
        theirs = tl.load(scores_ptr + offs_other, mask=offs_other < total, other=0.0)
        theirs = tl.where(offs_other < total, _ordered(theirs), LOWEST)
        better = theirs[None, :] > mine[:, None]  # [BLOCK_NODES, BLOCK_OTHERS]
        equal = theirs[None, :] == mine[:, None]
        earlier = offs_other[None, :] < offs_node[:, None]
        before += tl.sum((better | (equal & earlier)).to(tl.int32), axis=1)
    tl.store(chosen_ptr + row * total + offs_node, before < count, mask=offs_node < total)


@triton.jit
def _ordered(scores):
    """int64s in the order of float64s, equal for equal ones, all above `LOWEST`. NaN comes first,
    as in a sort by torch; unlike NaN its number is equal to itself."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int64, bitcast=True)  # no -0.0
    bits ^= (bits >> 63) & SIGN
    return tl.where(scores == scores, bits, SIGN)


def places(chosen: Tensor, count: int) -> Tensor:
    """As `specdec.kernels.reference.places`."""
    batch, total = chosen.shape
    order = torch.empty(batch, count, dtype=torch.int64, device=chosen.device)
    _launch_compact(None, None, None, order, None, None, chosen, total, count)
    return order


def compact(
    tokens: Tensor, parents: Tensor, kept: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `specdec.kernels.reference.compact`."""
    batch, total = tokens.shape
    order = torch.empty(batch, nodes, dtype=torch.int64, device=tokens.device)
    new_tokens = torch.empty_like(order)
    new_parents = torch.empty_like(order, dtype=torch.int32)
    size = torch.empty(batch, dtype=torch.int32, device=tokens.device)
    results = new_tokens, new_parents, size, order
    _launch_compact(*results, tokens.contiguous(), parents.contiguous(), kept, total, nodes)
    return results


def _launch_compact(
    new_tokens: Tensor | None,
    new_parents: Tensor | None,
    size: Tensor | None,
    order: Tensor,
    tokens: Tensor | None,
    parents: Tensor | None,
    kept: Tensor,
    total: int,
    nodes: int,
) -> None:
    block = min(triton.next_power_of_2(total), MOST_TOGETHER)
    places = None
    if total > block:
        places = torch.empty(len(kept), total, dtype=torch.int32, device=kept.device)
    _compact_kernel[(len(kept),)](
        new_tokens,
        new_parents,
        size,
        order,
        places,
        tokens,
        parents,
        kept.contiguous(),
        total,
        nodes,
        T_BLOCK=block,
        num_warps=1 if total <= 64 else 4 if total <= 1024 else 8,
    )


@triton.jit(do_not_specialize=["total", "nodes"])
def _compact_kernel(
    new_tokens_ptr,  # [B, N] or None, for the order alone
    new_parents_ptr,  # [B, N] int32
    size_ptr,  # [B] int32
    order_ptr,  # [B, N]
    places_ptr,  # [B, T] int32, scratch; None for what one block holds
    tokens_ptr,  # [B, T]
    parents_ptr,  # [B, T]
    kept_ptr,  # [B, T]
    total,
    nodes,
    T_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, T_BLOCK)
    if places_ptr is None:
        kept = tl.load(kept_ptr + row * total + offs, mask=offs < total, other=0).to(tl.int32)
        size = tl.sum(kept)
    else:
        places_ptr += row * total
        size = tl.zeros([], tl.int32)
        for first in range(0, total, T_BLOCK):
            at = first + offs
            kept = tl.load(kept_ptr + row * total + at, mask=at < total, other=0).to(tl.int32)
            tl.store(places_ptr + at, size + tl.cumsum(kept) - 1, mask=at < total)
            size += tl.sum(kept)
        tl.debug_barrier()

    for first in range(0, total, T_BLOCK):
        at = first + offs
        real = at < total
        if places_ptr is None:
            place = tl.cumsum(kept) - 1
        else:
            kept = tl.load(kept_ptr + row * total + at, mask=real, other=0).to(tl.int32)
            place = tl.load(places_ptr + at, mask=real, other=0)
        target = tl.where(kept != 0, place, size + at - place - 1)  # the dropped ones come last
        inside = real & (target < nodes)
        out = row * nodes + target
        tl.store(order_ptr + out, at.to(tl.int64), mask=inside)
        if new_tokens_ptr is not None:
            tokens = tl.load(tokens_ptr + row * total + at, mask=real, other=0)
            parents = tl.load(parents_ptr + row * total + at, mask=real, other=-1).to(tl.int32)
            known = tl.minimum(tl.maximum(parents, 0), total - 1)
            if places_ptr is None:
                moved = tl.gather(place, known, 0)
            else:
                moved = tl.load(places_ptr + known, mask=real, other=0)
            moved = tl.where(parents == -1, -1, moved)
            tl.store(new_tokens_ptr + out, tokens, mask=inside)
            tl.store(new_parents_ptr + out, tl.where(kept != 0, moved, -2), mask=inside)
    if new_tokens_ptr is not None:
        tl.store(size_ptr + row, size)
