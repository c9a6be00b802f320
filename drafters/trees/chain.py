"""tree=chain: one candidate per level."""

from specdec.drafters.trees.policy import BasePolicy


class Chain(BasePolicy):
    """A single path of `budget` nodes, fewer if the drafter's depth is smaller (Leviathan et al.
    2023)."""

    def levels(self, depth: int | None) -> int:
        return self.budget if depth is None else min(depth, self.budget)

    def width(self, level: int) -> int:
        return 1
