"""tree=threshold: nodes the draft is confident of."""

import math

from torch import Tensor

from specdec.drafters.trees.dynamic import Dynamic
from specdec.protocols import Growth


class Threshold(Dynamic):
    """A candidate becomes a node if the cumulative draft probability of its path is at least
    `threshold`; if there are more than `budget`, the best stay.

    Draft probabilities stand for the chance of acceptance, as in EAGLE-2 (Li et al. 2024, section
    4). Hugging Face's assisted generation ends a chain by a threshold too
    (`assistant_confidence_threshold`), but for the probability of each token alone.

    Sampled children must not be dropped by what they turned out to be, or the outcome would be
    biased. There a node gets as many children as it has candidates that pass, at most an even
    share of the budget on each level, before any child is drawn.

    Args:
        threshold: above 0, at most 1.
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        width: children of a node at most.
        depth: levels if the drafter leaves its depth open. All are drafted, even if none of the
            last ones has a node that passes.
        children: how children are chosen.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        *,
        threshold: float,
        budget: int,
        width: int = 4,
        depth: int = 6,
        children: str = "top_k",
    ) -> None:
        super().__init__(budget=budget, width=width, depth=depth, children=children)
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"tree.threshold={threshold}: must be above 0 and at most 1")
        self.threshold = threshold
        # Nodes of a level exclude each other, so that no more of them can pass; the margin is for
        # probabilities that sum to 1 only nearly.
        self.expanded = min(budget, int(1.001 / threshold))

    def select(self, at: Growth, scores: Tensor) -> Tensor:
        sure = scores >= math.log(self.threshold)
        share = super().select(at, scores)
        return sure if share is None else sure & share
