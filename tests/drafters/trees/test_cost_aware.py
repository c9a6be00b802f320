"""tree=cost_aware against all that it may choose."""

import time
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.costs import CostTable
from specdec.drafters.trees import cost_aware
from specdec.drafters.trees.cost_aware import Choice, CostAware, choose
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.shapes import (
    Node,
    expected_accepted,
    optimal,
    parents_by_level,
)
from specdec.kernels import reference
from specdec.protocols import Drafter, Growth
from specdec.rates import AcceptanceRates
from tests.drafters.trees.measured import random_rates, rates_of


def costs_of(
    verify: Callable[[int, int], float], draft: Callable[[int, int], float], nodes: int = 65
) -> CostTable:
    """Seconds by batch and nodes, and by batch and width."""
    batches, sizes = [1, 8, 32], [1, 2, 4, 8, 16, 32, nodes]
    widths = [1, 2, 4, 8, 16, 64]
    return CostTable(
        verify_grid=[batches, sizes, [128, 1024]],
        verify_seconds=[[[verify(b, n)] * 2 for n in sizes] for b in batches],
        draft_grid=[batches, widths],
        draft_seconds=[[draft(b, w) for w in widths] for b in batches],
    )


def flat(seconds: float) -> Callable[[int, int], float]:
    return lambda batch, count: seconds


FALLING = rates_of([0.6, 0.2, 0.1], [0.5, 0.2, 0.1])

LIMITS = {"context": 512, "budget": 24, "depth": 6}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 40),
    budget=st.integers(0, 14),
    depth=st.integers(1, 5),
)
def test_cost_aware_is_the_best_of_all_it_may_choose(
    seed: int, batch: int, budget: int, depth: int
) -> None:
    generator = np.random.default_rng(seed)
    rates = random_rates(seed)
    per_node, per_width, draft = generator.random(3) * [0.02, 0.02, 0.3]
    costs = costs_of(lambda b, n: 1 + per_node * b * n, lambda b, w: draft + per_width * b * w)
    best = (1 / costs.verify(batch, 1, 300), frozenset[Node]())
    for nodes, levels in product(range(1, budget + 1), range(1, depth + 1)):
        shape = optimal(rates, nodes, levels)
        seconds = costs.verify(batch, len(shape) + 1, 300)
        if shape:
            seconds += costs.draft(batch, 1, 300)
        for level in range(1, max(map(len, shape), default=0)):
            expanded = {node[:-1] for node in shape if len(node) == level + 1}
            seconds += costs.draft(batch, len(expanded), 300)
        best = max(
            best,
            ((1 + expected_accepted(shape, rates)) / seconds, shape),
            key=lambda pair: pair[0],
        )
    limits = {"batch": batch, "context": 300, "budget": budget, "depth": depth}
    found = choose(rates, costs, **limits)
    assert found.tokens_per_second == pytest.approx(best[0], rel=1e-12)
    assert found.tokens == pytest.approx(1 + expected_accepted(found.shape, rates))
    assert found.tokens / found.seconds == pytest.approx(best[0], rel=1e-12)


def test_dear_drafting_does_not_pay() -> None:
    nothing = Choice(shape=frozenset(), tokens=1.0, seconds=1.0)
    dear = costs_of(flat(1.0), flat(9.0))
    assert choose(FALLING, dear, batch=1, **LIMITS) == nothing
    cheap = costs_of(flat(1.0), flat(1e-6))
    assert choose(rates_of([0.0]), cheap, batch=1, **LIMITS) == nothing
    assert choose(FALLING, cheap, batch=1, **LIMITS).shape


def test_cheap_nodes_are_all_taken() -> None:
    chosen = choose(FALLING, costs_of(flat(1.0), flat(1e-9)), batch=1, **LIMITS)
    assert chosen.shape == optimal(FALLING, 24, 6)
    assert chosen.tokens_per_second == pytest.approx(chosen.tokens, rel=1e-6)


