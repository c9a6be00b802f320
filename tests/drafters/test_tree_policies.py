"""Policies that choose shapes by measurement or confidence: against exhaustive search, brute-force
definitions and closed forms; and the trees that are grown of them.

Shapes are written as sets of paths of child ranks, as in `drafters/trees/shapes.py`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import run as command
from specdec.costs import CostTable
from specdec.drafters.growth import Frontier, grow, levels_of
from specdec.drafters.host import Trie
from specdec.drafters.trees import cost_aware, fixed
from specdec.drafters.trees.accuracy import Accuracy
from specdec.drafters.trees.cost_aware import Choice, CostAware, choose, predictions
from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.paths import Paths
from specdec.drafters.trees.shapes import (
    Node,
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
from specdec.drafters.trees.static import Static
from specdec.drafters.trees.threshold import Threshold
from specdec.rates import AcceptanceRates
from specdec.tables import DATA
from specdec.tree import TokenTree
from tests.decoding import prepared
from tests.drafters.scripted import (
    CHILDREN,
    Listed,
    Script,
    context_for,
    decoding,
    grown,
    paths_of,
    row_of,
    step_for,
)

NEW = ("paths", "threshold", "optimal", "accuracy", "cost_aware")


def rates_of(*rows: Sequence[float]) -> AcceptanceRates:
    return AcceptanceRates(values=[list(row) for row in rows])


def random_rates(seed: int, *, descending: bool = False) -> AcceptanceRates:
    """Up to 3 depths and 4 ranks, some of them never accepted; siblings in any order, or else
    such that none is likelier than an elder one."""
    generator = np.random.default_rng(seed)
    depths, ranks = generator.integers(1, 4), generator.integers(1, 5)
    values = generator.dirichlet(np.ones(ranks + 1), size=depths)[:, :-1]
    values[generator.random(values.shape) < 0.25] = 0.0
    return AcceptanceRates(values=-np.sort(-values) if descending else values)


# Expected accepted nodes


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


# Optimal shapes


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
        shape = optimal(rates, budget, depth)
        assert expected_accepted(shape, rates) == pytest.approx(best, abs=1e-12)
        assert len(shape) <= budget
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


def test_a_shape_in_words_and_in_order() -> None:
    shape = shape_of([[1], [0], [0, 1], [0, 0], [1, 0], [0, 0, 0]])
    assert ordered(shape) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert parents_by_level(shape) == [[()], [(0,), (1,)], [(0, 0)]]
    assert describe(shape) == "6 nodes, children 2 | 2 1 | 1"
    assert describe(frozenset()) == "0 nodes"
    assert skipping(shape) is None
    assert skipping(shape_of([(0,), (2,), (2, 1)])) == (2,)


# Growing a given shape

SHAPES: dict[str, Shape] = {
    "one": shape_of([(0,)]),
    "chain": shape_of([(0,), (0, 0), (0, 0, 0)]),
    "star": shape_of([(0,), (1,), (2,), (3,)]),
    "bushy": shape_of([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (2, 0, 0), (2, 0, 1), (0, 1, 0)]),
    "all of a level": shape_of([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)]),
    "optimal": optimal(rates_of([0.5, 0.3, 0.1], [0.4, 0.2, 0.2]), 17),
}
SKIPPING: dict[str, Shape] = {
    "second only": shape_of([(1,), (1, 1), (1, 1, 1)]),
    "gaps": shape_of([(0,), (3,), (0, 2), (3, 0), (3, 4), (0, 2, 0), (3, 4, 1)]),
}


def ranks_of(tree: TokenTree, row: int) -> list[Node]:
    """Each node but the root as ranks among its siblings, in the order of nodes."""
    found: list[Node] = [()]
    for node, parent in enumerate(tree.parents[row, 1 : int(tree.size[row])].tolist(), start=1):
        found.append((*found[parent], tree.parents[row, :node].tolist().count(parent)))
    return found[1:]


def by_tokens(script: Script, root: int, shape: Shape) -> list[Node]:
    """The paths of tokens that a shape of top-k children has in a script."""

    def path(node: Node) -> Node:
        found: Node = ()
        for rank in node:
            found = (*found, script.table(root, found)[rank][0])
        return found

    return [path(node) for node in ordered(shape)]


@pytest.mark.parametrize("roots", [(3,), (3, 1, 4)], ids=["alone", "three"])
@pytest.mark.parametrize("name", [*SHAPES, *SKIPPING])
def test_top_k_trees_are_the_shape(name: str, roots: tuple[int, ...]) -> None:
    shape = (SHAPES | SKIPPING)[name]
    policy = FixedShape(shape=shape)
    tree, _, script = grown(policy, roots)
    tree.check()
    assert policy.budget == len(shape)
    assert tree.nodes == len(shape) + 1
    for row, root in enumerate(roots):
        assert paths_of(tree, row)[1:] == by_tokens(script, root, shape)
    # Nothing is asked of the draft but the nodes that have children.
    assert script.levels == [len(parents) for parents in parents_by_level(shape)]


@pytest.mark.parametrize("children", CHILDREN[1:])
@pytest.mark.parametrize("roots", [(3,), (3, 1, 4)], ids=["alone", "three"])
@pytest.mark.parametrize("name", SHAPES)
def test_sampled_trees_are_the_shape(name: str, roots: tuple[int, ...], children: str) -> None:
    """All but what lies beneath a token drawn again, which no rule would enter."""
    shape, repeats = SHAPES[name], 0
    policy = FixedShape(shape=shape, children=children)
    for seed in range(8):
        tree, _, _ = grown(policy, roots, seed=seed)
        tree.check()
        for row in range(len(roots)):
            ranks, paths = ranks_of(tree, row), paths_of(tree, row)
            again = {rank for place, rank in enumerate(ranks, 1) if paths[place] in paths[:place]}
            repeats += len(again)
            expected = [
                node
                for node in ordered(shape)
                if not any(node[:n] in again for n in range(1, len(node)))
            ]
            assert ranks == expected
    assert (repeats > 0) == (
        children == "sample_with_replacement" and name not in ("one", "chain")
    )


@pytest.mark.parametrize("children", CHILDREN)
@pytest.mark.parametrize("widths", [[3], [1, 1, 1], [3, 2, 2]])
def test_a_full_shape_is_the_static_tree(widths: list[int], children: str) -> None:
    static = Static(widths=widths, children=children)
    full = [
        path
        for level in range(len(widths))
        for path in product(*(range(width) for width in widths[: level + 1]))
    ]
    policy = FixedShape(shape=full, children=children)
    for roots in ((5,), (5, 2)):
        one, other = grown(static, roots), grown(policy, roots)
        for row in range(len(roots)):
            assert row_of(one[0], row) == row_of(other[0], row)
    assert [policy.width(level) for level in range(policy.levels(None))] == widths


class Narrowing(Script):
    """Lists fewer candidates the deeper it is asked, or so many as `by_level` says."""

    by_level: Sequence[int] = ()

    def __call__(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        ids, probs = super().__call__(frontier)
        count = self.by_level[frontier.level]
        return ids[..., :count], probs[..., :count]


@pytest.mark.parametrize(
    "by_level", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (3, 1, 4), (1, 5, 2), (4, 2, 1)]
)
@pytest.mark.parametrize("name", [*SHAPES, *SKIPPING])
def test_fewer_candidates_than_ranks(name: str, by_level: tuple[int, ...]) -> None:
    shape, roots = (SHAPES | SKIPPING)[name], (7, 8)
    kinds = CHILDREN if name in SHAPES else CHILDREN[:1]
    for children in kinds:
        policy = FixedShape(shape=shape, children=children)
        # Before and after it the same policy grows the whole shape.
        whole = row_of(grown(policy, roots)[0], 0)
        script = Narrowing(roots)
        script.by_level = (*by_level, *by_level[-1:] * 9)
        tree, _ = grow(policy, policy.levels(None), context_for(roots), script)
        tree.check()
        expected = [
            node
            for node in ordered(shape)
            if all(rank < script.by_level[level] for level, rank in enumerate(node))
        ]
        for row, root in enumerate(roots):
            if children == "top_k":
                assert paths_of(tree, row)[1:] == by_tokens(script, root, frozenset(expected))
            elif children == "sample":
                assert ranks_of(tree, row) == expected
            else:
                assert set(ranks_of(tree, row)) <= set(expected)
        assert row_of(grown(policy, roots)[0], 0) == whole


def test_fewer_levels_than_the_shape_has() -> None:
    """As a composition grows them whose parts are shallow."""
    shape = SHAPES["bushy"]
    for levels in (1, 2):
        tree, _ = grow(FixedShape(shape=shape), levels, context_for([3]), Script([3]))
        assert ranks_of(tree, 0) == [node for node in ordered(shape) if len(node) <= levels]


def test_tables_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host could not be captured in a CUDA graph."""
    policy = FixedShape(shape=SHAPES["bushy"])
    before = row_of(grown(policy, (3, 1))[0], 1)
    monkeypatch.setattr(fixed, "torch", None)  # what would make them
    assert row_of(grown(policy, (3, 1))[0], 1) == before
    assert row_of(grown(policy, (1,))[0], 0) == before


