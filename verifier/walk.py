"""The walk all sibling-by-sibling rules share: from the root, enter the first child that is taken,
until none is."""

import torch
from torch import Tensor

from specdec.tree import TokenTree


def walk(tree: TokenTree, taken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Follow taken nodes down from the root.

    Args:
        taken: [B, N] bool, whether a node is accepted once its parent is and its elder siblings
            are not.

    Returns:
        (path [B, depth + 1] int64, length [B] int64, last [B] int64: the final node of each path).
            An idle row
        has length 0.
    """
    parents = tree.parents
    node = torch.zeros_like(tree.size, dtype=torch.int64)  # [B]
    alive = tree.size > 0
    path, length = [node], alive.long()
    for _ in range(tree.depth):
        hits = (
            parents == node[:, None]
        ) & taken  # [B, N]; never true for padding, whose parent is -2
        alive = alive & hits.any(dim=1)
        node = torch.where(
            alive, hits.int().argmax(dim=1), node
        )  # argmax is the first, eldest child
        path.append(node)
        length = length + alive
    return torch.stack(path, dim=1), length, node


def one_of_siblings(tree: TokenTree, mass: Tensor) -> Tensor:
    """[B, N] chance to accept each node once its parent is accepted and its elder siblings are
    not, where siblings are events that exclude each other.

    Args:
        mass: [B, N] chance of each once its parent is accepted. The same token twice among
            siblings is one event, and the second can only be met after the first was turned down.
    """
    elder = elder_siblings(tree)
    again = elder & (tree.tokens[:, :, None] == tree.tokens[:, None, :])
    mass = mass.masked_fill(again.any(-1), 0.0)
    left = 1.0 - (elder.to(mass.dtype) @ mass[..., None])[..., 0]
    return torch.where(mass > 0, mass / left.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def elder_siblings(tree: TokenTree) -> Tensor:
    """[B, N, N] bool: entry (i, j) is True if j is an elder sibling of i (same parent, tried
    before it)."""
    parents = tree.parents
    same = (parents[:, :, None] == parents[:, None, :]) & (parents >= 0)[:, :, None]
    return same.tril(-1)
