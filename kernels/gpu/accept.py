"""Acceptance: which nodes of each tree are kept, and the token that follows them.

One pass over the logits reduces the vocabulary of every node to a few numbers. From there a rule
touches single tokens only: the children of a node and the support of its draft distribution. The
next token is drawn by an exponential race over the vocabulary of the last node. What the rules
mean is said in `specdec.verifier`; coins and races use the numbers of `specdec.sampling.uniforms`.

Legend: B sequences, N nodes, V vocabulary, K draft candidates, C chunks of the vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.coins import NOTHING, joined, judge_kernel, weight
from specdec.kernels.gpu.race import race_kernel, rest_kernel
from specdec.kernels.layout import DraftedTrees, TargetLaw

SCAN_BYTES = 16384  # logits of a program of the pass over all of them
RACE_CHUNK = 1024  # tokens of a program of the race, which computes more for each
SUPPORT_BLOCK = 256  # draft candidates looked at together
NO_TOKEN = tl.constexpr(2**31 - 1)


def greedy_accept(
    tree: DraftedTrees,
    logits: Tensor,
    *,
    temperature: float,
    keys: Tensor | None,
    streams: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`specdec.verifier.greedy`: `temperature`, `keys` and `streams` are not looked at.

    Arguments and results are those of `target_only_accept`.
    """
    tree, logits = _dense(tree, logits)
    batch, nodes, _ = logits.shape
    tops, choices, _ = _scan(logits, tree.size, 1.0, torch.int32)
    path, length, next_token = _results(tree, logits)
    _greedy_kernel[(batch,)](
        path,
        length,
        next_token,
        tops,
        choices,
        tree.tokens,
        tree.parents,
        tree.size,
        nodes,
        tops.shape[2],
        tree.depth,
        N_BLOCK=triton.next_power_of_2(nodes),
        C_BLOCK=triton.next_power_of_2(tops.shape[2]),
        num_warps=4,
    )
    return path, length, next_token


def target_only_accept(
    tree: DraftedTrees,
    logits: Tensor,
    *,
    temperature: float,
    keys: Tensor,
    streams: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`specdec.verifier.target_only`.

    Args:
        tree: the trees.
        logits: [B, N, V] bfloat16, float16 or float32; those of padding nodes and idle rows are
            not read.
        temperature: what the logits are divided by, above 0.
        keys: [B, 3] int64, seed, sequence and step as the bits of uint64.
        streams: of the coins and of the race.

    Returns:
        (path [B, depth + 1] int64, length [B] int64, next token [B] int64), as in
        `specdec.tree.Acceptance`; all 0 for idle rows.
    """
    return _coin_accept(tree, logits, temperature, keys, streams)


def recursive_rejection_accept(
    tree: DraftedTrees,
    logits: Tensor,
    *,
    temperature: float,
    keys: Tensor,
    streams: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`specdec.verifier.recursive_rejection`.

    Arguments and results are those of `target_only_accept`.

    Raises:
        ValueError: trees with children, but no draft probabilities.
    """
    if tree.draft_ids is None and tree.depth:
        raise ValueError("acceptance=recursive_rejection: the tree has no draft probabilities")
    draft = tree.draft_ids, tree.draft_probs
    return _coin_accept(tree, logits, temperature, keys, streams, *draft)


RULES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "greedy": greedy_accept,
    "target_only": target_only_accept,
    "recursive_rejection": recursive_rejection_accept,
}
"""Rules by name, called alike."""


def _coin_accept(
    tree: DraftedTrees,
    logits: Tensor,
    temperature: float,
    keys: Tensor,
    streams: tuple[int, int],
    draft_ids: Tensor | None = None,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tree, logits = _dense(tree, logits)
    batch, nodes, vocab = logits.shape
    device = logits.device
    tops, totals, _ = _scan(logits, tree.size, 1.0 / temperature, torch.float32)
    debt, top, total = (
        torch.empty(batch, nodes, dtype=torch.float32, device=device) for _ in range(3)
    )
    enter = torch.empty(batch, nodes, dtype=torch.int32, device=device)
    arrived = torch.empty(batch, dtype=torch.int32, device=device)
    drafted = draft_ids is not None and draft_probs is not None
    ids = tree.tokens[..., None] if draft_ids is None else draft_ids.contiguous()
    probs = top[..., None] if draft_probs is None else draft_probs.contiguous()
    support = ids.shape[2]
    n_block = triton.next_power_of_2(nodes)
    k_block = min(triton.next_power_of_2(support), SUPPORT_BLOCK)
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
        tops.shape[2],
        support,
        1.0 / temperature,
        logits.stride(0),
        logits.stride(1),
        STREAM=streams[0],
        DRAFTED=drafted,
        REPEATS=tree.repeats,
        N_BLOCK=n_block,
        C_BLOCK=triton.next_power_of_2(tops.shape[2]),
        K_BLOCK=k_block,
        num_warps=1,
    )
    chunk, taken, ranks = _track(logits)
    chunks = ranks.shape[1]
    path, length, next_token = _results(tree, logits)
    race_kernel[(chunks, batch)](
        path,
        length,
        next_token,
        taken,
        ranks,
        arrived,
        logits,
        enter,
        debt,
        top,
        total,
        ids,
        probs,
        tree.tokens,
        tree.parents,
        tree.size,
        keys,
        nodes,
        vocab,
        support,
        tree.depth,
        1.0 / temperature,
        logits.stride(0),
        logits.stride(1),
        STREAM=streams[1],
        DRAFTED=drafted,
        N_BLOCK=n_block,
        K_BLOCK=k_block,
        C_BLOCK=triton.next_power_of_2(chunks),
        CHUNK=chunk,
        num_warps=4,
    )
    return path, length, next_token