@pytest.mark.parametrize("name", [*SHAPES, *SKIPPING])
def test_host_drafters_grow_the_shape(name: str) -> None:
    shape = (SHAPES | SKIPPING)[name]
    generator = np.random.default_rng(5)
    drafter = prepared(Listed(), FixedShape(shape=shape))
    drafter.proposals = [
        [(generator.integers(0, 5, 4).tolist(), float(w)) for w in generator.random(60)],
        [(generator.integers(0, 3, 3).tolist(), float(w)) for w in generator.random(9)],
        [([1], 1.0)],
        [],
    ]
    tree = drafter.draft(step_for([decoding([9], row=row, number=row) for row in range(4)]))
    tree.check()
    for row, proposals in enumerate(drafter.proposals):
        trie = Trie()
        for path, weight in proposals:
            trie.add(path[: drafter.levels], weight)
        expected = []
        for node in ordered(shape):
            here: Trie | None = trie
            tokens: Node = ()
            for rank in node:
                best = here.best(rank + 1) if here is not None and here.children else []
                here = here.children[best[rank][0]] if here and rank < len(best) else None
                tokens = (*tokens, best[rank][0]) if here else tokens
            if here is not None:
                expected.append(tokens)
        assert paths_of(tree, row)[1:] == expected
    sampled = prepared(Listed(), FixedShape(shape=SHAPES["bushy"], children="sample"))
    sampled.proposals = drafter.proposals
    tree = sampled.draft(step_for([decoding([9], row=0)]))
    assert ranks_of(tree, 0) == ordered(SHAPES["bushy"])


