"""tree=static: the same shape at every step."""

from collections.abc import Sequence

from specdec.protocols import TreePolicy
from specdec.tree import MOST_LEVELS, MOST_NODES


class Static(TreePolicy):
    """Every node of level i has widths[i] children (the expansion configuration of SpecInfer, Miao
    et al. 2024).

    Args:
        widths: children per node, level by level; [4, 2, 2, 1] drafts 4 + 8 + 16 + 16 = 44 nodes.
        budget: an upper limit of nodes; None takes what the widths need; 0 turns drafting off.

    Raises:
        ValueError: a width below 1, or more nodes than the budget.
    """

    takes_all = True

    def __init__(
        self, *, widths: Sequence[int], budget: int | None = None, children: str = "top_k"
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(
                f"tree.widths={list(widths)}: must be a list of numbers, each at least 1"
            )
        nodes = level = 1
        for width in widths:
            level *= width
            nodes += level
        nodes -= 1
        if len(widths) > MOST_LEVELS:
            raise ValueError(
                f"tree.widths={list(widths)}: {len(widths)} levels, and a tree has at most "
                f"{MOST_LEVELS}; shorten the widths"
            )
        if nodes > MOST_NODES:
            raise ValueError(
                f"tree.widths={list(widths)}: {nodes} nodes, and a tree has at most {MOST_NODES}; "
                f"lower the widths"
            )
        if budget and nodes > budget:
            raise ValueError(
                f"tree.widths={list(widths)}: {nodes} nodes exceed tree.budget={budget}; "
                f"lower the widths or raise the budget"
            )
        super().__init__(budget=nodes if budget is None else budget, children=children)
        self.widths = list(widths)

    def levels(self, depth: int | None) -> int:
        if depth is not None and depth < len(self.widths):
            raise ValueError(
                f"drafter.depth={depth}: tree.widths={self.widths} has {len(self.widths)} levels; "
                f"shorten the widths or leave drafter.depth=null"
            )
        return len(self.widths)

    def width(self, level: int) -> int:
        return self.widths[level]
