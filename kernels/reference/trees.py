"""What follows from the parents of a tree."""

import torch
from torch import Tensor

from specdec.kernels.layout import TreeStructure, pack_bits


def tree_structure(parents: Tensor) -> TreeStructure:
    """Ancestors and depth of every node, from the parents alone.

    Args:
        parents: [B, N] int; -1 marks a root, of which there may be several, -2 padding, else the
            index of an earlier node.
    """
    nodes = parents.shape[1]
    if nodes == 1:  # plain decoding should not pay for trees
        depths = torch.zeros_like(parents, dtype=torch.int64)
        return TreeStructure(torch.ones_like(parents, dtype=torch.int32)[..., None], depths)
    index = torch.arange(nodes, device=parents.device)
    edge = (parents[..., None] == index).float()  # [B, N, N]: a node and its parent
    # Doubling: after k products a node reaches its 2**k nearest ancestors.
    reach = edge + torch.eye(nodes, device=parents.device)
    for _ in range(max(0, nodes - 2).bit_length()):
        reach = (reach @ reach).clamp_(max=1.0)
    ancestors = reach > 0
    return TreeStructure(ancestors=pack_bits(ancestors), depths=ancestors.sum(dim=-1) - 1)