def test_no_nodes_are_no_drafting() -> None:
    for policy in (
        FixedShape(shape=[]),
        Paths(paths=[]),
        Paths(paths=[[0], [0, 0]], budget=0),
        Optimal(rates="zoo", budget=0),
        Accuracy(rates="zoo", budget=0),
        CostAware(rates="zoo", budget=0),
        Threshold(threshold=0.5, budget=0),
    ):
        assert policy.budget == 0
        assert levels_of(policy, None) == policy.levels(None) == 0
        drafter = prepared(Listed(), policy)
        assert drafter.draft(step_for([decoding([1, 2])])).nodes == 1


def test_levels_of_a_shape() -> None:
    policy = FixedShape(shape=SHAPES["bushy"])
    assert [policy.levels(depth) for depth in (None, 3, 9)] == [3, 3, 3]
    with pytest.raises(ValueError, match=r"drafter.depth=2: the tree has 3 levels \(9 nodes, chi"):
        policy.levels(2)


# tree=threshold


def confident(script: Script, root: int, policy: Threshold) -> set[Node]:
    """Top-k paths that pass, the best of them if they are too many."""
    level, passing = {(): 1.0}, {}
    for _ in range(policy.levels(None)):
        level = {
            (*path, token): mass * p
            for path, mass in level.items()
            for token, p in script.table(root, path)[: policy.candidates]
            if mass * p >= policy.threshold
        }
        passing |= level
    return set(sorted(passing, key=lambda path: -passing[path])[: policy.budget])


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("budget", "width", "depth"), [(30, 6, 4), (8, 3, 5), (3, 2, 6), (1, 4, 2)]
)
def test_threshold_keeps_what_passes(
    threshold: float, budget: int, width: int, depth: int
) -> None:
    policy = Threshold(threshold=threshold, budget=budget, width=width, depth=depth)
    roots = (2, 3, 5, 7)
    tree, _, script = grown(policy, roots)
    tree.check()
    for row, root in enumerate(roots):
        assert set(paths_of(tree, row)[1:]) == confident(script, root, policy)
    assert max(script.levels) <= max(1, min(budget, 1 / threshold))


