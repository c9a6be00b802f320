"""Coins of rules that judge every node by itself: what becomes of its children, should it be
reached.

Coins are the numbers of `specdec.sampling.uniforms`. Legend: B sequences, N nodes, V vocabulary,
K draft candidates, C chunks of the vocabulary; p is the target's distribution at a node, q the
draft distribution its children were drawn from.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.philox import key_of, uniform_at
from specdec.kernels.gpu.scan import scan
from specdec.kernels.gpu.softmax import NOTHING, TINY, inverse, joined, support_block, weight
from specdec.kernels.layout import DraftedTrees


class Judged(NamedTuple):
    """What becomes of the children of every node, should it be reached.

    Attributes:
        enter: [B, N] int32, the child that is accepted, -1 for none.
        debt: [B, N] float32, how many times q is taken off p once all children are rejected.
        top: [B, N] float32, the largest logit.
        total: [B, N] float32, sum of exp((logit - top) / temperature).
        arrived: [B] int32, zeros, for the race.
        drafted: whether q was looked at.
        ids: [B, N, K] int64, the support of q, dense; without q, something to point at.
        probs: [B, N, K] float, likewise.
    """

    enter: Tensor
    debt: Tensor
    top: Tensor
    total: Tensor
    arrived: Tensor
    drafted: bool
    ids: Tensor
    probs: Tensor


def judge(
    tree: DraftedTrees, logits: Tensor, *, temperature: float, keys: Tensor, stream: int
) -> Judged:
    """Toss the coins of all nodes: by p and q, or by p alone where the trees do not have q. (Long
    for what it hands to the kernel.)

    Args:
        tree: the trees, dense.
        logits: [B, N, V], dense in V.
        stream: of the coins.
    """
    batch, nodes, _ = logits.shape
    tops, totals, _ = scan(logits, tree.size, inverse(temperature), torch.float32)
    chunks = tops.shape[2]
    device = logits.device
    debt, top, total = (
        torch.empty(batch, nodes, dtype=torch.float32, device=device) for _ in range(3)
    )
    enter = torch.empty(batch, nodes, dtype=torch.int32, device=device)
    arrived = torch.empty(batch, dtype=torch.int32, device=device)
    drafted, ids, probs = False, tree.tokens[..., None], top[..., None]
    if tree.draft_ids is not None and tree.draft_probs is not None:
        drafted, ids, probs = True, tree.draft_ids.contiguous(), tree.draft_probs.contiguous()
    judge_kernel[(nodes, batch)](
        enter,
        debt,
        top,
        total,
        arrived,
        logits,
        tops,
        totals,
        ids,
        probs,
        tree.tokens,
        tree.parents,
        tree.size,
        keys,
        nodes,
        chunks,
        ids.shape[2],
        inverse(temperature),
        logits.stride(0),
        logits.stride(1),
        STREAM=stream,
        DRAFTED=drafted,
        REPEATS=tree.repeats,
        N_BLOCK=triton.next_power_of_2(nodes),
        C_BLOCK=triton.next_power_of_2(chunks),
        K_BLOCK=support_block(ids.shape[2]),
        num_warps=1,
    )
    return Judged(enter, debt, top, total, arrived, drafted, ids, probs)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def judge_kernel(
    enter_ptr,  # [B, N], the child taken after each node, -1 for none
    debt_ptr,  # [B, N], how many times q is taken off p once all children are rejected
    top_ptr,  # [B, N], the largest logit
    total_ptr,  # [B, N], sum of exp((logit - top) / temperature)
    arrived_ptr,  # [B], 0 for the race
    logits_ptr,
    tops_ptr,  # [B, N, C]
    totals_ptr,  # [B, N, C]
    ids_ptr,  # [B, N, K]
    probs_ptr,  # [B, N, K]
    tokens_ptr,
    parents_ptr,
    size_ptr,
    keys_ptr,
    nodes,
    chunks,
    support,
    inverse_temperature,
    stride_logits_b,
    stride_logits_n,
    STREAM: tl.constexpr,
    DRAFTED: tl.constexpr,
    REPEATS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Try the children of one node in order, as if the node had been reached.

    Without a draft distribution, `left` is the target's mass that the elder siblings have not.
    With one, every rejection takes the draft distribution q off the target p and scales what is
    left of it to a sum of 1. Nothing need be scaled to that end: after any number of rejections
    the target is max(p - debt * q, 0) / left, for numbers debt and left, since what was below zero
    stays below it. Tokens already rejected are at zero, so it does not matter that q goes on to
    contain them; their share is only missing from the sum q is renormalised by.
    """
    node = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if node == 0:
        tl.store(arrived_ptr + row, 0)
    if node >= tl.load(size_ptr + row):
        return
    here = row * nodes + node
    offs_n = tl.arange(0, N_BLOCK)
    parents = tl.load(parents_ptr + row * nodes + offs_n, mask=offs_n < nodes, other=-2)
    tokens = tl.load(tokens_ptr + row * nodes + offs_n, mask=offs_n < nodes, other=0)
    top, total = joined(tops_ptr, totals_ptr, here, chunks, inverse_temperature, C_BLOCK)
    tl.store(top_ptr + here, top)
    tl.store(total_ptr + here, total)

    waiting = parents == node  # [N], children not tried yet
    child = tl.min(tl.where(waiting, offs_n, N_BLOCK))
    if child == N_BLOCK:
        tl.store(enter_ptr + here, -1)
        tl.store(debt_ptr + here, 0.0)
        return
    logits_ptr += row * stride_logits_b + node.to(tl.int64) * stride_logits_n
    logits = tl.load(logits_ptr + tokens, mask=waiting, other=NOTHING).to(tl.float32)
    masses = weight(logits, top, inverse_temperature) / total  # [N]
    seed, sequence, step = key_of(keys_ptr, row)
    coins = uniform_at(seed, sequence, step, STREAM, offs_n)
    ids_ptr += here * support
    probs_ptr += here * support

    entered = tl.full([], -1, tl.int32)
    left = 1.0
    debt = 0.0
    draft_scale = 1.0
    if DRAFTED:
        inside, _, draft_sum = _over_support(
            ids_ptr,
            probs_ptr,
            logits_ptr,
            support,
            top,
            total,
            inverse_temperature,
            0.0,
            -1,
            K_BLOCK,
        )
        outside = tl.maximum(1.0 - inside, 0.0)
    while child < N_BLOCK:
        token = tl.load(tokens_ptr + row * nodes + child)
        mass = tl.sum(tl.where(offs_n == child, masses, 0.0))
        coin = tl.sum(tl.where(offs_n == child, coins, 0.0))
        if DRAFTED:
            more = left * draft_scale
            kept, draft, _ = _over_support(
                ids_ptr,
                probs_ptr,
                logits_ptr,
                support,
                top,
                total,
                inverse_temperature,
                debt + more,
                token,
                K_BLOCK,
            )
            q = draft.to(tl.float32)
            rest = tl.maximum(mass - debt * q, 0.0)
            chance = tl.where(q > 0.0, rest / tl.maximum(more * q, TINY), 0.0)
        else:
            chance = mass / tl.maximum(left, TINY)
        waiting = waiting & (offs_n > child)
        if not (DRAFTED and REPEATS):
            waiting = waiting & (tokens != token)
        accepted = coin < chance.to(tl.float64)
        entered = tl.where(accepted, child, entered)
        child = tl.where(accepted, N_BLOCK, tl.min(tl.where(waiting, offs_n, N_BLOCK)))
        if DRAFTED:
            remaining = kept + outside
            # Nothing left means p equals q: the child was accepted but for rounding.
            debt = tl.where(accepted | (remaining <= 0.0), debt, debt + more)
            left = tl.where(accepted | (remaining <= 0.0), left, remaining)
            if not REPEATS:
                draft_sum -= draft
                draft_scale = 1.0 / tl.maximum(draft_sum.to(tl.float32), TINY)
        else:
            left -= mass
    tl.store(enter_ptr + here, entered)
    tl.store(debt_ptr + here, debt)


