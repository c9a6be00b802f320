"""How sure a ratio over prompts is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Ratio(NamedTuple):
    """A ratio of sums and the ends of its interval."""

    value: float
    low: float
    high: float


def ratio(
    above: Sequence[float], below: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> Ratio:
    """Sum over sum, with a paired percentile bootstrap interval (Efron 1979).

    Prompts are drawn again with replacement, RESAMPLES times, and each is drawn with both of its
    numbers. With seconds it is a speedup, with tokens over steps an accepted length.

    Args:
        above, below: [prompts], in the same order.
        level: chance that the interval is to hold the ratio of all prompts there could be.

    Raises:
        ValueError: no prompts, or unequally many.
    """
    if not 0 < len(above) == len(below):
        raise ValueError(f"{len(above)} and {len(below)} prompts: must be equally many, and some")
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    picks = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    low, high = np.quantile(a[picks].sum(1) / b[picks].sum(1), tails)
    return Ratio(float(a.sum() / b.sum()), float(low), float(high))