@pytest.mark.parametrize("children", CHILDREN[1:])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("budget", [2, 7, 12])
def test_threshold_counts_the_candidates_that_pass(
    threshold: float, budget: int, children: str
) -> None:
    policy = Threshold(threshold=threshold, budget=budget, width=3, depth=3, children=children)
    levels = policy.levels(None)
    for seed in range(6):
        tree, _, script = grown(policy, (4, 6), seed=seed)
        tree.check()
        for row, root in enumerate((4, 6)):
            paths, parents = paths_of(tree, row), tree.parents[row].tolist()
            mass = {(): 1.0}
            for path in paths[1:]:
                mass[path] = mass[path[:-1]] * dict(script.table(root, path[:-1]))[path[-1]]
            for level in range(levels):
                share = budget // levels + (level < budget % levels)
                first = [n for n, p in enumerate(paths) if len(p) == level and p not in paths[:n]]
                offers = sorted(
                    (-mass[paths[node]] * p, node)
                    for node in first
                    for _, p in script.table(root, paths[node])[: policy.width(level)]
                )
                taken = [node for lost, node in offers[:share] if -lost >= threshold]
                assert [parents.count(node) for node in first] == [taken.count(n) for n in first]


def test_threshold_is_confident_of_as_many_as_can_pass() -> None:
    """Ten nodes of a tenth each, though their sum is not 1 to the last bit."""
    policy = Threshold(threshold=0.1 - 1e-9, budget=40, width=10, depth=2)

    def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
        shape = (*frontier.tokens.shape, 10)
        probs = [0.1 if frontier.level == 0 else 1.0] + [0.1 * (frontier.level == 0)] * 9
        return torch.arange(10).expand(shape), torch.tensor(probs).expand(shape)

    tree, _ = grow(policy, 2, context_for([3]), expand)
    assert tree.size.tolist() == [21]


# Measured rates


def cases_file(folder: Path, *cases: dict[str, Any]) -> str:
    path = folder / "rates.json"
    path.write_text(json.dumps({"cases": cases, "more": 1}))
    return str(path)


def case(children: str, temperature: float, first: float, **more: Any) -> dict[str, Any]:
    return {"children": children, "temperature": temperature, "rates": [[first, 0.1]], **more}


@pytest.mark.parametrize(
    ("children", "temperature", "first"),
    [
        ("top_k", 0, 0.1),
        ("top_k", 0.01, 0.2),
        ("top_k", 0.7, 0.3),
        ("top_k", 0.6, 0.2),
        ("top_k", 9.0, 0.4),
        ("sample", 1.0, 0.6),
        ("sample", 0.75, 0.6),
    ],
)
def test_the_nearest_case_counts(
    tmp_path: Path, children: str, temperature: float, first: float
) -> None:
    path = cases_file(
        tmp_path,
        case("top_k", 0.0, 0.1, top_p=None),
        case("top_k", 0.5, 0.2),
        case("top_k", 0.8, 0.3, top_p=0.9),
        case("top_k", 1.0, 0.4, top_p=None),
        case("sample", 1.0, 0.5, top_p=0.9),
        case("sample", 1.0, 0.6, top_p=None),
        case("sample", 1.0, 0.7, top_p=None),
        case("sample", 0.5, 0.8, top_p=0.9),
    )
    rates = AcceptanceRates.load(path, children=children, temperature=temperature)
    assert rates.values.tolist() == [[first, 0.1]]


