"""tree=dynamic: the budget goes where the draft is confident."""

from types import ModuleType

from torch import Tensor

from specdec.protocols import Growth, TreePolicy, check_depth, check_positive


class Dynamic(TreePolicy):
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
        check_positive(width=width)
        check_depth(depth, "tree.depth")
        self.candidates = width
        self.depth = depth
        self.expanded = width  # nodes of a level that may have children

    def levels(self, depth: int | None) -> int:
        return min(self.depth if depth is None else depth, self.budget)

    def width(self, level: int) -> int:
        return min(self.candidates, self.budget)

    def select(self, at: Growth, scores: Tensor) -> Tensor | None:
        if not at.sampled:
            return None
        share = self.budget // at.levels + (at.level < self.budget % at.levels)
        best: Tensor = at.kernels.best(scores.flatten(1), share)
        return best.view_as(scores)

    def expand(self, at: Growth, scores: Tensor) -> Tensor | None:
        if scores.shape[1] <= self.expanded:
            return None
        best = at.kernels.best(scores, self.expanded)
        places: Tensor = at.kernels.places(best, self.expanded)
        return places

    def keep(self, scores: Tensor, kernels: ModuleType) -> Tensor | None:
        best: Tensor = kernels.best(scores, self.budget)
        return best
