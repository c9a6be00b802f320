"""tree=chain: one candidate per level."""

from specdec.protocols import TreePolicy


class Chain(TreePolicy):
    """A single path of `budget` nodes, fewer if the drafter's depth is smaller (Leviathan et al.
    2023)."""

    takes_all = True

    def levels(self, depth: int | None) -> int:
        return self.budget if depth is None else min(depth, self.budget)

    def width(self, level: int) -> int:
        return 1