def test_beyond_what_was_measured() -> None:
    rates = rates_of([0.5, 0.2], [0.4, 0.1])
    assert [rates.row(depth).tolist() for depth in (0, 1, 7)] == [
        [0.5, 0.2],
        [0.4, 0.1],
        [0.4, 0.1],
    ]
    assert [rates.at(3, rank) for rank in (0, 1, 2)] == [0.4, 0.1, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (
            "{}",
            "is no such table, it has no 'cases'; "
            "python -m specdec.experiments.tools.measure_acceptance",
        ),
        ('{"cases": 3}', "not iterable"),
        (
            '{"cases": []}',
            r"holds no rates of children=top_k at temperature 0 \(nothing\); choose other",
        ),
        (
            json.dumps({"cases": [case("sample", 0.0, 0.1), case("top_k", 1.0, 0.1)]}),
            r"holds no rates of children=top_k at temperature 0 \(sample at 0, top_k at 1\)",
        ),
        ('{"cases": [{"children": "top_k", "temperature": 0}]}', "it has no 'rates'"),
        *(
            (json.dumps({"cases": [case("top_k", 0, 0.1) | {"rates": rates}]}), message)
            for rates, message in [
                ([], "rates must be lists of numbers"),
                ([[]], "rates must be lists of numbers"),
                ([0.5], "rates must be lists of numbers"),
                ([[0.5], [0.5, 0.1]], "rates must be lists of numbers"),
                ([["0.5"]], "rates must be lists of numbers"),
                ([[0.5, None]], "rates must be lists of numbers"),
                ([[0.5], [1.5]], "rates at depth 1: each must be from 0 to 1"),
                ([[-0.1]], "rates at depth 0: each must be from 0 to 1"),
                ([[float("nan")]], "rates at depth 0: each must be from 0 to 1"),
                ([[0.5, 0.6]], "rates at depth 0: siblings .* sum to 1 at most, not 1.1"),
            ]
        ),
    ],
)
def test_what_is_wrong_with_rates_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        AcceptanceRates.load(path, children="top_k", temperature=0.0)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match=message) as error:
        Optimal(rates=str(path), budget=3)
    assert str(error.value).startswith(f"tree.rates={path}: ")
    assert "\n" not in str(error.value)


def test_rounding_may_exceed_a_sum_of_one() -> None:
    assert rates_of([0.5, 0.5 + 5e-7]).values.shape == (1, 2)


# Tables that come with the package


@pytest.mark.parametrize("name", [path.stem for path in (DATA / "costs").glob("*.json")])
def test_packaged_costs(name: str) -> None:
    table = CostTable.load(name)
    assert table.verify(1, table.most_nodes, 512) > 0
    assert table.draft(1, table.most_width) > 0
    path = DATA / f"costs/{name}.json"
    assert CostTable.load(path).verify(2, 5, 300) == table.verify(2, 5, 300)


@pytest.mark.parametrize(
    ("children", "temperature"),
    [("top_k", 0.0), ("top_k", 1.0), ("sample", 1.0), ("sample_with_replacement", 1.0)],
)
def test_packaged_rates(children: str, temperature: float) -> None:
    """Of the zoo: by name and by path they are the same, and the likeliest child is the first."""
    found, same = (
        AcceptanceRates.load(path, children=children, temperature=temperature)
        for path in ("zoo", DATA / "acceptance/zoo.json")
    )
    assert (found.values == same.values).all()
    assert (found.values.argmax(axis=1) == 0).all()


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"^h100: no such table; known are cpu, .*, a file is"):
        CostTable.load("h100")
    with pytest.raises(
        ValueError, match=r"^tree.rates=mine: no such table; known are .*zoo.*, a f"
    ):
        Optimal(rates="mine", budget=3)
    with pytest.raises(ValueError, match=r"^tree.rates=./zoo: no such file; python -m specdec"):
        Optimal(rates="./zoo", budget=3)
    with pytest.raises(ValueError, match=r"^tree.costs=zoo.json: no such file; experiments/calib"):
        CostAware(rates="zoo", costs="zoo.json", budget=3)


# Policies of measured rates


@pytest.mark.parametrize("children", CHILDREN)
def test_the_shapes_of_measured_policies(tmp_path: Path, children: str) -> None:
    rows = [[0.1, 0.6, 0.1], [0.5, 0.1, 0.2]]
    rates = rates_of(*rows)
    path = cases_file(tmp_path, case(children, 1.0, 0.0) | {"rates": rows})
    ordered_only = children != "top_k"
    for budget, depth in [(1, None), (6, None), (9, 2), (16, None)]:
        limits: dict[str, Any] = {"budget": budget, "depth": depth, "children": children}
        best = Optimal(rates=path, temperature=0.7, **limits)
        assert best.shape == optimal(rates, budget, depth)
        likely = Accuracy(rates=path, temperature=2.0, **limits)
        assert likely.shape == greedy(rates, budget, depth, in_order=ordered_only)
        assert (skipping(likely.shape) is None) == ordered_only
        for policy in (best, likely):
            assert 0 < policy.budget == len(policy.shape) <= budget
            assert policy.children == children


