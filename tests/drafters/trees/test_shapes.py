"""Shapes against exhaustive search, brute-force definitions and closed forms; they are written as
sets of paths of child ranks, as in `drafters/trees/shapes.py`."""

from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.trees.shapes import (
    OptimalShapes,
    Shape,
    describe,
    expected_accepted,
    greedy,
    optimal,
    ordered,
    parents_by_level,
    shape_of,
    skipping,
)
from specdec.rates import AcceptanceRates
from tests.drafters.trees.measured import random_rates, rates_of


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("nodes", [1, 5, 20])
def test_a_chain_accepts_the_sum_of_the_powers_of_its_rate(rate: float, nodes: int) -> None:
    rates = rates_of([rate])
    chain = shape_of([(0,) * length for length in range(1, nodes + 1)])
    closed = nodes if rate == 1.0 else rate * (1.0 - rate**nodes) / (1.0 - rate)
    assert expected_accepted(chain, rates) == pytest.approx(closed, rel=1e-12)
    assert optimal(rates, nodes) == greedy(rates, nodes) == (chain if rate else frozenset())


def test_an_endless_chain_is_approached() -> None:
    found = [expected_accepted(optimal(rates_of([0.8]), n), rates_of([0.8])) for n in (5, 20, 80)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.8 / 0.2, rel=1e-6)


def test_a_star_accepts_the_sum_of_its_rates() -> None:
    rates = rates_of([0.4, 0.3, 0.2])
    star = shape_of([(0,), (1,), (2,)])
    assert expected_accepted(star, rates) == pytest.approx(0.9)
    assert optimal(rates, 9, depth=1) == star  # other ranks were never accepted
    assert optimal(rates, 2, depth=1) == star - {(2,)}


@pytest.mark.parametrize("arity", [1, 2, 3])
def test_a_full_tree_accepts_the_products_of_what_its_levels_do(arity: int) -> None:
    rates = rates_of([0.5, 0.2, 0.1], [0.4, 0.3, 0.3], [0.6, 0.1, 0.0])
    full = shape_of(path for n in range(1, 5) for path in product(range(arity), repeat=n))
    closed = np.cumprod([sum(rates.row(depth)[:arity]) for depth in range(4)]).sum()
    assert expected_accepted(full, rates) == pytest.approx(closed)


def forests(nodes: int) -> Iterator[Shape]:
    """Every shape of so many nodes that skips no rank."""
    if nodes == 0:
        yield frozenset()
        return
    for beneath in range(nodes):
        for inner in forests(beneath):
            eldest = {(0,), *((0, *node) for node in inner)}
            for others in forests(nodes - 1 - beneath):
                yield frozenset(eldest | {(node[0] + 1, *node[1:]) for node in others})


MOST = 8

EVERY = [shape for nodes in range(MOST + 1) for shape in forests(nodes)]


def test_there_are_as_many_ordered_trees_as_catalan_says() -> None:
    counts = [1, 1, 2, 5, 14, 42, 132, 429, 1430]
    assert [sum(len(shape) == n for shape in EVERY) for n in range(MOST + 1)] == counts
    assert len(set(EVERY)) == sum(counts)
    assert not any(skipping(shape) for shape in EVERY)


@pytest.mark.parametrize("seed", range(24))
def test_optimal_is_the_best_of_all_trees(seed: int) -> None:
    rates = random_rates(seed)
    known = [
        (len(shape), max(map(len, shape), default=0), expected_accepted(shape, rates))
        for shape in EVERY
    ]
    for budget, depth in product(range(MOST + 1), (1, 2, 3, None)):
        within = [
            (nodes, value)
            for nodes, levels, value in known
            if nodes <= budget and (depth is None or levels <= depth)
        ]
        best = max(value for _, value in within)
        programme = OptimalShapes(rates, budget, depth)
        shape = programme.of(budget)
        assert expected_accepted(shape, rates) == pytest.approx(best, abs=1e-12)
        assert len(shape) <= budget
        assert programme.accepted[-1] == pytest.approx(best, abs=1e-12)
        assert programme.nodes[-1] == len(shape)
        widths = [len(parents) for parents in parents_by_level(shape)]
        assert [width for width in programme.widths[-1] if width] == widths
        assert depth is None or max(map(len, shape), default=0) <= depth
        assert shape_of(shape) == shape
        assert skipping(shape) is None
        # No smaller tree is as good.
        assert len(shape) <= min(n for n, value in within if value >= best - 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 24), depth=st.integers(1, 6))
