"""tree=dynamic, against a best-first search of its own."""

from collections.abc import Callable

import numpy as np
import pytest

from specdec.drafters.trees.dynamic import Dynamic
from tests.drafters.scripted import CHILDREN, VOCAB, Path, Script, grown, paths_of


def best_first(
    script: Script, root: int, *, budget: int, width: int, levels: int
) -> dict[Path, float]:
    """Paths and cumulative probabilities: each level expands its `width` best, and of all that
    they offer the `budget` best stay."""
    frontier: dict[Path, float] = {(): 1.0}
    offered: dict[Path, float] = {}
    for _ in range(levels):
        level = {
            (*path, token): mass * p
            for path, mass in frontier.items()
            for token, p in script.table(root, path)[:width]
        }
        offered |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[:width])
    return dict(sorted(offered.items(), key=lambda item: -item[1])[:budget])


@pytest.mark.parametrize("root", range(4))
@pytest.mark.parametrize(
    ("budget", "width", "depth"), [(1, 3, 4), (3, 1, 3), (6, 2, 4), (12, 4, 3), (20, 4, 5)]
)
def test_dynamic_keeps_the_best_paths(root: int, budget: int, width: int, depth: int) -> None:
    policy = Dynamic(budget=budget, width=width, depth=depth, children="top_k")
    tree, _, script = grown(policy, (root,))
    levels = min(depth, budget)
    expected = best_first(script, root, budget=budget, width=min(width, budget), levels=levels)
    assert set(paths_of(tree, 0)) == {(), *expected}


def test_dynamic_without_limits_holds_the_most_probable_paths_there_are() -> None:
    budget, depth = 8, 3
    policy = Dynamic(budget=budget, width=VOCAB**depth, depth=depth, children="top_k")
    tree, _, script = grown(policy, (11,))
    every: dict[Path, float] = {}
    frontier: dict[Path, float] = {(): 1.0}
    for _ in range(depth):
        frontier = {
            (*path, token): mass * p
            for path, mass in frontier.items()
            for token, p in script.table(11, path)
        }
        every |= frontier
    best = sorted(every, key=lambda path: -every[path])[:budget]
    assert set(paths_of(tree, 0)) == {(), *best}


@pytest.mark.parametrize("children", CHILDREN[1:])
@pytest.mark.parametrize("budget", [1, 4, 5, 7])
def test_dynamic_spreads_a_sampled_budget_over_the_levels(budget: int, children: str) -> None:
    policy = Dynamic(budget=budget, width=3, depth=3, children=children)
    tree, _, _ = grown(policy, (1, 2, 3, 4))
    levels = min(3, budget)
    share = [budget // levels + (level < budget % levels) for level in range(levels)]
    for row in range(4):
        by_level = np.bincount([len(path) for path in paths_of(tree, row)])
        assert by_level.tolist() == [1, *share]


@pytest.mark.parametrize("children", CHILDREN[1:])
def test_dynamic_counts_children_before_it_draws_them(children: str) -> None:
    """Whatever the uniforms of a level: equal parents get equal numbers of children."""
    policy = Dynamic(budget=6, width=3, depth=2, children=children)
    shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for seed in range(60):
        tree, _, _ = grown(policy, (6,), seed=seed)
        parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
        level = [node for node in range(1, len(parents)) if parents[node] == 0]
        counts = tuple(parents.count(node) for node in level)
        shapes.setdefault(tuple(tokens[node] for node in level), set()).add(counts)
    assert all(len(counts) == 1 for counts in shapes.values())
    assert len({min(counts) for counts in shapes.values()}) > 1
    assert len(shapes) < 60


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dynamic(budget=-3), "tree.budget=-3"),
        (lambda: Dynamic(budget=3, width=0), "tree.width=0: must be at least 1"),
        (lambda: Dynamic(budget=3, depth=0), "tree.depth=0: must be at least 1"),
        (lambda: Dynamic(budget=3, children="x"), "tree.children=x"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