def test_paths_are_read_from_a_file_and_from_a_list(tmp_path: Path) -> None:
    listed = [[0, 1], [0], [1], [0, 0], [1]]
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(listed))
    for paths in (listed, str(path)):
        policy = Paths(paths=paths)
        assert policy.shape == {(0,), (1,), (0, 0), (0, 1)}
        assert policy.budget == Paths(paths=paths, budget=4).budget == 4


# tree=cost_aware


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
    best, shapes = (1 / costs.verify(batch, 1, 300), frozenset()), {frozenset[Node]()}
    for nodes, levels in product(range(1, budget + 1), range(1, depth + 1)):
        shape = optimal(rates, nodes, levels)
        shapes.add(shape)
        seconds = costs.verify(batch, len(shape) + 1, 300)
        if shape:
            seconds += costs.draft(batch, 1)
        for level in range(1, max(map(len, shape), default=0)):
            expanded = {node[:-1] for node in shape if len(node) == level + 1}
            seconds += costs.draft(batch, len(expanded))
        best = max(
            best,
            ((1 + expected_accepted(shape, rates)) / seconds, shape),
            key=lambda pair: pair[0],
        )
    limits = {"batch": batch, "context": 300, "budget": budget, "depth": depth}
    found = choose(rates, costs, **limits)
    assert found.tokens_per_second == pytest.approx(best[0], rel=1e-12)
    assert found.tokens == pytest.approx(1 + expected_accepted(found.shape, rates))
    listed = list(predictions(rates, costs, **limits))
    assert len(listed) == len(shapes)
    assert {choice.shape for choice in listed} == shapes
    assert found in listed


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


def test_what_was_not_measured_is_not_chosen() -> None:
    small = costs_of(flat(1.0), flat(1e-9), nodes=33)
    assert len(choose(FALLING, small, batch=1, context=9, budget=60, depth=8).shape) == 32
    narrow = CostTable(
        verify_grid=[[1], [1, 65], [128]],
        verify_seconds=[[[1.0], [1.0]]],
        draft_grid=[[1], [1, 2]],
        draft_seconds=[[1e-9, 1e-9]],
    )
    for choice in predictions(FALLING, narrow, batch=1, context=9, budget=60, depth=8):
        assert all(len(parents) <= 2 for parents in parents_by_level(choice.shape))
    alone = CostTable(
        verify_grid=[[1], [1], [128]],
        verify_seconds=[[[1.0]]],
        draft_grid=[[1], [1]],
        draft_seconds=[[1e-9]],
    )
    assert not choose(FALLING, alone, batch=1, **LIMITS).shape


