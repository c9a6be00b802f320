"""tree=dynamic: the budget goes where the draft is confident."""

from torch import Tensor

from specdec.drafters.trees.policy import BasePolicy, check_positive, kernels_on


class Dynamic(BasePolicy):
    """Best-first by cumulative draft probability (EAGLE-2, Li et al. 2024, section 4).

    At each level the `width` best new nodes are expanded, each offers its `width` best children,
    and in the end the `budget` best of all candidates stay.

    Sampled children must not be dropped by what they turned out to be, or the outcome would be
    biased. There the budget is divided evenly over the levels, and a level's share goes to the
    parents whose next most probable child would score best, before any child is drawn.

    Args:
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        width: nodes expanded per level, and candidates of each.
        depth: levels if the drafter leaves its depth open.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, *, budget: int, width: int = 3, depth: int = 4, children: str = "top_k"
    ) -> None:
        super().__init__(budget=budget, children=children)
        check_positive(width=width, depth=depth)
        self.candidates = width
        self.depth = depth
        self.expanded = width  # nodes of a level that may have children

    def levels(self, depth: int | None) -> int:
        return min(self.depth if depth is None else depth, self.budget)

    def width(self, level: int) -> int:
        return min(self.candidates, self.budget)

    def select(self, level: int, levels: int, scores: Tensor, *, sampled: bool) -> Tensor:
        possible = super().select(level, levels, scores, sampled=sampled)
        if not sampled:
            return possible
        share = self.budget // levels + (level < self.budget % levels)
        best = kernels_on(scores.device).best(scores.flatten(1), share)
        return possible & best.view_as(scores)

    def expand(self, level: int, scores: Tensor) -> Tensor | None:
        if scores.shape[1] <= self.expanded:
            return None
        kernels = kernels_on(scores.device)
        return kernels.places(kernels.best(scores, self.expanded), self.expanded)

    def keep(self, scores: Tensor) -> Tensor | None:
        return kernels_on(scores.device).best(scores, self.budget)
