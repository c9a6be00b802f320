"""Acceptance: which nodes of each tree are kept, and the token that follows them.

One pass over the logits reduces the vocabulary of every node to a few numbers (`scan`). From there
a rule touches single tokens only: the children of a node and the support of its draft distribution
(`coins`). The next token is drawn by an exponential race over the vocabulary of the last node
(`race`). What the rules mean is said in `specdec.verifier`; coins and races use the numbers of
`specdec.sampling.uniforms`.

Legend: B sequences, N nodes, V vocabulary, K draft candidates, C chunks of the vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.coins import judge
from specdec.kernels.gpu.race import results, walk_and_draw
from specdec.kernels.gpu.scan import in_rows, scan
from specdec.kernels.gpu.softmax import NOTHING
from specdec.kernels.layout import DraftedTrees

NO_TOKEN = tl.constexpr(2**31 - 1)
TILE = 1024  # chunks of nodes that a program looks at together, more would not fit its registers


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
    tops, choices, _ = scan(logits, tree.size, 1.0, torch.int32)
    path, length, next_token = results(tree)
    c_block = triton.next_power_of_2(tops.shape[2])
    n_block = triton.next_power_of_2(nodes)
    _greedy_kernel[(batch,)](
        path,
        length,
        next_token,
        torch.empty(batch, nodes, dtype=torch.int32, device=logits.device),
        tops,
        choices,
        tree.tokens,
        tree.parents,
        tree.size,
        nodes,
        tops.shape[2],
        tree.depth,
        N_BLOCK=n_block,
        N_TILE=min(n_block, max(1, TILE // c_block)),
        C_BLOCK=c_block,
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
    alone = tree._replace(draft_ids=None, draft_probs=None)
    return _coin_accept(alone, logits, temperature, keys, streams)


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
    return _coin_accept(tree, logits, temperature, keys, streams)


RULES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "greedy": greedy_accept,
    "target_only": target_only_accept,
    "recursive_rejection": recursive_rejection_accept,
}
"""Rules by name, called alike."""


def _coin_accept(
    tree: DraftedTrees, logits: Tensor, temperature: float, keys: Tensor, streams: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    tree, logits = _dense(tree, logits)
    judged = judge(tree, logits, temperature=temperature, keys=keys, stream=streams[0])
    return walk_and_draw(
        tree, logits, judged, temperature=temperature, keys=keys, stream=streams[1]
    )


def _dense(tree: DraftedTrees, logits: Tensor) -> tuple[DraftedTrees, Tensor]:
    """With the memory layout the kernels take for granted; nearly always there already."""
    tree = tree._replace(
        tokens=tree.tokens.contiguous(),
        parents=tree.parents.contiguous(),
        size=tree.size.contiguous(),
    )
    return tree, in_rows(logits)


@triton.jit(do_not_specialize=["nodes", "chunks", "edges"])
def _greedy_kernel(
    path_ptr,  # [B, edges + 1]
    length_ptr,
    next_token_ptr,
    under_ptr,  # [B, N], scratch, as `_chosen_under` returns it
    tops_ptr,  # [B, N, C]
    choices_ptr,  # [B, N, C]
    tokens_ptr,
    parents_ptr,
    size_ptr,
    nodes,
    chunks,
    edges,
    N_BLOCK: tl.constexpr,
    N_TILE: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(size_ptr + row)
    offs_n = tl.arange(0, N_BLOCK)
    offs_c = tl.arange(0, C_BLOCK)
    if N_TILE == N_BLOCK:
        under = _chosen_under(
            tops_ptr,
            choices_ptr,
            tokens_ptr,
            parents_ptr,
            row,
            nodes,
            chunks,
            size,
            offs_n,
            offs_c,
        )
    else:  # a few nodes at a time
        under_ptr += row * nodes
        for first in range(0, size, N_TILE):
            some = first + tl.arange(0, N_TILE)
            found = _chosen_under(
                tops_ptr,
                choices_ptr,
                tokens_ptr,
                parents_ptr,
                row,
                nodes,
                chunks,
                size,
                some,
                offs_c,
            )
            tl.store(under_ptr + some, found, mask=some < size)
        tl.debug_barrier()
        under = tl.load(under_ptr + offs_n, mask=offs_n < size, other=-2)  # [N]

    node = tl.zeros([], tl.int32)
    length = (size > 0).to(tl.int64)
    path_ptr += row * (edges + 1)
    tl.store(path_ptr, 0)
    going = size > 0
    for i in range(edges):
        if going:
            child = tl.min(tl.where(under == node, offs_n, N_BLOCK))
            going = child < N_BLOCK
            node = tl.where(going, child, node)
            length += going.to(tl.int64)
        tl.store(path_ptr + i + 1, node)
    tl.store(length_ptr + row, length)
    last = (row * nodes + node) * chunks + offs_c
    known_last = offs_c < tl.where(size > 0, chunks, 0)
    tops = tl.load(tops_ptr + last, mask=known_last, other=NOTHING)
    choices = tl.load(choices_ptr + last, mask=known_last, other=NO_TOKEN)
    choice = tl.min(tl.where(tops == tl.max(tops), choices, NO_TOKEN))
    # Idle rows and logits that are all NaN still get a legal token.
    tl.store(next_token_ptr + row, tl.where(choice < NO_TOKEN, choice, 0))


@triton.jit
def _chosen_under(
    tops_ptr,
    choices_ptr,
    tokens_ptr,
    parents_ptr,
    row,
    nodes,
    chunks,
    size,
    offs_n,
    offs_c,
):
    """Of these nodes [N]: the parent, if its most probable token is the node's; else -2."""
    real = offs_n < size
    parents = tl.load(parents_ptr + row * nodes + offs_n, mask=real, other=-2).to(tl.int32)
    tokens = tl.load(tokens_ptr + row * nodes + offs_n, mask=real, other=-1)
    of_parent = (row * nodes + parents)[:, None] * chunks + offs_c[None, :]  # [N, C]
    known = (parents >= 0)[:, None] & (offs_c < chunks)[None, :]
    tops = tl.load(tops_ptr + of_parent, mask=known, other=NOTHING)
    choices = tl.load(choices_ptr + of_parent, mask=known, other=0)
    largest = tl.max(tops, axis=1)[:, None]
    # Chunks are in the order of the vocabulary: of equal logits the first token is chosen.
    wanted = tl.min(tl.where((tops == largest) & known, choices, NO_TOKEN), axis=1)
    return tl.where((tokens == wanted) & (parents >= 0), parents, -2)
