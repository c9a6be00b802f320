"""How sure a ratio of sums over conversations is, and which of several differences are real.

The unit is the conversation: all turns and samples of one prompt, which resemble each other, so
that counting them apart would make intervals too narrow. Quantities are ratios of sums: tokens
over steps, tokens over seconds, and ratios of such. Their logarithms are nearly normal where the
ratios are not. Random numbers are not needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

FEWEST = 6  # conversations of an interval
LEVEL = 0.95  # of intervals
MARGIN = 1.02  # ratios that are as good as 1
PACE = 0.03  # by which times may differ of a machine that keeps its pace
ROUNDING = 1e-12  # of a logarithm: conversations that agree, as floats add up


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of sums over conversations.

    Args:
        value: of all of them.
        error: standard error of its logarithm; None of fewer than FEWEST conversations, or if one
            of them has all there is of a sum.
        singles: the ratio of each.
    """

    value: float
    error: float | None
    singles: tuple[float, ...]

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of the 95 % interval by t quantiles; None without an error."""
        if self.error is None:
            return None
        half = self.error * float(stdtrit(self._freedom, (1.0 + LEVEL) / 2.0))
        return self.value * math.exp(-half), self.value * math.exp(half)

    @property
    def around(self) -> tuple[float, float, float]:
        """`value` and `ends`, or without an error the least and the largest of single ones."""
        return self.value, *(self.ends or (min(self.singles), max(self.singles)))

    @property
    def p(self) -> float | None:
        """Two-sided, of the ratio of all conversations that there could be being 1."""
        if self.error is None:
            return None
        if self.error == 0.0:
            return 1.0 if abs(math.log(self.value)) < ROUNDING else 0.0
        return float(2.0 * stdtr(self._freedom, -abs(math.log(self.value)) / self.error))

    @property
    def equivalent(self) -> bool:
        """Whether it is within MARGIN of 1: two one-sided tests at 5 % (Schuirmann 1987)."""
        if self.error is None:
            return False
        reach = abs(math.log(self.value)) + self.error * float(stdtrit(self._freedom, LEVEL))
        return reach < math.log(MARGIN)

    @property
    def _freedom(self) -> int:
        return len(self.singles) - 1


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Sum over sum: with seconds of the same tokens a speedup, with tokens over steps an accepted
    length.

    Args:
        above, below: [conversations], in the same order.

    Raises:
        ValueError: no conversations, or unequally many.
    """
    return product([above], [below])


def product(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Ratio:
    """As `ratio`, of products of sums: tokens and the seconds of another over seconds and the
    tokens of another are a speedup of texts that need not be equally long.

    The error is the jackknife's (Tukey 1958), each conversation left out in turn.
    """
    counts = [len(column) for column in (*above, *below)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"{counts} conversations: must be equally many, and some")
    columns = np.array([*above, *below], dtype=float)  # [columns, conversations]
    signs = np.array([1] * len(above) + [-1] * len(below))
    whole = columns.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        singles = np.prod(columns ** signs[:, None], axis=0)
        value = float(np.prod(whole**signs))
        without = signs @ np.log(whole[:, None] - columns)  # [conversations]
    error = None
    if counts[0] >= FEWEST and value > 0.0 and np.isfinite(without).all():
        spread = np.square(without - without.mean()).sum()
        error = float(np.sqrt(spread * (counts[0] - 1) / counts[0]))
        error = 0.0 if error < ROUNDING else error
    return Ratio(value=value, error=error, singles=tuple(singles.tolist()))


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """P-values so corrected that one of them all is below 5 % by chance in one of twenty tables
    (Holm 1979); None stays so, and counts as no test."""
    order = sorted((p, place) for place, p in enumerate(chances) if p is not None)
    corrected: list[float | None] = [None] * len(chances)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[place] = largest
    return corrected
