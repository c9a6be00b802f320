"""What follows from the parents of a tree, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.layout import TreeStructure, words

BLOCK_NODES = 32  # nodes of a program


def tree_structure(parents: Tensor) -> TreeStructure:
    """As `specdec.kernels.reference.tree_structure`."""
    batch, nodes = parents.shape
    device = parents.device
    ancestors = torch.empty(batch, nodes, words(nodes), dtype=torch.int32, device=device)
    depths = torch.empty(batch, nodes, dtype=torch.int64, device=device)
    tree_structure_kernel[(triton.cdiv(nodes, BLOCK_NODES), batch)](
        ancestors,
        depths,
        parents.contiguous(),
        nodes,
        WORDS=words(nodes),
        WORDS_PADDED=triton.next_power_of_2(words(nodes)),
        BLOCK_NODES=BLOCK_NODES,
        num_warps=4,
    )
    return TreeStructure(ancestors, depths)


@triton.jit(do_not_specialize=["nodes"])
def tree_structure_kernel(
    ancestors_ptr,  # [B, N, W] int32
    depths_ptr,  # [B, N] int64
    parents_ptr,  # [B, N]
    nodes,
    WORDS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    """One program for a block of nodes of one tree."""
    sequence = tl.program_id(1).to(tl.int64)
    parents_ptr += sequence * nodes
    offs_node = tl.program_id(0) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    real = offs_node < nodes

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