def test_cost_aware_says_what_it_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CostAware(rates="zoo", costs="h200", batch=8, budget=32)
    rates = AcceptanceRates.load("zoo", children="top_k", temperature=0.0)
    assert policy.shape == policy.choice.shape
    assert policy.choice.tokens == pytest.approx(1 + expected_accepted(policy.shape, rates))
    for gpu, name in ((False, "cpu"), (True, "h200")):
        monkeypatch.setattr(cost_aware.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        chosen = [CostAware(rates="zoo", costs=c, budget=32).choice for c in ("auto", name)]
        assert chosen[0] == chosen[1]


# Mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Paths(paths=[[0], [1, 0]]), r"tree.paths: \[1, 0\] lacks its parent \[1\]; list"),
        (lambda: Paths(paths=[[0], []]), r"tree.paths: \[\] is no path; each must list ranks"),
        (lambda: Paths(paths=[[0], [0, -1]]), r"tree.paths: \[0, -1\] is no path"),
        (
            lambda: Paths(paths=[[0], [1], [0, 0]], budget=2),
            r"tree.budget=2: the tree has 3 nodes, children 2 \| 1; raise the budget or ",
        ),
        (lambda: Paths(paths=[[0]], budget=-1), "tree.budget=-1: must be 0"),
        (lambda: Paths(paths=[[0]], children="best"), "tree.children=best: must be one of"),
        (
            lambda: Paths(paths=[[0], [2]], children="sample"),
            r"tree.children=sample: the path \[2\] skips a rank, .* use tree.children=top_k",
        ),
        (
            lambda: FixedShape(shape=SKIPPING["gaps"], children="sample_with_replacement"),
            r"tree.children=sample_with_replacement: the path \[3\] skips a rank",
        ),
        (lambda: Paths(paths="none.json"), "tree.paths=none.json: no such file; it must hold a l"),
        (lambda: Paths(paths="zoo"), "tree.paths=zoo: no such file"),
        (lambda: Threshold(threshold=0.0, budget=3), "tree.threshold=0.0: must be above 0 and at"),
        (lambda: Threshold(threshold=1.1, budget=3), "tree.threshold=1.1: must be above 0 and at"),
        (lambda: Threshold(threshold=0.1, budget=-3), "tree.budget=-3"),
        (lambda: Threshold(threshold=0.1, budget=3, width=0), "tree.width=0: must be at least 1"),
        (lambda: Threshold(threshold=0.1, budget=3, depth=0), "tree.depth=0: must be at least 1"),
        (lambda: Threshold(threshold=0.1, budget=3, children="x"), "tree.children=x"),
        *(
            (lambda kind=kind, wrong=wrong: kind(**{"rates": "zoo", "budget": 3} | wrong), message)
            for kind in (Optimal, Accuracy, CostAware)
            for wrong, message in [
                ({"budget": -1}, "tree.budget=-1: must be 0"),
                ({"depth": 0}, "tree.depth=0: must be at least 1"),
                ({"children": "best"}, "tree.children=best: must be one of"),
                ({"rates": "x"}, "tree.rates=x: no such table"),
                (
                    {"children": "sample"},
                    r"tree.rates=zoo: holds no rates of children=sample at temperature 0 \(",
                ),
            ]
        ),
        (lambda: CostAware(rates="zoo", budget=3, costs="x"), "tree.costs=x: no such table"),
        (lambda: CostAware(rates="zoo", budget=3, batch=0), "tree.batch=0: must be at least 1"),
        (lambda: CostAware(rates="zoo", budget=3, context=0), "tree.context=0: must be at least"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["3", "[0]", "[[0], [0.5]]", "[[true]]", '["0"]', "{}"])
def test_a_file_that_lists_no_paths(tmp_path: Path, content: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"tree.paths={path}: must be a list of paths like"):
        Paths(paths=str(path))


# The command line


def outputs(folder: Path) -> list[list[int]]:
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return [json.loads(line)["output_ids"] for line in lines]


@pytest.fixture
def specdec(monkeypatch: pytest.MonkeyPatch, load_once: None) -> Callable[..., int]:
    """Run the command in this process: the exit code."""
    quick = ("tracker=none", "prompts.limit=1", "max_new_tokens=12", "dtype=float32")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["specdec", *quick, *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return int(stop.value.code or 0)

    return call


@pytest.mark.parametrize("tree", NEW)
def test_trees_of_the_command_line_equal_the_baseline(
    specdec: Callable[..., int], tmp_path: Path, tree: str
) -> None:
    out = tmp_path / "greedy"
    assert specdec(f"tree={tree}", f"out={out}") == 0
    assert outputs(out) == outputs(out / "baseline")
    assert json.loads((out / "summary.json").read_text())["children"] == "top_k"
    out = tmp_path / "sampled"
    sampled = ("sampling=sample", "tree.children=sample", "baseline=false")
    assert specdec(f"tree={tree}", *sampled, f"out={out}") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["children"] == "sample"
    assert summary["mean_accepted_length"]["pooled"] > 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tree=optimal", "tree.rates=x"), "error: tree.rates=x: no such table"),
        (("tree=optimal", "tree.budget=two"), "error: tree.budget=two: must be a valid integer"),
        (("tree=cost_aware", "tree.costs=x"), "error: tree.costs=x: no such table"),
        (("tree=threshold", "tree.threshold=2"), "error: tree.threshold=2.0: must be above 0"),
        (("tree=paths", "tree.paths=[[0],[1,0]]"), "error: tree.paths: [1, 0] lacks its parent"),
        (("tree=paths", "tree.paths=x.json"), "error: tree.paths=x.json: no such file"),
        (
            ("tree=paths", "tree.paths=[[1]]", "tree.children=sample", "sampling=sample"),
            "error: tree.children=sample: the path [1] skips a rank",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    specdec: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert specdec(*arguments, f"out={tmp_path / 'o'}") == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
