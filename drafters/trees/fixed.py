"""What policies share whose trees have the same shape at every step, whatever it is."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specdec.drafters.trees.shapes import (
    Node,
    describe,
    parents_by_level,
    shape_of,
    skipping,
)
from specdec.protocols import Growth, TreePolicy, check_basics, check_depth
from specdec.rates import AcceptanceRates
from specdec.tree import MOST_LEVELS, MOST_NODES


class FixedShape(TreePolicy):
    """One shape for all trees: a node of it becomes a node of the tree wherever the draft has that
    many candidates.

    Args:
        shape: its nodes as paths of child ranks, as in `shapes.py`; none of them drafts nothing.
        budget: an upper limit of nodes; None takes what the shape has; 0 turns drafting off.
        children: as in `TreePolicy`. Of sampled children those come first that are drawn first, so
            that the shape may not skip ranks.

    Raises:
        ValueError: no shape, one with more nodes than the budget, or with ranks skipped among
            sampled children.
    """

    one_shape = True

    def __init__(
        self,
        *,
        shape: Iterable[Sequence[int]],
        budget: int | None = None,
        children: str = "top_k",
    ) -> None:
        self.shape = shape_of(shape)
        nodes = len(self.shape)
        if nodes > MOST_NODES:
            raise ValueError(
                f"tree.paths: {nodes} nodes, and a tree has at most {MOST_NODES}; list fewer paths"
            )
        if max(map(len, self.shape), default=0) > MOST_LEVELS:
            raise ValueError(
                f"tree.paths: {max(map(len, self.shape))} levels, and a tree has at most "
                f"{MOST_LEVELS}; list shorter paths"
            )
        super().__init__(budget=nodes if budget is None else budget, children=children)
        if 0 < self.budget < nodes:
            raise ValueError(
                f"tree.budget={budget}: the tree has {describe(self.shape)}; raise the budget or "
                f"list fewer paths"
            )
        lonely = skipping(self.shape)
        if lonely is not None and children != "top_k":
            raise ValueError(
                f"tree.children={children}: the path {list(lonely)} skips a rank, but draws come "
                f"one after the other; add its elder siblings or use tree.children=top_k"
            )
        parents = parents_by_level(self.shape)
        self._expanded = {parent for level in parents for parent in level}
        self._widths = [0] * len(parents)
        for node in self.shape:
            level = len(node) - 1
            self._widths[level] = max(self._widths[level], node[-1] + 1)
        self._known: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor | None]] = {}

    def levels(self, depth: int | None) -> int:
        levels = len(self._widths) if self.budget else 0
        if depth is not None and depth < levels:
            raise ValueError(
                f"drafter.depth={depth}: the tree has {levels} levels "
                f"({describe(self.shape)}); leave drafter.depth=null or make the tree shallower"
            )
        return levels

    def width(self, level: int) -> int:
        return self._widths[level]

    def select(self, at: Growth, scores: Tensor) -> Tensor | None:
        return self._tables(at.offered, scores.device)[0]

    def expand(self, at: Growth, scores: Tensor) -> Tensor | None:
        place = self._tables(at.offered, scores.device)[1]
        return None if place is None else place.expand(len(scores), -1)

    def _tables(
        self, offered: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """For the last of the levels at which so many children were offered: [F, W] bool, which
        slots are nodes, and [F'] int64, which of the F * W slots are to get children, None for
        all.

        They are made once for each device, before anything is captured in a CUDA graph.
        """
        key = device, offered
        if key not in self._known:
            frontier: list[Node] = [()]
            for width in offered:
                slots = [[(*node, rank) for rank in range(width)] for node in frontier]
                flat = [slot for row in slots for slot in row]
                # One at least, for drafters need not know what to do with an empty level.
                places = [i for i, slot in enumerate(flat) if slot in self._expanded] or [0]
                frontier = [flat[place] for place in places]
            mask = torch.tensor([[slot in self.shape for slot in row] for row in slots])
            some = torch.tensor(places) if len(places) < len(flat) else None
            self._known[key] = mask.to(device), None if some is None else some.to(device)
        return self._known[key]


def measured_rates(
    rates: str,
    *,
    budget: int,
    depth: int | None,
    children: str,
    temperature: float,
    top_p: float | None,
) -> AcceptanceRates:
    """What a policy with these settings chooses its shape by.

    Raises:
        ValueError: a setting out of range, or no such rates.
    """
    check_basics(budget, children)
    check_depth(depth, "tree.depth")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"tree.temperature={temperature}: must be 0 or positive")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"tree.top_p={top_p}: must be in (0, 1], or null")
    return AcceptanceRates.load(
        rates, children=children, temperature=temperature, top_p=top_p, setting="tree.rates"
    )
