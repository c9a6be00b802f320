"""Replaying: what a record says of ways to decode."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.costs import CostTable
from specdec.lab.conversations import prompt_of
from specdec.lab.statistics import Ratio, ratio
from specdec.replay.chain import starts
from specdec.replay.configurations import Configuration
from specdec.replay.record import Record
from specdec.replay.siblings import Along, Array
from specdec.replay.survival import (
    BY_PLACE,
    Shape,
    add_products,
    factors_at,
    nodes_by_level,
    place_factors,
    survival,
    widths_of,
)
from specdec.sampling import SamplingParams

CONTEXTS = 17  # at which costs are looked up; between them they are straight


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is expected of a configuration, given the texts.

    Args:
        steps, nodes: [P], of each text.
        seconds: [P]; None without costs.
        kept: [P, D + 1], how many steps yield more than d tokens, so that they add up to all.
        survivals: [P, n, D + 1], if they are wanted, and `costs` [P, n] of a step.
    """

    configuration: Configuration
    steps: Array
    nodes: Array
    seconds: Array | None
    kept: Array
    survivals: Array | None = None
    costs: Array | None = None


@dataclass(kw_only=True)
class Replayer:
    """Replays configurations of one record.

    Args:
        candidates: children are drawn from so many.
        table: costs; None for none.
        batch: sequences at a time that costs are looked up for.
        histories: as in `survival`.
        most: children of a node, of all configurations.
        keep: whether outcomes have survivals.
    """

    record: Record
    sampling: SamplingParams
    candidates: int
    table: CostTable | None = None
    batch: int = 1
    histories: int = 8
    most: int = 8
    keep: bool = False
    _along: dict[str, Along] = field(default_factory=dict, init=False)
    _known: dict[tuple[str, str, Shape], Outcome] = field(default_factory=dict, init=False)
    _factors: dict[tuple[str, str, int, int], Array] = field(default_factory=dict, init=False)

    @property
    def count(self) -> NDArray[np.int64]:
        return np.diff(self.record.offsets)

    @cached_property
    def conversations(self) -> NDArray[np.int64]:
        """[P], of each text the place of its conversation."""
        asked = [prompt_of(int(one))[0] for one in self.record.read("request")]
        return np.unique(asked, return_inverse=True)[1].reshape(-1)

    def along(self, children: str) -> Along:
        if children not in self._along:
            self._along[children] = self.record.along(
                self.sampling, candidates=self.candidates, children=children
            )
        return self._along[children]

    def replay(self, configuration: Configuration) -> Outcome:
        """Of a configuration whose trees have one shape."""
        shape = configuration.shape
        assert shape is not None
        # On a chain recursive rejection has another name, and policies may agree on a shape.
        rule = configuration.rule if configuration.rule != "tokenwise" else "recursive_rejection"
        key = rule, configuration.children, shape
        if key not in self._known:
            self._known[key] = self._replayed(configuration, rule, shape)
        return replace(self._known[key], configuration=configuration)

    def _replayed(self, configuration: Configuration, rule: str, shape: Shape) -> Outcome:
        along = self.along(configuration.children)
        return self.outcome(
            configuration,
            self._survival(rule, shape, along, configuration.children),
            nodes=np.full(along.text.shape, len(shape)),
            widths=widths_by_level(shape),
        )

    def outcome(
        self,
        configuration: Configuration,
        survivals: Array,
        *,
        nodes: NDArray[np.int64],
        widths: Sequence[int],
    ) -> Outcome:
        """What comes of survival functions.

        Args:
            nodes: [P, n], drafted by a step that begins at each place.
            widths: of the passes of the draft.
        """
        begun = starts(survivals, self.count)
        costs = self.step_seconds(nodes, widths)
        return Outcome(
            configuration=configuration,
            steps=begun.sum(1),
            nodes=(begun * nodes).sum(1),
            seconds=None if costs is None else (begun * costs).sum(1),
            kept=yields(begun, survivals, self.count),
            survivals=survivals if self.keep else None,
            costs=costs if self.keep else None,
        )

    def _survival(self, rule: str, shape: Shape, along: Along, children: str) -> Array:
        if rule not in BY_PLACE or children == "top_k" or not shape:
            return survival(rule, shape, along, children=children, histories=self.histories)

        def factor(depth: int, width: int) -> Array:
            key = rule, children, depth, width if rule == "k_seq" else max(self.most, width)
            if key not in self._factors:
                again, random = children != "sample", np.random.default_rng(0)
                self._factors[key] = place_factors(
                    rule,
                    along.shifted(depth),
                    [key[3]],
                    again,
                    histories=self.histories,
                    random=random,
                )[key[3]]
            return self._factors[key][..., :width]

        levels, widths = nodes_by_level(shape), widths_of(shape)
        return add_products(levels, widths, factors_at(factor, along), along)

    def step_seconds(self, nodes: NDArray[np.int64], widths: Sequence[int]) -> Array | None:
        """[P, n] of a step that begins at each place; None without costs. (As `outcome`.)"""
        table, batch = self.table, self.batch
        if table is None:
            return None
        prompts = np.array([len(one) for one in self.record.prompts])
        places = prompts[:, None] + np.arange(nodes.shape[1])
        grid = np.linspace(places.min(), places.max(), CONTEXTS)
        found: Array = np.zeros(nodes.shape)
        for count in np.unique(nodes):
            verify = [table.verify(batch, int(count) + 1, float(context)) for context in grid]
            here = nodes == count
            found[here] = np.interp(places[here], grid, verify)
        found += table.step(batch, len(widths)) + (table.start(batch) if widths else 0.0)
        for width in widths:
            draft = [table.draft(batch, width, float(context)) for context in grid]
            found += np.interp(places, grid, draft) + table.level(batch)
        return found

    def by_conversation(self, values: Array) -> list[float]:
        """[conversations], summed over texts."""
        found: list[float] = np.bincount(self.conversations, values).tolist()
        return found

    def over(self, above: Array, below: Array) -> Ratio:
        return ratio(self.by_conversation(above), self.by_conversation(below))

    def figures(self, outcome: Outcome) -> dict[str, Any]:
        """A row of the table."""
        tokens = self.count.astype(float)
        length = self.over(tokens, outcome.steps)
        low, high = length.ends or (None, None)
        found: dict[str, Any] = {
            **outcome.configuration.labels,
            "tokens_per_step": length.value,
            "low": low,
            "high": high,
            "nodes_per_step": float(outcome.nodes.sum() / outcome.steps.sum()),
        }
        if outcome.seconds is not None:
            found["tokens_per_second"] = float(tokens.sum() / outcome.seconds.sum()) * self.batch
        return found

    def oracle(self, outcomes: Sequence[Outcome]) -> float:
        """Tokens per second of the policy that takes at each place the configuration of the least
        expected time for the rest of the text: a bound of any that chooses among these."""
        count = self.count
        longest = int(count.max())
        least = np.zeros((len(count), longest + 1))
        for place in reversed(range(longest)):
            best = np.full(len(count), np.inf)
            for outcome in outcomes:
                assert outcome.survivals is not None
                assert outcome.costs is not None
                here = outcome.survivals[:, place]
                stops = here - np.pad(here[:, 1:], ((0, 0), (0, 1)))
                later = least[:, place + 1 : place + 1 + here.shape[1]]
                rest = (stops[:, : later.shape[1]] * later).sum(1)
                best = np.minimum(best, outcome.costs[:, place] + rest)
            least[:, place] = np.where(place < count, best, 0.0)
        return float(count.sum() / least[:, 0].sum()) * self.batch


def yields(begun: Array, survivals: Array, count: NDArray[np.int64]) -> Array:
    """[P, D + 1], how many steps yield more than d tokens: those that keep d drafted ones, and
    have another that follows in the text."""
    places = np.arange(begun.shape[1])[:, None] + np.arange(survivals.shape[2])
    inside = places < count[:, None, None]
    found: Array = (begun[..., None] * survivals * inside).sum(1)
    return found


def widths_by_level(shape: Shape) -> list[int]:
    """The nodes with children of each level, which a pass of the draft is for."""
    parents = [len(node) for node in {node[:-1] for node in shape}]
    return np.bincount(parents).tolist() if parents else []
