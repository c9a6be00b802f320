"""Intervals of ratios, against cases whose law is known."""

import numpy as np
import pytest

from specdec.lab.statistics import product, ratio


def test_prompts_that_agree_leave_no_doubt() -> None:
    assert ratio([2, 4, 8], [1, 2, 4]) == (2.0, 2.0, 2.0)


def test_two_prompts_are_drawn_twice_each_once_in_four() -> None:
    # (3, 1), (1, 1): sums over sums are 3, 2 and 1 with chances 1/4, 1/2 and 1/4.
    assert ratio([3, 1], [1, 1]) == (2.0, 1.0, 3.0)
    assert ratio([3, 1], [1, 1], level=0.4) == (2.0, 2.0, 2.0)


def test_many_prompts_give_the_interval_of_a_mean() -> None:
    drawn = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = ratio(drawn.tolist(), [1.0] * 400)
    half = 1.96 * drawn.std() / 20
    assert found.value == pytest.approx(drawn.mean())
    assert found.low == pytest.approx(drawn.mean() - half, abs=0.02)
    assert found.high == pytest.approx(drawn.mean() + half, abs=0.02)


def test_it_is_paired_and_seeded() -> None:
    generator = np.random.default_rng(2)
    below = generator.uniform(1, 100, size=30)
    above = 2.0 * below + generator.normal(size=30)  # prompts differ, their ratios hardly do
    found = ratio(above.tolist(), below.tolist())
    assert found.high - found.low < 0.05
    assert found == ratio(above.tolist(), below.tolist())
    assert found != ratio(above.tolist(), below.tolist(), seed=1)


def test_rates_of_unequal_texts_are_compared() -> None:
    # Tokens 3 and 1 in a second each, of another 1 and 1: as the ratio of the tokens.
    assert product([[3, 1], [1, 1]], [[1, 1], [1, 1]]) == ratio([3, 1], [1, 1])
    # Twice as many tokens in the same time, whatever is drawn.
    assert product([[2, 8], [1, 5]], [[1, 5], [1, 4]]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_prompts_must_be_paired(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="must be equally many, and some"):
        ratio(above, below)
