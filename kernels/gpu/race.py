"""Races over the vocabulary of one node per row draw the next token: once the path there has been
walked, or after a node that is known.

Draws are the numbers of `specdec.sampling.uniforms`. Legend: B sequences, N nodes, V vocabulary,
K draft candidates, C chunks of the vocabulary; p is the target's distribution at the node.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.coins import Judged
from specdec.kernels.gpu.philox import arrivals, key_of
from specdec.kernels.gpu.scan import in_rows
from specdec.kernels.gpu.softmax import NOTHING, TINY, inverse, support_block, weight
from specdec.kernels.layout import DraftedTrees, TargetLaw

RACE_CHUNK = 1024  # tokens of a program, which computes more for each than a scan
INDICES = tl.constexpr(2**31)  # a rank is a time and, below it, an index smaller than this
NO_RANK = tl.constexpr(2**63 - 1)


def walk_and_draw(
    tree: DraftedTrees,
    logits: Tensor,
    judged: Judged,
    *,
    temperature: float,
    keys: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the root enter what was accepted after each node, and draw the next token from what is
    left at the last: (path, length, next token) as in `specdec.tree.Acceptance`."""
    batch, nodes, vocab = logits.shape
    chunk, taken, ranks = _track(logits)
    chunks = ranks.shape[1]
    path, length, next_token = results(tree)
    race_kernel[(chunks, batch)](
        path,
        length,
        next_token,
        taken,
        ranks,
        judged.arrived,
        logits,
        judged.enter,
        judged.debt,
        judged.top,
        judged.total,
        judged.ids,
        judged.probs,
        tree.tokens,
        tree.parents,
        tree.size,
        keys,
        nodes,
        vocab,
        judged.ids.shape[2],
        tree.depth,
        inverse(temperature),
        logits.stride(0),
        logits.stride(1),
        STREAM=stream,
        DRAFTED=judged.drafted,
        N_BLOCK=triton.next_power_of_2(nodes),
        K_BLOCK=support_block(judged.ids.shape[2]),
        C_BLOCK=triton.next_power_of_2(chunks),
        CHUNK=chunk,
        num_warps=4,
    )
    return path, length, next_token


def draw_rest(
    logits: Tensor,
    law: TargetLaw,
    node: Tensor,
    length: Tensor,
    *,
    ids: Tensor,
    taken: Tensor,
    keys: Tensor,
    stream: int,
) -> Tensor:
    """As `specdec.kernels.reference.draw_rest`."""
    logits = in_rows(logits)
    batch, nodes, vocab = logits.shape
    support = ids.shape[1]
    chunk, scratch, ranks = _track(logits)
    next_token = torch.empty(batch, dtype=torch.int64, device=logits.device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=logits.device)
    rest_kernel[(ranks.shape[1], batch)](
        next_token,
        scratch,
        ranks,
        arrived,
        logits,
        law.top.contiguous(),
        law.total.contiguous(),
        node.contiguous(),
        length.contiguous(),
        ids.contiguous(),
        taken.contiguous(),
        keys,
        nodes,
        vocab,
        support,
        inverse(law.temperature),
        logits.stride(0),
        logits.stride(1),
        STREAM=stream,
        K_BLOCK=support_block(support),
        C_BLOCK=triton.next_power_of_2(ranks.shape[1]),
        CHUNK=chunk,
        num_warps=4,
    )
    return next_token


