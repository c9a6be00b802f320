"""What follows from the parents of a tree, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.layout import TreeStructure, words

BLOCK_NODES = 32  # nodes of a program
BLOCK_OTHERS = 32  # nodes it compares its own with at a time


def tree_structure(
    parents: Tensor, lengths: Tensor | None = None, *, links: bool = False
) -> TreeStructure:
    """As `specdec.kernels.reference.tree_structure`."""
    batch, nodes = parents.shape
    device = parents.device
    ancestors = torch.empty(batch, nodes, words(nodes), dtype=torch.int32, device=device)
    depths = torch.empty(batch, nodes, dtype=torch.int64, device=device)
    positions = depths if lengths is None else torch.empty_like(depths)
    first_child, next_sibling = None, None
    if links:
        first_child = torch.empty(batch, nodes, dtype=torch.int32, device=device)
        next_sibling = torch.empty_like(first_child)
    structure = TreeStructure(ancestors, depths, positions, first_child, next_sibling)
    tree_structure_kernel[(triton.cdiv(nodes, BLOCK_NODES), batch)](
        *structure,
        parents.contiguous(),
        lengths,
        nodes,
        WORDS=words(nodes),
        WORDS_PADDED=triton.next_power_of_2(words(nodes)),
        BLOCK_NODES=BLOCK_NODES,
        BLOCK_OTHERS=BLOCK_OTHERS,
        num_warps=4,
    )
    return structure


@triton.jit(do_not_specialize=["nodes"])
def tree_structure_kernel(
    ancestors_ptr,  # [B, N, W] int32
    depths_ptr,  # [B, N] int64
    positions_ptr,  # [B, N] int64
    first_child_ptr,  # [B, N] int32 or None
    next_sibling_ptr,  # [B, N] int32 or None
    parents_ptr,  # [B, N]
    lengths_ptr,  # [B] or None
    nodes,
    WORDS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """One program for a block of nodes of one tree."""
    sequence = tl.program_id(1).to(tl.int64)
    parents_ptr += sequence * nodes
    offs_node = tl.program_id(0) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    real = offs_node < nodes
    parent = tl.load(parents_ptr + offs_node, mask=real, other=-2).to(tl.int32)

    # All nodes of the block walk up together; each leaves a bit wherever it comes by.
    offs_word = tl.arange(0, WORDS_PADDED)
    at = tl.where(real, offs_node, -1)
    bits = tl.zeros((BLOCK_NODES, WORDS_PADDED), dtype=tl.int32)
    depth = tl.full((BLOCK_NODES,), -1, dtype=tl.int64)
    while tl.max(at) >= 0:
        here = (at[:, None] >> 5) == offs_word[None, :]  # [BLOCK_NODES, WORDS_PADDED]
        bits |= tl.where(here, 1 << (at[:, None] & 31), 0)
        depth += (at >= 0).to(tl.int64)
        above = tl.load(parents_ptr + at, mask=at >= 0, other=-1).to(tl.int32)
        at = tl.where(above < at, above, -1)  # so that nonsense cannot keep a GPU busy for ever

    offs_out = sequence * nodes + offs_node
    word_ptrs = ancestors_ptr + offs_out[:, None] * WORDS + offs_word[None, :]
    tl.store(word_ptrs, bits, mask=real[:, None] & (offs_word < WORDS)[None, :])
    tl.store(depths_ptr + offs_out, depth, mask=real)
    if lengths_ptr is not None:
        tl.store(positions_ptr + offs_out, tl.load(lengths_ptr + sequence) + depth, mask=real)
    if first_child_ptr is not None:
        child = tl.full((BLOCK_NODES,), nodes, dtype=tl.int32)
        sibling = tl.full((BLOCK_NODES,), nodes, dtype=tl.int32)
        for begin in range(0, nodes, BLOCK_OTHERS):
            offs_other = begin + tl.arange(0, BLOCK_OTHERS)
            theirs = tl.load(parents_ptr + offs_other, mask=offs_other < nodes, other=-2).to(
                tl.int32
            )
            born = theirs[None, :] == offs_node[:, None]  # [BLOCK_NODES, BLOCK_OTHERS]
            child = tl.minimum(child, tl.min(tl.where(born, offs_other[None, :], nodes), axis=1))
            younger = (offs_other[None, :] > offs_node[:, None]) & (parent[:, None] >= 0)
            younger &= theirs[None, :] == parent[:, None]
            sibling = tl.minimum(
                sibling, tl.min(tl.where(younger, offs_other[None, :], nodes), axis=1)
            )
        tl.store(first_child_ptr + offs_out, tl.where(child < nodes, child, -1), mask=real)
        tl.store(next_sibling_ptr + offs_out, tl.where(sibling < nodes, sibling, -1), mask=real)