@triton.jit
def _over_support(
    ids_ptr,
    probs_ptr,
    logits_ptr,
    support,
    top,
    total,
    inverse_temperature,
    debt,
    token,
    K_BLOCK: tl.constexpr,
):
    """(sum of max(p - debt * q, 0) over the support of q; q of `token`; sum of q), the last two in
    float64, so that subtracting the one from the other is exact."""
    inside = 0.0
    draft_sum = tl.zeros([], tl.float64)
    draft = tl.zeros([], tl.float64)
    for start in range(0, support, K_BLOCK):
        offs_k = start + tl.arange(0, K_BLOCK)
        ids = tl.load(ids_ptr + offs_k, mask=offs_k < support, other=0)
        q = tl.load(probs_ptr + offs_k, mask=offs_k < support, other=0.0).to(tl.float32)
        q = tl.where(q > 0.0, q, 0.0)
        logits = tl.load(logits_ptr + ids, mask=q > 0.0, other=NOTHING).to(tl.float32)
        p = weight(logits, top, inverse_temperature) / total
        inside += tl.sum(tl.maximum(p - debt * q, 0.0))
        draft_sum += tl.sum(q.to(tl.float64))
        draft += tl.sum(tl.where(ids == token, q.to(tl.float64), 0.0))
    return inside, draft, draft_sum
