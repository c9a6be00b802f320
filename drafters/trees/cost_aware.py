"""tree=cost_aware: the tree with the most expected tokens per second."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from specdec.costs import CALIBRATE, CostTable
from specdec.drafters.trees.fixed import FixedShape, measured_rates
from specdec.drafters.trees.policy import check_positive
from specdec.drafters.trees.shapes import (
    OptimalShapes,
    Shape,
    expected_accepted,
    parents_by_level,
)
from specdec.rates import AcceptanceRates


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

    It is the best of the `predictions`; the hardware-aware tree optimizer of Sequoia (Chen et al.
    2024) chooses size and depth likewise. The draft's part of a table is that of a draft model; a
    drafter that searches a text costs less.

    Args:
        rates: as in `Optimal`.
        costs: file of a `CostTable`, or the name of one in `specdec/data/costs`; auto is h200
            where there is a GPU and cpu elsewhere. They should be of the same models and machine.
        batch: sequences decoded at a time; no more than were measured.
        context: tokens of a sequence before the tree.
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        depth: levels at most.
        temperature, top_p: as in `Optimal`.
        children: how children are chosen.

    Attributes:
        choice: the shape, and what is expected of it.

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
        context: int = 512,
        depth: int = 16,
        temperature: float = 0.0,
        top_p: float | None = None,
        children: str = "top_k",
    ) -> None:
        check_positive(batch=batch, context=context)
        found = measured_rates(
            rates,
            budget=budget,
            depth=depth,
            children=children,
            temperature=temperature,
            top_p=top_p,
        )
        if costs == "auto":
            costs = "h200" if torch.cuda.is_available() else "cpu"
        table = CostTable.load(costs, setting="tree.costs")
        if batch > max(table.verify_batches):
            raise ValueError(
                f"tree.batch={batch}: tree.costs={costs} was measured up to a batch of "
                f"{max(table.verify_batches)}; lower batch_size or measure more with "
                f"{CALIBRATE}"
            )
        self.choice = choose(
            found, table, batch=batch, context=context, budget=budget, depth=depth
        )
        super().__init__(shape=self.choice.shape, children=children)


def choose(
    rates: AcceptanceRates, costs: CostTable, *, batch: int, context: int, budget: int, depth: int
) -> Choice:
    """The one of the `predictions` with the most tokens per second; of equals the first."""
    every = predictions(rates, costs, batch=batch, context=context, budget=budget, depth=depth)
    return max(every, key=lambda choice: choice.tokens_per_second)


def predictions(
    rates: AcceptanceRates, costs: CostTable, *, batch: int, context: int, budget: int, depth: int
) -> Iterator[Choice]:
    """No drafting, and for each number of levels up to `depth` and of nodes up to `budget` the
    shape with the most expected accepted nodes. A step takes a pass of the target over the tree
    and one of the draft over the nodes of each level that have children.

    Each shape is listed once. Left out is what exceeds the trees and levels that were measured,
    because `costs` would have it cost no more than those.

    Args:
        batch: sequences of the batch.
        context: tokens of each before its tree.
        budget: nodes of a tree at most, the root not counted.
        depth: levels at most.
    """
    step = costs.step(batch)
    yield Choice(shape=frozenset(), tokens=1.0, seconds=costs.verify(batch, 1, context) + step)
    budget = min(budget, costs.most_nodes - 1)
    verify = [costs.verify(batch, nodes + 1, context) + step for nodes in range(budget + 1)]
    level = costs.level(batch)
    draft = [costs.draft(batch, width) + level for width in range(costs.most_width + 1)]
    listed: set[Shape] = {frozenset()}
    for levels in range(1, min(depth, budget) + 1):
        shapes = OptimalShapes(rates, budget, levels)
        for nodes in range(1, budget + 1):
            shape = shapes.of(nodes)
            if shape in listed:
                continue
            listed.add(shape)
            widths = [len(parents) for parents in parents_by_level(shape)]
            if max(widths) <= costs.most_width:
                yield Choice(
                    shape=shape,
                    tokens=1.0 + expected_accepted(shape, rates),
                    seconds=verify[len(shape)] + sum(draft[width] for width in widths),
                )
