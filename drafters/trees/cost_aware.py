"""tree=cost_aware: the tree with the most expected tokens per second."""

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
from torch import Tensor

from specdec.calibration import costs_of, unlike
from specdec.costs import CALIBRATE, CostTable
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.fixed import FixedShape, measured_rates
from specdec.drafters.trees.shapes import (
    OptimalShapes,
    Shape,
    describe,
    expected_accepted,
    optimal,
    parents_by_level,
)
from specdec.protocols import Growth, Loaded, check_positive
from specdec.rates import AcceptanceRates

MEASURED = ("auto", "measure")
CONTEXT = 512  # tokens before a tree, where nothing else is known
MARGIN = 1.05  # what a tree must promise over plain decoding if its costs were measured in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A shape and what is expected of it.

    Args:
        shape: empty for no drafting.
        tokens: of a sequence in a step, that of the target's own included.
        seconds: of a step of the batch.
    """

    shape: Shape
    tokens: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of each sequence of the batch."""
        return self.tokens / self.seconds


class CostAware(FixedShape):
    """The tree with the most expected tokens per second, or none where drafting does not pay,
    given how often children are accepted and what passes of the target and the draft cost.

    It is what `choose` finds; the hardware-aware tree optimizer of Sequoia (Chen et al.
    2024) chooses size and depth likewise. The draft's part of a table is that of a draft model; a
    drafter that searches a text costs less.

    Args:
        rates: as in `Optimal`.
        costs: auto, which takes a table of the models and the machine of the run, or measures one;
            measure; a file of a `CostTable`, or the name of one in `specdec/data/costs`.
        batch: sequences decoded at a time; no more than were measured.
        context: tokens of a sequence before the tree; None for half of what the run has room for,
            and 512 with a table that is named.
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        depth: levels at most.
        temperature, top_p: as in `Optimal`.
        children: how children are chosen.
        adapts: the best shape gives nodes, levels and width alone; which nodes they are follows
            from the draft at every step, as in `Dynamic`, so that a drafter that knows how sure it
            is can say where they belong. What the shape promises is the least to expect then.

    Attributes:
        choice: the shape, and what is expected of it. Where costs are measured it is known after
            `fit`; until then the shape is the one that would be best if drafting cost nothing.

    Raises:
        ValueError: a setting out of range, or no such rates or costs.
    """

    def __init__(
        self,
        *,
        rates: str,
        budget: int,
        costs: str = "auto",
        batch: int = 1,
        context: int | None = None,
        depth: int = 16,
        temperature: float = 0.0,
        top_p: float | None = None,
        children: str = "top_k",
        adapts: bool = False,
    ) -> None:
        self.adapts, self.one_shape = adapts, not adapts
        check_positive(batch=batch, context=context)
        found = measured_rates(
            rates,
            budget=budget,
            depth=depth,
            children=children,
            temperature=temperature,
            top_p=top_p,
        )
        self.rates, self.costs, self.most, self.depth = found, costs, budget, depth
        self.batch, self.context = batch, context
        self.choice: Choice
        self.table: CostTable | None = None
        if costs in MEASURED:
            super().__init__(shape=optimal(found, budget, depth), children=children)
            return
        self.table = CostTable.load(costs, setting="tree.costs")
        if batch > max(self.table.verify_batches):
            raise ValueError(
                f"tree.batch={batch}: tree.costs={costs} was measured up to a batch of "
                f"{max(self.table.verify_batches)}; lower batch_size or measure more with "
                f"{CALIBRATE}"
            )
        self.children = children  # type: ignore[assignment]  # checked with the rates
        self._choose(self.table, depth)

    def _choose(self, table: CostTable, depth: int, margin: float = 1.0) -> float:
        """Take the best shape, or none if it is not `margin` times as fast as plain decoding;
        returns how many times it is expected to be."""
        context = self.context or CONTEXT
        given = {"batch": self.batch, "context": context, "depth": depth}
        best = choose(self.rates, table, budget=self.most, **given)
        plain = choose(self.rates, table, budget=0, **given)
        gain = best.tokens_per_second / plain.tokens_per_second
        self.choice = best if gain >= margin else plain
        super().__init__(shape=self.choice.shape, children=self.children)
        return gain if self.choice is best else 1.0

    def levels(self, depth: int | None) -> int:
        if self.table is None and depth is not None:  # `fit` will respect it
            return min(depth, super().levels(None))
        return super().levels(depth)

    @property
    def _followed(self) -> Dynamic:
        """The policy that grows trees of the shape's size after the draft."""
        widths = [self.width(level) for level in range(super().levels(None))]
        nodes = [len(parents) for parents in parents_by_level(self.shape)]
        return Dynamic(
            budget=self.budget,
            width=max(*widths, *nodes, 1),
            depth=max(1, len(widths)),
            children=self.children,
        )

    def select(self, at: Growth, scores: Tensor) -> Tensor | None:
        return self._followed.select(at, scores) if self.adapts else super().select(at, scores)

    def expand(self, at: Growth, scores: Tensor) -> Tensor | None:
        return self._followed.expand(at, scores) if self.adapts else super().expand(at, scores)

    def keep(self, scores: Tensor, kernels: ModuleType) -> Tensor | None:
        return self._followed.keep(scores, kernels) if self.adapts else None

    def fit(self, run: Loaded) -> None:
        if self.notes:
            return
        notes = {"rates": self.rates.origin(run)}
        if self.table is not None:
            other = unlike(self.table, run)
            notes["costs"] = f"{self.costs}, {other or 'of this machine and these models'}"
            if (known := self.table.most_nodes - 1) < self.most:
                notes["costs"] += f"; tree.budget={self.most} is {known}, the most it knows"
        elif self.most:
            self.table, notes["costs"] = costs_of(
                run,
                self.costs,
                batch=self.batch,
                context=self.context,
                budget=self.most,
                chain=partial(_chain, self.children),
            )
            depth = min(self.depth, run.drafter.depth or self.depth)
            gain = self._choose(self.table, depth, MARGIN)
            notes["shape"] = f"{describe(self.shape)}; {gain:.2f} times plain decoding expected"
        self.notes = notes


