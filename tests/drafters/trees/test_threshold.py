"""tree=threshold against its definition."""

import pytest
import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, grow
from specdec.drafters.trees.shapes import (
    Node,
)
from specdec.drafters.trees.threshold import Threshold
from tests.drafters.scripted import (
    CHILDREN,
    Script,
    context_for,
    grown,
    paths_of,
)


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


@pytest.mark.parametrize("children", CHILDREN)
def test_a_path_exactly_as_probable_as_the_threshold_is_drafted(children: str) -> None:
    """Two children of a half each, which have one each of a half."""
    policy = Threshold(threshold=0.25, budget=6, width=2, depth=3, children=children)

    def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
        shape = (*frontier.tokens.shape, 2)
        return torch.arange(2).expand(shape), torch.full(shape, 0.5)

    tree, _ = grow(policy, 3, context_for([3]), expand)
    depths = [len(path) for path in paths_of(tree, 0)]
    assert depths.count(1) == 2
    assert depths.count(2) == 4 if children == "top_k" else depths.count(2) > 0
    assert depths.count(3) == 0


def test_threshold_is_confident_of_as_many_as_can_pass() -> None:
    """Ten nodes of a tenth each, though their sum is not 1 to the last bit."""
    policy = Threshold(threshold=0.1 - 1e-9, budget=40, width=10, depth=2)

    def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
        shape = (*frontier.tokens.shape, 10)
        probs = [0.1 if frontier.level == 0 else 1.0] + [0.1 * (frontier.level == 0)] * 9
        return torch.arange(10).expand(shape), torch.tensor(probs).expand(shape)

    tree, _ = grow(policy, 2, context_for([3]), expand)
    assert tree.size.tolist() == [21]