def test_dear_levels_make_trees_shallow() -> None:
    depths = []
    for seconds in (1e-9, 0.3, 0.5):
        chosen = choose(FALLING, costs_of(flat(1.0), flat(seconds)), batch=1, **LIMITS)
        depths.append(max(map(len, chosen.shape)))
    assert depths == sorted(set(depths), reverse=True)


def test_the_batch_decides() -> None:
    """Verification is bound by memory for one sequence and by arithmetic for many."""
    costs = costs_of(lambda b, n: max(1.0, b * n / 32), flat(0.05))
    one, many = (choose(FALLING, costs, batch=batch, **LIMITS) for batch in (1, 32))
    assert len(one.shape) > len(many.shape)
    assert one.tokens_per_second > many.tokens_per_second >= 1.0


def test_the_widest_level_that_was_measured_may_be_chosen() -> None:
    costs = CostTable(
        verify_grid=[[1], [1, 65], [512]],
        verify_seconds=[[[1.0], [1.0]]],
        draft_grid=[[1], [1, 2]],
        draft_seconds=[[1e-3, 1e-3]],
    )
    found = choose(
        rates_of([0.5, 0.4], [0.9, 0.0]), costs, batch=1, context=512, budget=4, depth=2
    )
    assert found.shape == {(0,), (1,), (0, 0), (1, 0)}  # two nodes of a level have children


def test_what_was_not_measured_is_not_chosen() -> None:
    small = costs_of(flat(1.0), flat(1e-9), nodes=33)
    assert len(choose(FALLING, small, batch=1, context=9, budget=60, depth=8).shape) == 32
    narrow = CostTable(
        verify_grid=[[1], [1, 65], [128]],
        verify_seconds=[[[1.0], [1.0]]],
        draft_grid=[[1], [1, 2]],
        draft_seconds=[[1e-9, 1e-9]],
    )
    for budget in range(1, 60, 7):
        found = choose(FALLING, narrow, batch=1, context=9, budget=budget, depth=8).shape
        assert found
        assert all(len(parents) <= 2 for parents in parents_by_level(found))
    alone = CostTable(
        verify_grid=[[1], [1], [128]],
        verify_seconds=[[[1.0]]],
        draft_grid=[[1], [1]],
        draft_seconds=[[1e-9]],
    )
    assert not choose(FALLING, alone, batch=1, **LIMITS).shape


def test_cost_aware_says_what_it_expects() -> None:
    policy = CostAware(rates="zoo", costs="h200", batch=8, budget=32)
    rates = AcceptanceRates.load("zoo", children="top_k", temperature=0.0)
    assert policy.shape == policy.choice.shape
    assert policy.choice.tokens == pytest.approx(1 + expected_accepted(policy.shape, rates))


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_one_that_adapts_grows_trees_of_its_size_after_the_draft(children: str) -> None:
    warm = {"temperature": 0.0 if children == "top_k" else 1.0, "children": children}
    policy = CostAware(rates="zoo", costs="cpu", budget=12, adapts=True, **warm)  # type: ignore[arg-type]
    widths = [len(parents) for parents in parents_by_level(policy.shape)]
    children_of = [policy.width(level) for level in range(len(widths))]
    levels = policy.levels(None)
    like = Dynamic(
        budget=len(policy.shape),
        width=max(*widths, *children_of),
        depth=levels,
        children=children,
    )
    at = Growth(
        level=0, levels=levels, offered=(4,), sampled=children != "top_k", kernels=reference
    )
    scores = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).double().log()
    mine, theirs = policy.select(at, scores), like.select(at, scores)
    assert mine is theirs is None or mine.equal(theirs)  # type: ignore[union-attr, arg-type]
    for ours, other in (
        (policy.expand(at, scores.flatten(1)), like.expand(at, scores.flatten(1))),
        (policy.keep(scores.flatten(1), reference), like.keep(scores.flatten(1), reference)),
    ):
        assert ours is other is None or ours.equal(other)  # type: ignore[union-attr, arg-type]


