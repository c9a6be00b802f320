"""Mixing the answers of several drafters to one frontier.

Legend: B sequences, F nodes of a frontier, P drafters, K candidates of all of them together.
"""

import torch
from torch import Tensor

from specdec.drafters.growth import padded_cat
from specdec.tree import TokenTree

Answer = tuple[Tensor, Tensor]  # ids [B, F, k] and probabilities [B, F, k], as of `growth.Expand`


def mix(answers: dict[int, Answer], weights: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture of distributions, tokens that several name merged.

    Args:
        answers: by number of a drafter.
        weights: [B, P] of all drafters, not negative; they are shared out among those who have an
            answer.
        width: how many candidates are kept, the most probable ones.

    Returns:
        (ids, probabilities in descending order, and the number of the drafter that gave a
            candidate most of its probability; each [B, F, min(width, K)].)
    """
    ids = torch.cat([ids for ids, _ in answers.values()], dim=2)  # [B, F, K]
    owner = torch.cat([torch.full_like(ids[0, 0], n) for n, (ids, _) in answers.items()])  # [K]
    weight = weights[:, None, owner]  # [B, 1, K]
    mass = torch.cat([probs.double() for _, probs in answers.values()], dim=2) * weight
    answering = torch.stack(
        [(probs > 0).any(-1) * weights[:, n, None] for n, (_, probs) in answers.items()]
    )
    mass = mass / answering.sum(0).clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    same = (ids[..., None] == ids[..., None, :]) * mass[..., None, :]  # [B, F, K, K]
    again = (same > 0).tril(-1).any(-1)  # named before
    merged = same.sum(-1).masked_fill(again | (mass <= 0), 0.0)
    best, order = merged.sort(dim=-1, descending=True, stable=True)
    order = order[..., :width]
    source = owner[same.argmax(-1)].gather(2, order)
    return ids.gather(2, order), best[..., :width], source


def sources_of(tree: TokenTree, expanded: Tensor, offered: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[B, N] int8: which drafter each node is from; 0 for the root and padding.

    Args:
        expanded: [B, N] as `growth.grow` returns it.
        offered: ids and sources [B, F, K] of the candidates of each frontier.
    """
    ids, sources = padded_cat(offered)  # [B, E, K]
    parent = expanded.gather(1, tree.parents.long().clamp(min=0)).clamp(min=0)  # [B, N]
    index = parent[..., None].expand(-1, -1, ids.shape[2])
    same = ids.gather(1, index) == tree.tokens[..., None]
    # Of a token that is listed twice the first place counts: the other has no probability.
    found = sources.gather(1, index).gather(2, same.byte().argmax(-1, keepdim=True))[..., 0]
    return found.masked_fill(tree.parents < 0, 0).to(torch.int8)
