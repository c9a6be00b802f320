"""Which parts of a composition draft for a sequence, and how much each counts."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

from specdec.drafters.bandit import Bandit
from specdec.drafters.state import Memory, Reset
from specdec.request import Decoding

LENGTHS = (1, 2, 4, 8, 16)  # where classes of match lengths begin that a bandit tells apart
TRUSTED_HALF = 8  # a match of so many tokens counts half of its weight in a union

Match = Callable[[int], float]
"""Let a part search, by its number: how long its match is; infinite for a model, which needs
none."""


class Chooser:
    """Chooses before each step, on the host.

    Attributes:
        mixes: whether several parts may draft for one sequence.
        reset: as of a `Drafter`, for what it learns.
    """

    mixes = False
    reset: Reset | None = None

    def choose(self, sequence: Decoding, match: Match) -> dict[int, float]:
        """The parts that draft, by number, and their weights. Only those that `match` was asked
        about have found anything."""
        raise NotImplementedError

    def begin(self, sequences: Sequence[Decoding]) -> None:
        """A step for these sequences comes next; the tokens of the last one have arrived."""

    def chosen(self, alone: bool) -> None:
        """All have been asked about; `alone` if one part drafts for all of them."""

    def finish(self, sequence: Decoding) -> None:
        """As of a `Drafter`."""

    def forget(self) -> None:
        """As of a `Drafter`."""


class Union(Chooser):
    """Every part, with its weight; the shorter its match, the less it counts."""

    mixes = True

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights

    def choose(self, sequence: Decoding, match: Match) -> dict[int, float]:
        found = {number: match(number) for number in range(len(self.weights))}
        return {
            number: self.weights[number] * (m / (m + TRUSTED_HALF) if m < math.inf else 1.0)
            for number, m in found.items()
        }


class Cascade(Chooser):
    """The first part whose match has `min_match` tokens, else the last one."""

    def __init__(self, parts: int, min_match: int) -> None:
        self.parts, self.min_match = parts, min_match

    def choose(self, sequence: Decoding, match: Match) -> dict[int, float]:
        sure = (n for n in range(self.parts) if match(n) >= self.min_match)
        return {next(sure, self.parts - 1): 1.0}


class Pulls(Chooser):
    """The part that pays best, in tokens for the time of its steps, given how long the match is;
    learnt from steps in which one part drafted for all sequences.

    Args:
        costs: time of a step with each part alone; None measures it.
        reset: after what all of it is forgotten.
    """

    def __init__(self, parts: int, costs: Sequence[float] | None, reset: Reset) -> None:
        self.parts, self.costs, self.reset = parts, costs, reset
        self._bandits = Memory(reset, Bandit)
        self._pulled: list[tuple[Decoding, int, tuple[int, int]]] = []  # of the last step
        self._alone = False
        self._since = 0.0

    def choose(self, sequence: Decoding, match: Match) -> dict[int, float]:
        found = {number: match(number) for number in range(self.parts)}
        longest = max((m for m in found.values() if m < math.inf), default=0)
        kind = bisect_right(LENGTHS, longest)
        arms = [(number, kind) for number, m in found.items() if m]
        if not arms:
            return {self.parts - 1: 1.0}
        arm = arms[self._bandits.of(sequence).choose(arms)]
        self._pulled.append((sequence, sequence.steps, arm))
        return {arm[0]: 1.0}

    def begin(self, sequences: Sequence[Decoding]) -> None:
        passed = time.perf_counter() - self._since
        # The time is that of one part alone, and no prompt was taken in meanwhile.
        alone = [pulled[0] for pulled in self._pulled] == list(sequences) and self._alone
        for sequence, steps, arm in self._pulled:
            stepped = sequence.steps == steps + 1 and not sequence.finish_reason
            if stepped and (alone or self.costs):
                cost = self.costs[arm[0]] if self.costs else passed
                self._bandits.of(sequence).learn(arm, sequence.accepted_lengths[-1], cost)
        self._pulled = []

    def chosen(self, alone: bool) -> None:
        self._alone, self._since = alone, time.perf_counter()

    def finish(self, sequence: Decoding) -> None:
        self._bandits.finish(sequence)

    def forget(self) -> None:
        self._bandits.clear()
        self._pulled = []
