"""Ways down a tree: which nodes are kept, once a rule knows what it takes or where it ends."""

from types import ModuleType

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.layout import unpack_bits
from specdec.tree import ROOT, TokenTree

Path = tuple[Tensor, Tensor, Tensor]
"""(path [B, depth + 1] int64, length [B] int64, last [B] int64: the final node of each path). An
idle row has length 0 and path 0."""


def walk(tree: TokenTree, taken: Tensor, kernels: ModuleType = reference) -> Path:
    """From the root enter the first child that is taken, until none is.

    Args:
        taken: [B, N] bool, whether a node is accepted once its parent is and its elder siblings
            are not. Where siblings have the same token the eldest of them is entered: it is the
            one that has children.
    """
    if kernels.LOOKS:  # where launches cost little, and trees are small
        return _step_by_step(tree, taken)
    elder = elder_siblings(tree)
    first = taken & ~(elder & taken[:, None]).any(-1)
    twins = elder.mT & (tree.tokens[:, :, None] == tree.tokens[:, None, :])  # younger ones
    eldest = ~twins.any(1)
    entered = eldest & (first | (twins & first[:, None]).any(-1)) | (tree.parents == ROOT)
    return _line(tree, ~(_ancestors(tree, kernels) & ~entered[:, None]).any(-1))


def _step_by_step(tree: TokenTree, taken: Tensor) -> Path:
    """As `walk`, level by level."""
    parents = tree.parents
    repeats = tree.proposal is not None and tree.proposal.children == "sample_with_replacement"
    node = torch.zeros_like(tree.size, dtype=torch.int64)  # [B]
    alive = tree.size > 0
    path, length = [node], alive.long()
    for _ in range(tree.depth):
        children = parents == node[:, None]  # [B, N]; never true for padding, whose parent is -2
        hits = children & taken
        alive = alive & hits.any(dim=1)
        first = hits.int().argmax(dim=1)  # argmax is the first
        if repeats:
            twins = children & (tree.tokens == tree.tokens.gather(1, first[:, None]))
            first = twins.int().argmax(dim=1)
        node = torch.where(alive, first, node)
        path.append(node)
        length = length + alive
    return torch.stack(path, dim=1), length, node


def descend_to(tree: TokenTree, last: Tensor, kernels: ModuleType = reference) -> Path:
    """From the root to the node `last` ([B])."""
    return _line(tree, *at(last, _ancestors(tree, kernels)))


def deepest(tree: TokenTree, taken: Tensor, kernels: ModuleType = reference) -> Tensor:
    """[B] int64: the end of the longest path of taken nodes ([B, N] bool), of equals the first."""
    ancestors = _ancestors(tree, kernels)
    barred = ~(taken | (tree.parents == ROOT))
    reached = ~(ancestors & barred[:, None]).any(-1) & _real(tree)
    return (ancestors.sum(-1) * reached).argmax(1)


def at(node: Tensor, *values: Tensor) -> list[Tensor]:
    """[B, ...] each: the entry of `node` ([B]) in [B, N, ...] values."""
    rows = torch.arange(len(node), device=node.device)
    return [value[rows, node] for value in values]


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


def child_counts(tree: TokenTree) -> Tensor:
    """[B, N] int64: how many children each node has."""
    parents = tree.parents.long()
    return torch.zeros_like(parents).scatter_add(1, parents.clamp(min=0), (parents >= 0).long())


def elder_siblings(tree: TokenTree) -> Tensor:
    """[B, N, N] bool: entry (i, j) is True if j is an elder sibling of i (same parent, tried
    before it)."""
    parents = tree.parents
    same = (parents[:, :, None] == parents[:, None, :]) & (parents >= 0)[:, :, None]
    return same.tril(-1)


def _ancestors(tree: TokenTree, kernels: ModuleType) -> Tensor:
    """[B, N, N] bool: entry (i, j) is True if j is an ancestor of i or i itself."""
    structure = kernels.tree_structure(tree.parents)
    return unpack_bits(structure.ancestors, tree.nodes)


def _real(tree: TokenTree) -> Tensor:
    """[B, N] bool, False for padding and idle rows."""
    return torch.arange(tree.nodes, device=tree.size.device) < tree.size[:, None]


def _line(tree: TokenTree, kept: Tensor) -> Path:
    """The kept nodes ([B, N] bool), which lie on one path, in order."""
    kept = kept & _real(tree)
    length = kept.sum(1)
    # Parents come before their children, so the order of the nodes is that of the path; the others
    # all go to an extra last place.
    place = torch.where(kept, kept.cumsum(1) - 1, tree.depth + 1)
    index = torch.arange(tree.nodes, device=kept.device).expand_as(place)
    path = torch.zeros(len(kept), tree.depth + 2, dtype=torch.int64, device=kept.device)
    path = path.scatter(1, place, index)[:, :-1]
    last = path.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    return path, length, last