def test_more_budget_and_more_depth_never_harm(seed: int, budget: int, depth: int) -> None:
    rates = random_rates(seed)
    shapes = OptimalShapes(rates, budget, depth)
    found = [expected_accepted(shapes.of(n), rates) for n in range(budget + 1)]
    assert found[0] == 0.0
    assert all(before <= after + 1e-12 for before, after in pairwise(found))
    assert [shapes.of(n) for n in (budget // 2, budget)] == [
        optimal(rates, n, depth) for n in (budget // 2, budget)
    ]
    deeper = expected_accepted(optimal(rates, budget, depth + 1), rates)
    endless = expected_accepted(optimal(rates, budget), rates)
    assert found[-1] <= deeper + 1e-12 <= endless + 2e-12
    assert optimal(rates, budget) == optimal(rates, budget, budget)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 24))
def test_what_is_never_accepted_is_drafted_for_a_younger_sibling_at_most(
    seed: int, budget: int
) -> None:
    rates = random_rates(seed)
    shape = optimal(rates, budget)
    for node in shape:
        if rates.at(len(node) - 1, node[-1]) == 0.0:
            assert (*node, 0) not in shape
            siblings = [rank for *parent, rank in shape if tuple(parent) == node[:-1]]
            assert rates.at(len(node) - 1, max(siblings)) > 0.0
    assert optimal(rates_of([0.0, 0.0]), budget) == greedy(rates_of([0.0]), budget) == frozenset()
    assert all(rates.at(len(node) - 1, node[-1]) > 0.0 for node in greedy(rates, budget))


def likeliest(rates: AcceptanceRates, budget: int, depth: int) -> float:
    """The sum of the `budget` greatest chances of all nodes there are."""
    chances: list[float] = []
    level = np.ones(1)
    for place in range(depth):
        level = (level[:, None] * rates.row(place)).ravel()
        chances += level.tolist()
    return sum(sorted(chances, reverse=True)[:budget])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 20), depth=st.integers(1, 4))
def test_greedy_has_the_likeliest_nodes(seed: int, budget: int, depth: int) -> None:
    rates = random_rates(seed)
    shape, in_order = (greedy(rates, budget, depth, in_order=b) for b in (False, True))
    assert len(shape) <= budget
    assert shape_of(shape) == shape
    assert skipping(in_order) is None
    value = expected_accepted(shape, rates)
    assert value == pytest.approx(likeliest(rates, budget, depth), abs=1e-12)
    ordered_best = expected_accepted(optimal(rates, budget, depth), rates)
    assert expected_accepted(in_order, rates) <= ordered_best + 1e-12 <= value + 2e-12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 20), depth=st.integers(1, 4))
def test_greedy_is_optimal_where_no_sibling_is_likelier_than_an_elder(
    seed: int, budget: int, depth: int
) -> None:
    rates = random_rates(seed, descending=True)
    best = expected_accepted(optimal(rates, budget, depth), rates)
    shape = greedy(rates, budget, depth)
    assert expected_accepted(shape, rates) == pytest.approx(best, abs=1e-12)
    assert skipping(shape) is None
    assert shape == greedy(rates, budget, depth, in_order=True)


def test_where_the_three_constructions_differ() -> None:
    rates = rates_of([0.1, 0.8], [0.5, 0.0])
    assert greedy(rates, 2, 2) == {(1,), (1, 0)}
    assert optimal(rates, 2, 2) == {(0,), (1,)}
    assert greedy(rates, 2, 2, in_order=True) == {(0,), (1,)}
    dead = rates_of([0.0, 0.8])
    assert greedy(dead, 2, 1) == {(1,)}
    assert optimal(dead, 2, 1) == {(0,), (1,)}
    assert greedy(dead, 2, 1, in_order=True) == frozenset()


def test_of_equally_likely_nodes_the_one_nearer_to_the_root_comes_first() -> None:
    rates = rates_of([0.5, 0.25], [0.5, 0.25], [1.0, 0.0])  # (1,) is as likely as (0, 0)
    for in_order in (False, True):
        shapes = [greedy(rates, nodes, in_order=in_order) for nodes in (1, 2, 3)]
        assert shapes == [{(0,)}, {(0,), (1,)}, {(0,), (1,), (0, 0)}]


def test_a_shape_in_words_and_in_order() -> None:
    shape = shape_of([[1], [0], [0, 1], [0, 0], [1, 0], [0, 0, 0]])
    assert ordered(shape) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert parents_by_level(shape) == [[()], [(0,), (1,)], [(0, 0)]]
    assert describe(shape) == "6 nodes, children 2 | 2 1 | 1"
    assert describe(frozenset()) == "0 nodes"
    assert skipping(shape) is None
    assert skipping(shape_of([(0,), (2,), (2, 1)])) == (2,)
