"""Trees as they are recorded: what a step drafted, what draft and target gave to each node, and
what was kept of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.sampling import SamplingParams, filtered
from specdec.tree import TokenTree, of_parents

CHUNK = 64  # nodes whose distributions are written out at a time
DIGITS = 6  # of probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRecord:
    """The tree of one sequence in one step.

    Args:
        request: id of the sequence.
        step: which of its steps, from 0.
        tokens: of the nodes; that of the first, the root, is the last committed one.
        parents: of the nodes, -1 of the root.
        draft: what the draft gave to the token of each node after its parent, as rules are told
            it; None for the root, and where the drafter has no probability.
        target: what the target gave to it, as `target_probs` has it; None for the root.
        path: nodes that the rule kept, the root first.
        next_token: the target's own after them.
    """

    request: int
    step: int
    tokens: list[int]
    parents: list[int]
    draft: list[float | None]
    target: list[float | None]
    path: list[int]
    next_token: int

    @classmethod
    def of(
        cls,
        figures: Tensor,
        *,
        request: int,
        step: int,
        parents: list[int],
        path: list[int],
        next_token: int,
    ) -> "TreeRecord":
        """From what `figures_of` says, [N, 3] or more of it, of as many nodes as have parents."""
        tokens, draft, target = figures[: len(parents)].T.tolist()
        return cls(
            request=request,
            step=step,
            tokens=[int(token) for token in tokens],
            parents=parents,
            draft=_probabilities(draft),
            target=_probabilities(target),
            path=path,
            next_token=next_token,
        )


def figures_of(tree: TokenTree, logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[B, N, 3] float64: of every node the token, and what the draft and the target gave to it;
    NaN for none.

    Args:
        logits: [B, N, V] of the target, as the rule sees them.
    """
    root = tree.parents < 0
    draft = torch.full(tree.tokens.shape, torch.nan, dtype=torch.float64, device=logits.device)
    if tree.proposal is not None:
        (given,) = of_parents(tree, tree.proposal, tree.proposal.probs)
        draft = torch.where(given > 0, given.double(), draft)
    target = target_probs(tree, logits, sampling).double().masked_fill(root, torch.nan)
    return torch.stack([tree.tokens.double(), draft, target], dim=-1)


def target_probs(tree: TokenTree, logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[B, N]: what the target's distribution after each node's parent gives to its token. At
    temperature 0 it is the model's own, as at temperature 1 without filters; void for roots."""
    batch, nodes, _ = logits.shape
    parents = tree.parents.long().clamp(min=0)
    first = torch.arange(0, batch * nodes, nodes, device=logits.device)[:, None]
    rows, tokens = (first + parents).flatten(), tree.tokens.flatten()
    given = []
    for some, own in zip(rows.split(CHUNK), tokens.split(CHUNK), strict=True):
        scores = logits.flatten(0, 1).index_select(0, some)
        if not sampling.greedy:
            scores = filtered(scores, sampling)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        given.append(scores.softmax(-1, dtype=wide).gather(1, own[:, None])[:, 0])
    return torch.cat(given).view(batch, nodes)


def _probabilities(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]