def target_law(
    logits: Tensor, size: Tensor, *, temperature: float, entropy: bool = False
) -> TargetLaw:
    """As `specdec.kernels.reference.target_law`; finite for nodes that are not real."""
    logits, size = _in_rows(logits), size.contiguous()
    batch, nodes, _ = logits.shape
    tops, totals, logs = _scan(logits, size, 1.0 / temperature, torch.float32, entropy=entropy)
    top = torch.empty(batch, nodes, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(top)
    law = TargetLaw(top, total, temperature, torch.empty_like(top) if entropy else None)
    _law_kernel[(nodes, batch)](
        top,
        total,
        law.entropy,
        tops,
        totals,
        logs,
        size,
        tops.shape[2],
        1.0 / temperature,
        C_BLOCK=triton.next_power_of_2(tops.shape[2]),
        num_warps=1,
    )
    return law


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
    logits = _in_rows(logits)
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
        1.0 / law.temperature,
        logits.stride(0),
        logits.stride(1),
        STREAM=stream,
        K_BLOCK=min(triton.next_power_of_2(support), SUPPORT_BLOCK),
        C_BLOCK=triton.next_power_of_2(ranks.shape[1]),
        CHUNK=chunk,
        num_warps=4,
    )
    return next_token


def _scan(
    logits: Tensor,
    size: Tensor,
    inverse_temperature: float,
    second: torch.dtype,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, N, C] of each chunk: the largest logit; and its lowest index (second=int32), or the sum
    of the weights exp((logit - largest) / temperature) (float32); and, for the entropy, the sum of
    the weights times their logarithms."""
    batch, nodes, vocab = logits.shape
    chunk = min(SCAN_BYTES // logits.element_size(), max(triton.next_power_of_2(vocab), 16))
    chunks = triton.cdiv(vocab, chunk)
    tops = torch.empty(batch, nodes, chunks, dtype=torch.float32, device=logits.device)
    seconds = torch.empty(batch, nodes, chunks, dtype=second, device=logits.device)
    logs = torch.empty_like(tops) if entropy else None
    _scan_kernel[(chunks, nodes, batch)](
        tops,
        seconds,
        logs,
        logits,
        size,
        vocab,
        inverse_temperature,
        logits.stride(0),
        logits.stride(1),
        INDEX=second == torch.int32,
        CHUNK=chunk,
        num_warps=8,
    )
    return tops, seconds, logs


def _track(logits: Tensor) -> tuple[int, Tensor, Tensor]:
    """Tokens of a program of the race, and its scratch: [B, V] float32, [B, C] int64."""
    batch, _, vocab = logits.shape
    chunk = min(RACE_CHUNK, max(triton.next_power_of_2(vocab), 16))
    taken = torch.empty(batch, vocab, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(batch, triton.cdiv(vocab, chunk), dtype=torch.int64, device=logits.device)
    return chunk, taken, ranks


def _results(tree: DraftedTrees, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, device = logits.shape[0], logits.device
    path = torch.empty(batch, tree.depth + 1, dtype=torch.int64, device=device)
    length = torch.empty(batch, dtype=torch.int64, device=device)
    next_token = torch.empty(batch, dtype=torch.int64, device=device)
    return path, length, next_token


def _dense(tree: DraftedTrees, logits: Tensor) -> tuple[DraftedTrees, Tensor]:
    """With the memory layout the kernels take for granted; nearly always there already."""
    tree = tree._replace(
        tokens=tree.tokens.contiguous(),
        parents=tree.parents.contiguous(),
        size=tree.size.contiguous(),
    )
    return tree, _in_rows(logits)


def _in_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(2) == 1 else logits.contiguous()


@triton.jit
def _scan_kernel(
    tops_ptr,  # [B, N, C]
    seconds_ptr,  # [B, N, C]
    logs_ptr,  # [B, N, C] or None
    logits_ptr,
    size_ptr,
    vocab,
    inverse_temperature,
    stride_logits_b,
    stride_logits_n,
    INDEX: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, node, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if node >= tl.load(size_ptr + row):
        return
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    at = logits_ptr + row.to(tl.int64) * stride_logits_b + node.to(tl.int64) * stride_logits_n
    logits = tl.load(at + offs, mask=offs < vocab, other=NOTHING).to(tl.float32)
    largest = tl.max(logits)
    if INDEX:
        second = tl.min(tl.where(logits == largest, offs, vocab - 1))
    else:
        weights = weight(logits, largest, inverse_temperature)
        second = tl.sum(weights)
    out = (row.to(tl.int64) * tl.num_programs(1) + node) * tl.num_programs(0) + chunk
    tl.store(tops_ptr + out, largest)
    tl.store(seconds_ptr + out, second)
    if logs_ptr is not None:
        below = tl.where(weights > 0.0, (logits - largest) * inverse_temperature, 0.0)
        tl.store(logs_ptr + out, tl.sum(weights * below))


@triton.jit(do_not_specialize=["chunks"])
def _law_kernel(
    top_ptr,  # [B, N]
    total_ptr,  # [B, N]
    entropy_ptr,  # [B, N] or None
    tops_ptr,  # [B, N, C]
    totals_ptr,  # [B, N, C]
    logs_ptr,  # [B, N, C] or None
    size_ptr,
    chunks,
    inverse_temperature,
    C_BLOCK: tl.constexpr,
):
    """Join the chunks of one node."""
    node, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = row * tl.num_programs(0) + node
    if node >= tl.load(size_ptr + row):
        tl.store(top_ptr + here, 0.0)
        tl.store(total_ptr + here, 1.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + here, 0.0)
        return
    top, total = joined(tops_ptr, totals_ptr, here, chunks, inverse_temperature, C_BLOCK)
    tl.store(top_ptr + here, top)
    tl.store(total_ptr + here, total)
    if entropy_ptr is not None:
        offs_c = here * chunks + tl.arange(0, C_BLOCK)
        inside = tl.arange(0, C_BLOCK) < chunks
        tops = tl.load(tops_ptr + offs_c, mask=inside, other=NOTHING)
        totals = tl.load(totals_ptr + offs_c, mask=inside, other=0.0)
        logs = tl.load(logs_ptr + offs_c, mask=inside, other=0.0)
        scale = weight(tops, top, inverse_temperature)
        below = tl.where(scale > 0.0, (tops - top) * inverse_temperature, 0.0)
        logs = tl.sum(scale * (logs + totals * below))
        tl.store(entropy_ptr + here, tl.log(total) - logs / total)


@triton.jit(do_not_specialize=["nodes", "chunks", "edges"])
def _greedy_kernel(
    path_ptr,  # [B, edges + 1]
    length_ptr,
    next_token_ptr,
    tops_ptr,  # [B, N, C]
    choices_ptr,  # [B, N, C]
    tokens_ptr,
    parents_ptr,
    size_ptr,
    nodes,
    chunks,
    edges,
    N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(size_ptr + row)
    offs_n = tl.arange(0, N_BLOCK)
    offs_c = tl.arange(0, C_BLOCK)
    real = offs_n < size
    parents = tl.load(parents_ptr + row * nodes + offs_n, mask=real, other=-2)  # [N]
    tokens = tl.load(tokens_ptr + row * nodes + offs_n, mask=real, other=-1)
    of_parent = (row * nodes + parents)[:, None] * chunks + offs_c  # [N, C]
    known = (parents >= 0)[:, None] & (offs_c < chunks)
    tops = tl.load(tops_ptr + of_parent, mask=known, other=NOTHING)
    choices = tl.load(choices_ptr + of_parent, mask=known, other=0)
    largest = tl.max(tops, axis=1)[:, None]
    # Chunks are in the order of the vocabulary: of equal logits the first token is chosen.
    wanted = tl.min(tl.where((tops == largest) & known, choices, NO_TOKEN), axis=1)
    taken = tokens == wanted  # [N]

    node = tl.zeros([], tl.int32)
    length = (size > 0).to(tl.int64)
    path_ptr += row * (edges + 1)
    tl.store(path_ptr, 0)
    for i in range(edges):
        child = tl.min(tl.where(taken & (parents == node), offs_n, N_BLOCK))
        node = tl.where(child < N_BLOCK, child, node)
        length += (child < N_BLOCK).to(tl.int64)
        tl.store(path_ptr + i + 1, node)
    tl.store(length_ptr + row, length)
    last = (row * nodes + node) * chunks + offs_c
    known_last = offs_c < tl.where(size > 0, chunks, 0)
    tops = tl.load(tops_ptr + last, mask=known_last, other=NOTHING)
    choices = tl.load(choices_ptr + last, mask=known_last, other=NO_TOKEN)
    choice = tl.min(tl.where(tops == tl.max(tops), choices, NO_TOKEN))
    # Idle rows and logits that are all NaN still get a legal token.
    tl.store(next_token_ptr + row, tl.where(choice < NO_TOKEN, choice, 0))