def results(tree: DraftedTrees) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (path, length, next token)."""
    batch, device = len(tree.tokens), tree.tokens.device
    path = torch.empty(batch, tree.depth + 1, dtype=torch.int64, device=device)
    length = torch.empty(batch, dtype=torch.int64, device=device)
    return path, length, torch.empty(batch, dtype=torch.int64, device=device)


def _track(logits: Tensor) -> tuple[int, Tensor, Tensor]:
    """Tokens of a program of the race, and its scratch: [B, V] float32, [B, C] int64."""
    batch, _, vocab = logits.shape
    chunk = min(RACE_CHUNK, max(triton.next_power_of_2(vocab), 16))
    taken = torch.empty(batch, vocab, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(batch, triton.cdiv(vocab, chunk), dtype=torch.int64, device=logits.device)
    return chunk, taken, ranks


@triton.jit(do_not_specialize=["nodes", "edges"])
def race_kernel(
    path_ptr,  # [B, edges + 1]
    length_ptr,
    next_token_ptr,
    taken_ptr,  # [B, V], scratch: what the rejected children have taken off p
    ranks_ptr,  # [B, C], scratch
    arrived_ptr,  # [B], zeros
    logits_ptr,
    enter_ptr,  # [B, N]
    debt_ptr,  # [B, N]
    top_ptr,  # [B, N]
    total_ptr,  # [B, N]
    ids_ptr,  # [B, N, K]
    probs_ptr,  # [B, N, K]
    tokens_ptr,
    parents_ptr,
    size_ptr,
    keys_ptr,
    nodes,
    vocab,
    support,
    edges,
    inverse_temperature,
    stride_logits_b,
    stride_logits_n,
    STREAM: tl.constexpr,
    DRAFTED: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draw the next token. Every program walks the path, which is cheaper than to wait for one."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    busy = tl.load(size_ptr + row) > 0
    node = tl.zeros([], tl.int32)
    length = busy.to(tl.int64)
    path_ptr += row * (edges + 1)
    if chunk == 0:
        tl.store(path_ptr, 0)
    going = busy
    for i in range(edges):
        child = tl.load(enter_ptr + row * nodes + node, mask=going, other=-1)
        going = child >= 0  # where the path has ended nothing is waited for
        node = tl.where(going, child, node)
        length += going.to(tl.int64)
        if chunk == 0:
            tl.store(path_ptr + i + 1, node)
    if chunk == 0:
        tl.store(length_ptr + row, length)
        tl.store(next_token_ptr + row, 0, mask=length == 0)
    if length == 0:
        return

    here = row * nodes + node
    first = chunk * CHUNK
    offs = first + tl.arange(0, CHUNK)
    logits_ptr += row * stride_logits_b + node.to(tl.int64) * stride_logits_n
    logits = tl.load(logits_ptr + offs, mask=offs < vocab, other=NOTHING).to(tl.float32)
    top, total = tl.load(top_ptr + here), tl.load(total_ptr + here)
    p = weight(logits, top, inverse_temperature) / total

    taken_ptr += row * vocab  # a program writes to its own chunk only
    tl.store(taken_ptr + offs, tl.zeros([CHUNK], tl.float32), mask=offs < vocab)
    tl.debug_barrier()
    if DRAFTED:
        debt = tl.load(debt_ptr + here)
        for start in range(0, support, K_BLOCK):
            offs_k = here * support + start + tl.arange(0, K_BLOCK)
            given = start + tl.arange(0, K_BLOCK) < support
            ids = tl.load(ids_ptr + offs_k, mask=given, other=0)
            q = tl.load(probs_ptr + offs_k, mask=given, other=0.0).to(tl.float32)
            mine = (q > 0.0) & (ids >= first) & (ids < first + CHUNK)
            tl.store(taken_ptr + ids, debt * q, mask=mine)
    else:
        offs_n = tl.arange(0, N_BLOCK)
        inside = offs_n < nodes
        parents = tl.load(parents_ptr + row * nodes + offs_n, mask=inside, other=-2)
        tokens = tl.load(tokens_ptr + row * nodes + offs_n, mask=inside, other=0)
        mine = (parents == node) & (tokens >= first) & (tokens < first + CHUNK)
        tl.store(taken_ptr + tokens, tl.full([N_BLOCK], 2.0, tl.float32), mask=mine)  # all
    tl.debug_barrier()
    weights = p - tl.load(taken_ptr + offs, mask=offs < vocab, other=0.0)

    race(
        next_token_ptr,
        ranks_ptr,
        arrived_ptr,
        p,
        weights,
        keys_ptr,
        row,
        vocab,
        STREAM,
        C_BLOCK,
        CHUNK,
    )


@triton.jit
def race(
    next_token_ptr,
    ranks_ptr,  # [B, C], scratch
    arrived_ptr,  # [B], zeros
    p,  # [CHUNK]
    weights,  # [CHUNK], what is left of p
    keys_ptr,
    row,
    vocab,
    STREAM: tl.constexpr,
    C_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draw a token of one row from its weights, one chunk of the vocabulary per program.

    Rounding can leave nothing of any token; the target itself is then the answer. So tokens of
    which nothing is left race as well, but come in after all others.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    seed, sequence, step = key_of(keys_ptr, row)
    time = arrivals(seed, sequence, step, STREAM, chunk * (CHUNK // 4), CHUNK // 4)
    rate = tl.maximum(tl.where(weights > 0.0, weights, p), TINY)
    time = tl.where(p > 0.0, time / rate, float("inf"))
    rank = time.to(tl.int32, bitcast=True).to(tl.int64)  # in the order of the times, none negative
    rank = tl.where(weights > 0.0, rank, rank + INDICES)
    rank = tl.where(offs < vocab, rank * INDICES + offs, NO_RANK)
    tl.store(ranks_ptr + row * chunks + chunk, tl.min(rank))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + row, 1) == chunks - 1:  # the last program sees all ranks
        offs_c = tl.arange(0, C_BLOCK)
        ranks = tl.load(
            ranks_ptr + row * chunks + offs_c,
            mask=offs_c < chunks,
            other=NO_RANK,
            cache_modifier=".cg",
        )
        tl.store(next_token_ptr + row, tl.min(ranks) & (INDICES - 1))


@triton.jit(do_not_specialize=["nodes"])
def rest_kernel(
    next_token_ptr,
    taken_ptr,  # [B, V], scratch
    ranks_ptr,  # [B, C], scratch
    arrived_ptr,  # [B], zeros
    logits_ptr,
    top_ptr,  # [B, N]
    total_ptr,  # [B, N]
    node_ptr,
    length_ptr,
    ids_ptr,  # [B, K]
    amounts_ptr,  # [B, K], what is taken off p
    keys_ptr,
    nodes,
    vocab,
    support,
    inverse_temperature,
    stride_logits_b,
    stride_logits_n,
    STREAM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draw the next token after a node that is known, from what is left there."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(length_ptr + row) == 0:
        if chunk == 0:
            tl.store(next_token_ptr + row, 0)
        return
    node = tl.load(node_ptr + row)
    first = chunk * CHUNK
    offs = first + tl.arange(0, CHUNK)
    logits_ptr += row * stride_logits_b + node * stride_logits_n
    logits = tl.load(logits_ptr + offs, mask=offs < vocab, other=NOTHING).to(tl.float32)
    top, total = tl.load(top_ptr + row * nodes + node), tl.load(total_ptr + row * nodes + node)
    p = weight(logits, top, inverse_temperature) / total

    taken_ptr += row * vocab  # a program writes to its own chunk only
    tl.store(taken_ptr + offs, tl.zeros([CHUNK], tl.float32), mask=offs < vocab)
    tl.debug_barrier()
    for start in range(0, support, K_BLOCK):
        offs_k = row * support + start + tl.arange(0, K_BLOCK)
        given = start + tl.arange(0, K_BLOCK) < support
        ids = tl.load(ids_ptr + offs_k, mask=given, other=0)
        amounts = tl.load(amounts_ptr + offs_k, mask=given, other=0.0).to(tl.float32)
        mine = (amounts != 0.0) & (ids >= first) & (ids < first + CHUNK)
        tl.store(taken_ptr + ids, amounts, mask=mine)
    tl.debug_barrier()
    weights = p - tl.load(taken_ptr + offs, mask=offs < vocab, other=0.0)
    race(
        next_token_ptr,
        ranks_ptr,
        arrived_ptr,
        p,
        weights,
        keys_ptr,
        row,
        vocab,
        STREAM,
        C_BLOCK,
        CHUNK,
    )
