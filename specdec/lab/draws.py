"""Are tokens draws from the laws they are said to be drawn from? Bets (`bets.py`) find what a rule
does wrong; two statistics stand beside them, whose law is known for any number of tokens, however
peaked: nothing is said to be normal.

A token is looked at in two ways. With the tokens of a vocabulary in the order of their
probability, the mass before a drawn token plus a uniform share of its own is uniform in [0, 1] and
independent of all that came before (Rosenblatt 1952; the share makes up for the jumps of a
discrete law): all of those are tested for uniformity (Kolmogorov and Smirnov). And its surprisal,
-log p, is entropy in the mean: sums of it are compared with the law of such sums, which is that of
independent draws, by its characteristic function, to the last digit that floating point has. A
rule that prefers likely tokens, or a pass that saw something else, moves them.

Sums are taken over all tokens, and over those at each place of their step: 0 is the first token
that a step yields. Whether there is a token at some place depends on those before it alone, so
that it is drawn from the target's law like any other; a fault of the pass over a tree is often
that of a few places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from specdec.lab.bets import Bets

ALARM = 1e-4  # of all statistics together
STEP = 1 / 4  # nats: surprisals are multiples of it, in data and laws alike
LEVELS = 128  # the last one stands for all beyond
GROUPS = {"0": range(1), "1": range(1, 2), "2-3": range(2, 4), "4-7": range(4, 8)}
DEEPER = "8+"
BETS = "bets"  # among the tests

Array = NDArray[np.float64]


@dataclass(slots=True)
class Draws:
    """Tokens and their laws, as far as the statistics need them."""

    shares: list[Array] = field(default_factory=list)  # [n] uniform, if all is well
    levels: list[NDArray[np.int64]] = field(default_factory=list)  # [n] of the surprisal
    laws: list[Array] = field(default_factory=list)  # [n, LEVELS] chances of all levels
    places: list[NDArray[np.int64]] = field(default_factory=list)  # [n] in the step
    bets: Bets = field(default_factory=Bets)

    def add(
        self,
        law: Tensor,
        drawn: Tensor,
        share: Array,
        place: NDArray[np.int64],
        draft: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            law: [n, V] float64.
            drawn: [n] int64, of positive probability.
            share: [n] uniform numbers.
            place: [n] of each token in its step.
            draft: [n, V] float64, what a draft says there; None if it is not known.
        """
        own = law.gather(1, drawn[:, None])
        first = law > own
        first |= (law == own) & (torch.arange(law.shape[1], device=law.device) < drawn[:, None])
        level = (-law.log() / STEP).round().clamp(max=LEVELS - 1).long()  # [n, V]
        chances = law.new_zeros(len(law), LEVELS).scatter_add_(1, level, law)
        before = (law * first).sum(1).cpu().numpy()
        self.shares.append(before + share * own[:, 0].cpu().numpy())
        self.levels.append(level.gather(1, drawn[:, None])[:, 0].cpu().numpy())
        self.laws.append(chances.cpu().numpy())
        self.places.append(place)
        self.bets.add(law, drawn, share, [*map(group_of, place)], draft)

    def __len__(self) -> int:
        return sum(map(len, self.shares))

    def tests(self) -> dict[str, float]:
        """How often the bets would win as much, or a statistic be as far off, by chance, if all is
        well; {} without tokens."""
        if not len(self):
            return {}
        levels, laws = np.concatenate(self.levels), np.concatenate(self.laws)
        places = np.concatenate(self.places)
        groups, period = np.array([group_of(place) for place in places]), period_of(laws)
        sums = {
            name: Sum.of(laws[groups == name], levels[groups == name], period)
            for name in (*GROUPS, DEEPER)
            if (groups == name).any()
        }
        found = {BETS: self.bets.found(ALARM).p_value}
        found["uniform"] = float(stats.kstest(np.concatenate(self.shares), "uniform").pvalue)
        found["surprisal"] = reduce(Sum.with_other, sums.values()).tails()
        if len(sums) > 1:
            found |= {f"surprisal {name}": one.tails() for name, one in sums.items()}
        return found


class Sum(NamedTuple):
    """A sum of independent draws.

    Its law is the product of their characteristic functions, transformed back. That is periodic:
    what lies a period apart is one.

    Attributes:
        total: what they add up to.
        mean: what they would in the mean.
        spectrum: [period / 2 + 1] complex.
    """

    total: int
    mean: float
    spectrum: NDArray[np.complex128]

    @classmethod
    def of(cls, laws: Array, drawn: NDArray[np.int64], period: int) -> "Sum":
        """Of draws [n] and the chances [n, K] that each had of being 0 .. K - 1."""
        spectrum = np.ones(period // 2 + 1, dtype=complex)
        for part in np.array_split(laws, -(-laws.size * period // 2**28)):
            spectrum *= np.fft.rfft(part, period).prod(0)
        mean = float((laws @ np.arange(laws.shape[1])).sum())
        return cls(int(drawn.sum()), mean, spectrum)

    def with_other(self, other: "Sum") -> "Sum":
        return Sum(
            self.total + other.total, self.mean + other.mean, self.spectrum * other.spectrum
        )

    def tails(self) -> float:
        """Twice the chance of this total or of one further out on the same side, 1 at most."""
        period = 2 * (len(self.spectrum) - 1)
        start = int(self.mean) - period // 2
        place = self.total - start
        if not 0 <= place < period:
            return 0.0
        law = np.roll(np.fft.irfft(self.spectrum, period), -start).clip(min=0.0)
        return float(min(1.0, 2.0 * min(law[: place + 1].sum(), law[place:].sum())))


def period_of(laws: Array) -> int:
    """A power of 2 that holds 20 standard deviations of the sum and 4 times the largest draw: a
    sum lies further out less often than floating point can tell."""
    values = np.arange(laws.shape[1])
    variance = (laws @ values**2 - (laws @ values) ** 2).sum()
    return int(2 ** np.ceil(np.log2(20.0 * np.sqrt(max(0.0, variance)) + 4 * laws.shape[1])))


def together(tests: Mapping[str, float]) -> float:
    """One number of several that may depend on each other (Bonferroni): half of it is the bets',
    if there are any, the other half of all other tests together."""
    others = [value for name, value in tests.items() if name != BETS]
    if BETS not in tests:
        return min(1.0, len(others) * min(others))
    return min(1.0, 2.0 * min([tests[BETS], *(len(others) * value for value in others)]))


def group_of(place: int) -> str:
    return next((name for name, places in GROUPS.items() if place in places), DEEPER)


def places_of(accepted_lengths: Sequence[int]) -> list[int]:
    """Of each token its place in its step."""
    return list(chain.from_iterable(map(range, accepted_lengths)))
