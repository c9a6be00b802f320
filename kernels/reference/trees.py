"""What follows from the parents of a tree."""

import torch
from torch import Tensor

from specdec.kernels.layout import TreeStructure, pack_bits


def tree_structure(
    parents: Tensor, lengths: Tensor | None = None, *, links: bool = False
) -> TreeStructure:
    """Ancestors, depths, positions and family links of every node, from the parents alone.

    Args:
        parents: [B, N] int; -1 marks a root, of which there may be several, -2 padding, else the
            index of an earlier node.
        lengths: [B] int, committed tokens before each tree: the position of its roots. None
            counts positions from the roots.
        links: whether to find first children and next siblings too.
    """
    nodes = parents.shape[1]
    if nodes == 1:  # plain decoding should not pay for trees
        depths = torch.zeros_like(parents, dtype=torch.int64)
        nobody = torch.full_like(parents, -1, dtype=torch.int32) if links else None
        ancestors = torch.ones_like(parents, dtype=torch.int32)[..., None]
        return TreeStructure(ancestors, depths, _positions(depths, lengths), nobody, nobody)
    index = torch.arange(nodes, device=parents.device)
    child_of = parents[..., None] == index  # [B, N, N]: a node and its parent
    edge = child_of.float()
    # Doubling: after k products a node reaches its 2**k nearest ancestors.
    reach = edge + torch.eye(nodes, device=parents.device)
    for _ in range(max(0, nodes - 2).bit_length()):
        reach = (reach @ reach).clamp_(max=1.0)
    ancestors = reach > 0
    depths = ancestors.sum(dim=-1) - 1
    first_child, next_sibling = None, None
    if links:
        younger_siblings = (edge @ edge.mT).triu_(1) > 0
        first_child, next_sibling = _eldest(child_of.mT), _eldest(younger_siblings)
    return TreeStructure(
        ancestors=pack_bits(ancestors),
        depths=depths,
        positions=_positions(depths, lengths),
        first_child=first_child,
        next_sibling=next_sibling,
    )


def _eldest(family: Tensor) -> Tensor:
    """[B, N, N] bool to [B, N] int32: the first true of each row, -1 for none."""
    return torch.where(family.any(-1), family.int().argmax(-1), -1).int()


def _positions(depths: Tensor, lengths: Tensor | None) -> Tensor:
    return depths if lengths is None else lengths[:, None] + depths
