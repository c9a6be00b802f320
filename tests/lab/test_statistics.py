"""Intervals of ratios, against laws that are known and the jackknife as its book has it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from specdec.lab.statistics import FEWEST, Ratio, holm, product, ratio

Draw = Callable[[], Ratio]


def test_conversations_that_agree_leave_no_doubt() -> None:
    found = ratio([2, 4, 8, 2, 4, 6], [1, 2, 4, 1, 2, 3])
    assert (found.value, found.ends, found.p) == (2.0, (2.0, 2.0), 0.0)
    alike = ratio([3, 1, 2, 5, 3, 7], [3, 1, 2, 5, 3, 7])
    assert alike.p == 1.0
    assert alike.equivalent


def test_few_conversations_have_a_range_alone() -> None:
    found = ratio([2, 9, 4, 4, 5], [1, 3, 4, 2, 2])
    assert found.ends is None
    assert found.p is None
    assert not found.equivalent
    assert found.around == (24 / 12, 1.0, 3.0)
    assert ratio([2, 9, 4, 4, 5, 1], [1, 3, 4, 2, 2, 1]).ends is not None


def test_it_is_the_jackknife_of_the_log_with_t_quantiles() -> None:
    """Written out with each conversation deleted in turn, as it is defined."""
    generator = np.random.default_rng(3)
    mine, theirs = generator.lognormal(3, 0.4, (2, 9, 2))  # tokens and seconds

    def log_ratio(keep: list[int]) -> float:
        one, other = mine[keep].sum(0), theirs[keep].sum(0)
        return math.log(one[0] / one[1]) - math.log(other[0] / other[1])

    every = list(range(9))
    without = np.array([log_ratio([j for j in every if j != i]) for i in every])
    error = math.sqrt(8 / 9 * np.square(without - without.mean()).sum())
    half, middle = stats.t.ppf(0.975, 8) * error, log_ratio(every)
    found = product([mine[:, 0], theirs[:, 1]], [mine[:, 1], theirs[:, 0]])
    assert found.value == pytest.approx(math.exp(middle))
    assert found.ends == pytest.approx((math.exp(middle - half), math.exp(middle + half)))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(middle) / error, 8))
    assert found.singles[4] == pytest.approx(math.exp(log_ratio([4])))


def test_many_conversations_give_the_interval_of_a_mean() -> None:
    drawn = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = ratio(drawn.tolist(), [1.0] * 400)
    half = 1.96 * drawn.std() / 20
    assert found.around == pytest.approx(
        (drawn.mean(), drawn.mean() - half, drawn.mean() + half), abs=0.02
    )


def test_it_is_paired() -> None:
    generator = np.random.default_rng(2)
    below = generator.uniform(1, 100, size=30)
    above = 2.0 * below + generator.normal(size=30)  # prompts differ, their ratios hardly do
    _, low, high = ratio(above.tolist(), below.tolist()).around
    assert high - low < 0.05


@pytest.mark.parametrize(("spread", "same"), [(0.001, True), (0.05, False)])
def test_being_equal_is_a_claim_of_its_own(spread: float, same: bool) -> None:
    below = np.exp(np.random.default_rng(5).normal(0.0, spread, size=20))
    found = ratio([1.0] * 20, below.tolist())
    assert found.p is not None
    assert found.p > 0.05  # nothing is seen in either
    assert found.equivalent is same
    ends = stats.t.interval(0.90, 19, loc=math.log(found.value), scale=found.error)
    assert same == (max(map(abs, ends)) < math.log(1.02))


@pytest.mark.parametrize("above", [[0.0] * 7, [1.0] + [0.0] * 6])
def test_sums_that_can_vanish_have_no_interval(above: list[float]) -> None:
    assert ratio(above, [1.0] * 7).ends is None


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_conversations_must_be_paired(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="must be equally many, and some"):
        ratio(above, below)


def test_corrected_chances_are_those_of_the_book() -> None:
    # Holm 1979: the smallest times their number, the next times one fewer, never falling.
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def worth(generator: np.random.Generator, conversations: int, turns: int) -> Ratio:
    """The measured speedup, 2.0 in truth, of a method whose acceptance varies log-normally between
    conversations and between their turns; texts are of unequal length."""
    tokens = generator.integers(40, 129, size=(conversations, turns))
    between = generator.normal(0.0, 0.35, size=(conversations, 1))
    length = 2.0 * np.exp(between + generator.normal(0.0, 0.25, size=(conversations, turns)))
    seconds = tokens / length * math.exp(-(0.35**2 + 0.25**2) / 2)  # whose mean is tokens / 2
    return ratio((1.0 * tokens).sum(1).tolist(), seconds.sum(1).tolist())


def coverage(conversations: int, turns: int, repetitions: int) -> float:
    generator = np.random.default_rng(conversations)
    held = 0
    for _ in range(repetitions):
        ends = worth(generator, conversations, turns).ends
        assert ends is not None
        held += ends[0] <= 2.0 <= ends[1]
    return held / repetitions


@pytest.mark.parametrize(
    ("conversations", "repetitions"),
    [(20, 1500)] + [pytest.param(n, 5000, marks=pytest.mark.slow) for n in (10, 20, 40)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    conversations: int, repetitions: int
) -> None:
    assert conversations >= FEWEST
    assert 0.93 <= coverage(conversations, 2, repetitions) <= 0.97