class Fixed(Drafter):
    """Stands for one that is loaded."""

    def __init__(self, depth: int | None = None) -> None:
        self.depth = depth


def fitted(
    monkeypatch: pytest.MonkeyPatch,
    costs: CostTable,
    drafter: Drafter,
    rates: AcceptanceRates = FALLING,
) -> CostAware:
    """A policy whose costs are measured, as `costs`."""
    monkeypatch.setattr(cost_aware, "measured_rates", lambda *args, **kwargs: rates)
    monkeypatch.setattr(cost_aware, "costs_of", lambda *args, **kwargs: (costs, "measured"))
    policy = CostAware(rates="zoo", costs="measure", budget=12, depth=6)
    assert policy.shape == optimal(rates, 12, 6)
    run: Any = SimpleNamespace(drafter=drafter)
    drafter.check(policy)
    policy.fit(run)
    drafter.check(policy)
    return policy


def test_measured_costs_choose_when_models_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = costs_of(lambda b, n: 1 + 0.01 * n, flat(0.1))
    limits = {"batch": 1, "context": 512, "budget": 12}
    for depth in (None, 2):
        policy = fitted(monkeypatch, costs, Fixed(depth))
        best = choose(FALLING, costs, **limits, depth=depth or 6)
        assert (policy.choice, policy.budget) == (best, len(best.shape))
        assert policy.notes["costs"] == "measured"
        plain = choose(FALLING, costs, **{**limits, "budget": 0}, depth=1)
        gain = best.tokens_per_second / plain.tokens_per_second
        assert f"{gain:.2f} times" in policy.notes["shape"]


@pytest.mark.parametrize(("budget", "told"), [(63, ""), (256, "; tree.budget=256 is 63, ")])
def test_a_table_of_smaller_trees_than_may_be_is_told(
    monkeypatch: pytest.MonkeyPatch, budget: int, told: str
) -> None:
    monkeypatch.setattr(AcceptanceRates, "origin", lambda *_: "")
    monkeypatch.setattr(cost_aware, "unlike", lambda *_: "")
    policy = CostAware(rates="zoo", costs="cpu", budget=budget)
    policy.fit(None)  # type: ignore[arg-type]
    end = f"{told}the most it knows" if told else ""
    assert policy.notes["costs"] == f"cpu, of this machine and these models{end}"


def test_a_gain_within_the_noise_of_measuring_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for draft, nodes in ((0.55, 0), (0.45, 1)):  # worth 1.03 and 1.10
        costs = costs_of(flat(1.0), flat(draft))
        policy = fitted(monkeypatch, costs, Fixed(1), rates_of([0.6]))
        assert policy.budget == nodes


@pytest.mark.parametrize(
    ("budget", "depth", "seconds"), [(0, 2, 1.5), (1, 2, 1.86), (2, 1, 1.86), (2, 2, 1.97)]
)
def test_costs_of_the_first_level_are_none_of_plain_decoding(
    budget: int, depth: int, seconds: float
) -> None:
    grid = {"verify_grid": [[1], [1, 65], [9]], "verify_seconds": [[[1.0], [1.0]]]}
    draft = {"draft_grid": [[1], [1, 9]], "draft_seconds": [[0.1, 0.1]]}
    table = CostTable(**grid, **draft, loop_step=[0.5], loop_start=[0.25], loop_accept=[0.01])
    sure = rates_of([0.99, 0.0])
    found = choose(sure, table, batch=1, context=9, budget=budget, depth=depth)
    assert found.seconds == pytest.approx(seconds)


def test_a_large_tree_is_chosen_in_a_moment() -> None:
    wide = costs_of(lambda b, n: 1 + 0.002 * n, flat(0.05), nodes=257)
    begun = time.process_time()
    found = choose(rates_of([0.6, 0.2, 0.1, 0.05]), wide, batch=1, context=9, budget=256, depth=16)
    assert time.process_time() - begun < 0.5
    assert 50 < len(found.shape) < 256
