"""Which nodes a growing tree gets: scores, the choice of the best, and the tree without the rest.

Legend: B sequences, F expanded nodes, W children of each, T nodes offered, N nodes of the tree.
"""

import torch
from torch import Tensor

DEAD = float("-inf")  # score of a slot that holds no node


def extend(scores: Tensor, probs: Tensor) -> Tensor:
    """[B, F, W] float64: log of the cumulative probability of children, from that of their parents
    and their own.

    Args:
        scores: [B, F] float64, -inf for slots that hold no node.
        probs: [B, F, W] float; where they are not above zero there is no child, and -inf.
    """
    slots = scores[..., None] + probs.double().log().clamp_(max=0.0)
    return slots.nan_to_num_(nan=DEAD, neginf=DEAD)


def best(scores: Tensor, count: int) -> Tensor:
    """[B, T] bool: the `count` best of each row (all, if there are fewer), of equals the earlier
    ones.

    Args:
        scores: [B, T] float64, -inf allowed.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(1, order[:, :count], True)


def places(chosen: Tensor, count: int) -> Tensor:
    """[B, count] int64: where a row of `chosen` [B, T] is true, ascending; where there are fewer,
    then where it is false. `count` is T at most."""
    return chosen.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]


def compact(
    tokens: Tensor, parents: Tensor, kept: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trees without the nodes that are not kept.

    Args:
        tokens: [B, T] int64.
        parents: [B, T] int64, indices of earlier nodes; -1 for roots.
        kept: [B, T] bool, with each node its parent.
        nodes: N, T at most. What is kept beyond it is cut off.

    Returns:
        (tokens [B, N] int64, parents [B, N] int32 with -2 for padding, size [B] int32: nodes kept,
            order [B, N] int64: where each node stood).
    """
    size = kept.sum(dim=1)
    order = places(kept, nodes)
    place = kept.cumsum(dim=1) - 1  # new index of each kept node
    old = parents.gather(1, order)
    new = place.gather(1, old.clamp(min=0)).masked_fill(old == -1, -1)
    padding = torch.arange(nodes, device=size.device) >= size[:, None]
    return tokens.gather(1, order), new.masked_fill(padding, -2).int(), size.int(), order
