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
    return product([above], [below], level=level, seed=seed)


def product(
    above: Sequence[Sequence[float]],
    below: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Ratio:
    """As `ratio`, of products of sums: tokens and the seconds of another over seconds and the
    tokens of another are a speedup of texts that need not be equally long."""
    counts = [len(column) for column in (*above, *below)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"{counts} prompts: must be equally many, and some")
    columns = [np.asarray(column, dtype=float) for column in (*above, *below)]
    signs = [1] * len(above) + [-1] * len(below)
    picks = np.random.default_rng(seed).integers(counts[0], size=(RESAMPLES, counts[0]))

    def value(sums: list[np.ndarray]) -> np.ndarray:
        return np.prod([s**sign for s, sign in zip(sums, signs, strict=True)], axis=0)

    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    low, high = np.quantile(value([column[picks].sum(1) for column in columns]), tails)
    return Ratio(float(value([column.sum() for column in columns])), float(low), float(high))
