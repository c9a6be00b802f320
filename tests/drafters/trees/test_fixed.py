"""Trees of one shape: grown of top-k and sampled children, of few candidates, on the host."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from torch import Tensor

from specdec.drafters.growth import Frontier, grow
from specdec.drafters.host import Trie
from specdec.drafters.trees import fixed
from specdec.drafters.trees.accuracy import Accuracy
from specdec.drafters.trees.cost_aware import CostAware
from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.paths import Paths
from specdec.drafters.trees.shapes import (
    Node,
    Shape,
    optimal,
    ordered,
    parents_by_level,
    shape_of,
)
from specdec.drafters.trees.static import Static
from specdec.drafters.trees.threshold import Threshold
from specdec.protocols import levels_of
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
from tests.drafters.trees.measured import rates_of

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
