"""What rules work out node by node: the traversal of trees from the leaves, the divisor of K-SEQ.

Legend: B sequences, N nodes, K draft candidates.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.softmax import TINY

NEVER = tl.constexpr(float("inf"))
MOST = tl.constexpr(1e37)  # a debt that nothing is left beside, and finite still
POINTS, ROUNDS = 8, 10  # divisors tried at once; each round divides the interval by that
WARP_CANDIDATES = 256  # draft candidates that one warp looks at


def traverse(
    tokens: Tensor,
    parents: Tensor,
    size: Tensor,
    ids: Tensor,
    draft: Tensor,
    target: Tensor,
    coins: Tensor,
    *,
    repeats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `specdec.kernels.reference.traverse`, in float32; `left` of an idle row means nothing."""
    batch, nodes = tokens.shape
    support, device = ids.shape[2], tokens.device
    draft, target, parents = draft.contiguous(), target.contiguous(), parents.contiguous()
    size = size.contiguous()
    k_block = triton.next_power_of_2(support)
    launch = {
        "REPEATS": repeats,
        "K_BLOCK": k_block,
        "num_warps": min(max(k_block // WARP_CANDIDATES, 1), 8),
    }
    prepared = _prepare(tokens, parents, size, ids.contiguous(), draft, target, launch)
    ratio, share, beyond, rest, chance, first_child, next_sibling = prepared
    saved = torch.empty(batch, nodes, 4, dtype=torch.float32, device=device)
    last = torch.empty(batch, dtype=torch.int64, device=device)
    left = torch.empty(batch, support, dtype=torch.float32, device=device)
    _traverse_kernel[(batch,)](
        last,
        left,
        chance,
        saved,
        rest,
        draft,
        target,
        coins.contiguous(),
        ratio,
        share,
        beyond,
        parents,
        first_child,
        next_sibling,
        size,
        nodes,
        support,
        **launch,
    )
    return last, left, chance


def _prepare(
    tokens: Tensor,
    parents: Tensor,
    size: Tensor,
    ids: Tensor,
    draft: Tensor,
    target: Tensor,
    launch: dict[str, Any],
) -> tuple[Tensor, ...]:
    """The outputs of `_prepare_kernel`, in its order."""
    batch, nodes, support = ids.shape
    ratio, share, beyond, chance = (
        torch.empty(batch, nodes, dtype=torch.float32, device=ids.device) for _ in range(4)
    )
    first_child, next_sibling = (
        torch.empty(batch, nodes, dtype=torch.int32, device=ids.device) for _ in range(2)
    )
    rest = torch.empty(batch, nodes, dtype=torch.float64, device=ids.device)
    outputs = ratio, share, beyond, rest, chance, first_child, next_sibling
    _prepare_kernel[(nodes, batch)](
        *outputs,
        ids,
        draft,
        target,
        tokens.contiguous(),
        parents,
        size,
        nodes,
        support,
        N_BLOCK=triton.next_power_of_2(nodes),
        **launch,
    )
    return outputs


def divisor(draft: Tensor, target: Tensor, count: Tensor) -> Tensor:
    """As `specdec.kernels.reference.divisor`, in float32."""
    batch, nodes, support = target.shape
    out = torch.empty(batch, nodes, dtype=torch.float32, device=target.device)
    k_block = triton.next_power_of_2(support)
    _divisor_kernel[(nodes, batch)](
        out,
        draft.contiguous(),
        target.contiguous(),
        count.contiguous(),
        support,
        POINTS=POINTS,
        ROUNDS=ROUNDS,
        K_BLOCK=k_block,
        num_warps=min(max(k_block * POINTS // 1024, 1), 8),
    )
    return out


@triton.jit(do_not_specialize=["nodes"])
def _prepare_kernel(
    ratio_ptr,  # [B, N], p(x) / q(x) of each node's token after its parent; 0 if it has none
    share_ptr,  # [B, N], q(x), 0 where nothing is taken off the parent's draft
    beyond_ptr,  # [B, N], the target's mass outside the support
    rest_ptr,  # [B, N] float64, the draft's whole mass
    chance_ptr,  # [B, N]
    first_child_ptr,  # [B, N]
    next_sibling_ptr,  # [B, N]
    ids_ptr,  # [B, N, K]
    draft_ptr,  # [B, N, K]
    target_ptr,  # [B, N, K]
    tokens_ptr,
    parents_ptr,
    size_ptr,
    nodes,
    support,
    REPEATS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """What of one node does not depend on what becomes of others."""
    node, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = row * nodes + node
    tl.store(chance_ptr + here, float("nan"))
    size = tl.load(size_ptr + row)
    if (node >= size) & (node > 0):
        return
    offs_n = tl.arange(0, N_BLOCK)
    offs_k = tl.arange(0, K_BLOCK)
    given = offs_k < support
    parents = tl.load(parents_ptr + row * nodes + offs_n, mask=offs_n < size, other=-2)
    tokens = tl.load(tokens_ptr + row * nodes + offs_n, mask=offs_n < size, other=0)
    q = tl.load(draft_ptr + here * support + offs_k, mask=given, other=0.0).to(tl.float32)
    p = tl.load(target_ptr + here * support + offs_k, mask=given, other=0.0).to(tl.float32)
    tl.store(beyond_ptr + here, tl.maximum(1.0 - tl.sum(p), 0.0))
    tl.store(rest_ptr + here, tl.sum(q.to(tl.float64)))
    child = tl.min(tl.where(parents == node, offs_n, N_BLOCK))
    tl.store(first_child_ptr + here, tl.where(child < N_BLOCK, child, -1))
    if node == 0:
        tl.store(ratio_ptr + here, 0.0)
        tl.store(share_ptr + here, 0.0)
        tl.store(next_sibling_ptr + here, -1)
        return

    parent = tl.load(parents_ptr + here)
    token = tl.load(tokens_ptr + here)
    siblings = parents == parent
    sibling = tl.min(tl.where(siblings & (offs_n > node), offs_n, N_BLOCK))
    tl.store(next_sibling_ptr + here, tl.where(sibling < N_BLOCK, sibling, -1))
    offs_p = (row * nodes + parent) * support + offs_k
    ids = tl.load(ids_ptr + offs_p, mask=given, other=0)
    q = tl.load(draft_ptr + offs_p, mask=given, other=0.0).to(tl.float32)
    p = tl.load(target_ptr + offs_p, mask=given, other=0.0).to(tl.float32)
    mine = (ids == token) & (q > 0.0)
    share = tl.sum(tl.where(mine, q, 0.0))
    mass = tl.sum(tl.where(mine, p, 0.0))
    if not REPEATS:  # what an elder sibling has taken is not there any more
        elder = siblings & (offs_n < node) & (tokens == token)
        share = tl.where(tl.max(elder.to(tl.int32)) > 0, 0.0, share)
    tl.store(share_ptr + here, share)
    ratio = tl.where(share > 0.0, mass / tl.maximum(share, TINY), 0.0)
    tl.store(ratio_ptr + here, tl.minimum(ratio, MOST))


@triton.jit(do_not_specialize=["nodes"])
def _traverse_kernel(
    last_ptr,
    left_ptr,  # [B, K]
    chance_ptr,  # [B, N], of nodes that are judged
    saved_ptr,  # [B, N, 4], scratch
    rest_ptr,  # [B, N] float64, the draft's mass on tokens that have not been rejected
    draft_ptr,  # [B, N, K]
    target_ptr,  # [B, N, K]
    coins_ptr,  # [B, N] float64
    ratio_ptr,  # [B, N]
    share_ptr,  # [B, N]
    beyond_ptr,  # [B, N]
    parents_ptr,
    first_child_ptr,
    next_sibling_ptr,
    size_ptr,
    nodes,
    support,
    REPEATS: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Judge the nodes of one tree in post-order, each against what its elders have left it.

    A node that is entered with weight w has the target p and the draft q. As in `judge_kernel`,
    after any number of rejections its target is max(p - debt * q, 0) / left, where left is the
    mass of the numerator, and tokens already rejected are at zero. (One that was rejected had a
    weight below 1, hence less of the target than of the draft.) Its weight is then
    left / (left + lack), where lack = 1 / w - 1 for good: with m, the mass of the residual that
    the paper's update is made of, m / (m + 1 - weight) comes to that. One more rejection adds
    (left + lack) * scale to the debt, where scale renormalises what is left of the draft. So the
    state of a node is five numbers, and p and q are read, never written; that of the node whose
    children are tried is held in registers, that of nodes above it in `saved` and `rest`.
    """
    row = tl.program_id(0).to(tl.int64)
    saved_ptr += row * nodes * 4
    rest_ptr += row * nodes
    draft_ptr += row * nodes * support
    target_ptr += row * nodes * support
    coins_ptr += row * nodes
    chance_ptr += row * nodes
    ratio_ptr += row * nodes
    share_ptr += row * nodes
    beyond_ptr += row * nodes
    parents_ptr += row * nodes
    first_child_ptr += row * nodes
    next_sibling_ptr += row * nodes
    offs_k = tl.arange(0, K_BLOCK)
    given = offs_k < support

    node = tl.zeros([], tl.int32)  # whose children are tried
    above = tl.full([], -1, tl.int32)  # its parent
    child = tl.load(first_child_ptr)  # the next of them, -1 if none is left
    q = tl.load(draft_ptr + offs_k, mask=given, other=0.0).to(tl.float32)
    p = tl.load(target_ptr + offs_k, mask=given, other=0.0).to(tl.float32)
    beyond = tl.load(beyond_ptr)
    rest = tl.load(rest_ptr)
    debt, left, lack, scale = 0.0, 1.0, 0.0, 1.0

    last = tl.where(tl.load(size_ptr + row) > 0, -1, 0)
    last_debt = 0.0
    while last < 0:
        tried = child >= 0
        judged = tl.where(tried, child, node)
        coin = tl.load(coins_ptr + judged)  # all at once: a load takes longer than the arithmetic
        ratio = tl.load(ratio_ptr + judged)
        share = tl.load(share_ptr + judged)
        deeper = tl.load(first_child_ptr + judged)
        following = tl.load(next_sibling_ptr + judged)
        # The chance is part / whole, but the coin need not wait for a division.
        step = (left + lack) * scale
        part = tl.where(tried, tl.minimum(tl.maximum(ratio - debt, 0.0), step), left)
        whole = tl.where(tried, step, left + lack)
        judged_debt = tl.where(tried, 0.0, debt)
        if tried & (deeper >= 0):  # it has children, who come first
            tl.store(saved_ptr + node * 4, debt)
            tl.store(saved_ptr + node * 4 + 1, left)
            tl.store(saved_ptr + node * 4 + 2, lack)
            tl.store(saved_ptr + node * 4 + 3, scale)
            tl.store(rest_ptr + node, rest)
            tl.debug_barrier()
            above, node, child = node, child, deeper
            offs = node * support + offs_k
            q = tl.load(draft_ptr + offs, mask=given, other=0.0).to(tl.float32)
            p = tl.load(target_ptr + offs, mask=given, other=0.0).to(tl.float32)
            beyond = tl.load(beyond_ptr + node)
            rest = tl.load(rest_ptr + node)
            debt, left, scale = 0.0, 1.0, 1.0
            lack = tl.where(part > 0.0, (whole - part) / tl.maximum(part, TINY), NEVER)
        else:
            chance = tl.where(part < whole, part / whole, 1.0)
            tl.store(chance_ptr + judged, chance)
            if (coin * whole.to(tl.float64) < part.to(tl.float64)) | (judged == 0):
                last, last_debt = judged, judged_debt
            else:
                if child < 0:  # its children were tried before
                    node = above
                    above = tl.load(parents_ptr + node).to(tl.int32)
                    debt = tl.load(saved_ptr + node * 4)
                    left = tl.load(saved_ptr + node * 4 + 1)
                    lack = tl.load(saved_ptr + node * 4 + 2)
                    scale = tl.load(saved_ptr + node * 4 + 3)
                    rest = tl.load(rest_ptr + node)
                    beyond = tl.load(beyond_ptr + node)
                    offs = node * support + offs_k
                    q = tl.load(draft_ptr + offs, mask=given, other=0.0).to(tl.float32)
                    p = tl.load(target_ptr + offs, mask=given, other=0.0).to(tl.float32)
                # The parent pays.
                owed = tl.minimum(debt + (left + lack) * scale, MOST)
                remaining = beyond + tl.sum(tl.maximum(p - owed * q, 0.0))
                # Nothing left at weight 1 means p equals q: the child was accepted but for
                # rounding. At a smaller weight nothing can be accepted here any more.
                some = remaining > 0.0
                lack = tl.where(some | (lack <= 0.0), lack, NEVER)
                debt = tl.where(some, owed, debt)
                left = tl.where(some, remaining, left)
                if not REPEATS:
                    rest -= share.to(tl.float64)
                    scale = 1.0 / tl.maximum(rest.to(tl.float32), TINY)
                child = following

    tl.store(last_ptr + row, last.to(tl.int64))
    offs = last * support + offs_k
    q = tl.load(draft_ptr + offs, mask=given, other=0.0).to(tl.float32)
    p = tl.load(target_ptr + offs, mask=given, other=0.0).to(tl.float32)
    tl.store(left_ptr + row * support + offs_k, tl.maximum(p - last_debt * q, 0.0), mask=given)


@triton.jit
def _divisor_kernel(
    out_ptr,  # [B, N]
    draft_ptr,  # [B, N, K]
    target_ptr,  # [B, N, K]
    count_ptr,  # [B, N]
    support,
    POINTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Look for the divisor of one node, between `low` and `high`, at POINTS places at a time.

    With x = 1 - overlap the condition 1 - x^count <= r * overlap, divided by the overlap, reads
    1 + x + ... + x^(count - 1) <= r. Nothing is subtracted in that sum, so it keeps its precision
    where the overlap is small; it is put together bit by bit of `count`.
    """
    here = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(count_ptr + here)
    if count < 2:
        tl.store(out_ptr + here, 1.0)
        return
    offs_k = tl.arange(0, K_BLOCK)[None, :]
    q = tl.load(draft_ptr + here * support + offs_k, mask=offs_k < support, other=0.0)
    p = tl.load(target_ptr + here * support + offs_k, mask=offs_k < support, other=0.0)
    q, p = q.to(tl.float32), p.to(tl.float32)  # [1, K]
    bits = tl.zeros([], tl.int32)
    while (count >> bits) > 0:
        bits += 1
    place = tl.arange(0, POINTS)
    low, high = 1.0, count.to(tl.float32)
    for _ in range(ROUNDS):
        step = (high - low) / POINTS
        points = tl.where(place + 1 < POINTS, low + step * (place + 1), high)  # [POINTS]
        overlap = tl.sum(tl.minimum(q, p / points[:, None]), axis=1)
        x = tl.maximum(1.0 - overlap, 0.0)
        total = tl.zeros_like(x)  # of the powers of x below some beginning of `count`
        power = total + 1.0  # that many
        for bit in range(bits):
            total, power = total + power * total, power * power
            odd = ((count >> (bits - 1 - bit)) & 1) > 0
            total = tl.where(odd, total * x + 1.0, total)
            power = tl.where(odd, power * x, power)
        enough = (total <= points) | (overlap <= 0.0) | (place + 1 == POINTS)
        first = tl.min(tl.where(enough, place, POINTS))
        high = tl.min(tl.where(enough, points, high))
        low = tl.max(tl.where(place < first, points, low))
    tl.store(out_ptr + here, high)