def _chain(children: str, levels: int) -> FixedShape:
    """A chain that is grown as the shapes are that can be chosen."""
    return FixedShape(shape=[(0,) * level for level in range(1, levels + 1)], children=children)


def choose(
    rates: AcceptanceRates, costs: CostTable, *, batch: int, context: int, budget: int, depth: int
) -> Choice:
    """The choice of the most tokens per second: no drafting, or for a number of levels up to
    `depth` and of nodes up to `budget` the shape of the most expected accepted nodes; of equals
    the one of the fewest levels, then nodes. A step takes a pass of the target over the tree and
    one of the draft over the nodes of each level that have children.

    Left out is what exceeds the trees and levels that were measured, because `costs` would have it
    cost no more than those.

    Args:
        batch: sequences of the batch.
        context: tokens of each before its tree.
        budget: nodes of a tree at most, the root not counted.
        depth: levels at most.
    """
    plain = costs.verify(batch, 1, context) + costs.step(batch)
    best = Choice(shape=frozenset(), tokens=1.0, seconds=plain)
    budget = min(budget, costs.most_nodes - 1)
    most = min(depth, budget)
    verify = np.array([costs.verify(batch, nodes + 1, context) for nodes in range(budget + 1)])
    loop = np.array([costs.start(batch) + costs.step(batch, level) for level in range(most + 1)])
    drafts = [costs.draft(batch, width, context) for width in range(1, costs.most_width + 1)]
    draft = np.array([0.0, *(seconds + costs.level(batch) for seconds in drafts)])
    for levels in range(1, most + 1):
        shapes = OptimalShapes(rates, budget, levels)
        widths = shapes.widths
        known = (shapes.nodes > 0) & (widths.max(axis=1) <= costs.most_width)
        if not known.any():
            continue
        passes = draft[np.minimum(widths, costs.most_width)].sum(axis=1)
        seconds = verify[shapes.nodes] + loop[(widths > 0).sum(axis=1)] + passes
        speeds = np.where(known, (1.0 + shapes.accepted) / seconds, 0.0)
        place = int(speeds.argmax())
        if speeds[place] > best.tokens_per_second:
            shape = shapes.of(place)
            tokens = 1.0 + expected_accepted(shape, rates)
            best = Choice(shape=shape, tokens=tokens, seconds=float(seconds[place]))
    return best
