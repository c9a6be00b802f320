"""tree=chain: one candidate per level."""

from specdec.protocols import TreePolicy
from specdec.tree import MOST_LEVELS


class Chain(TreePolicy):
    """A single path of `budget` nodes, fewer if the drafter's depth is smaller (Leviathan et al.
    2023).

    Args:
        budget: as in `TreePolicy`, at most as many as a tree may have levels.

    Raises:
        ValueError: a setting out of range.
    """

    takes_all = True

    def __init__(self, *, budget: int, children: str = "top_k") -> None:
        super().__init__(budget=budget, children=children)
        if budget > MOST_LEVELS:
            raise ValueError(
                f"tree.budget={budget}: must be at most {MOST_LEVELS}, for a chain has a level "
                f"for each node"
            )

    def levels(self, depth: int | None) -> int:
        return self.budget if depth is None else min(depth, self.budget)

    def width(self, level: int) -> int:
        return 1
