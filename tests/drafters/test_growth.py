"""Growing trees: the invariants every drafter gets from `grow`, whatever the policy."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from specdec.drafters.growth import Frontier, grow
from specdec.drafters.ngram import NGram
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.paths import Paths
from specdec.drafters.trees.static import Static
from specdec.drafters.trees.threshold import Threshold
from specdec.protocols import TreePolicy, levels_of
from specdec.sampling import uniforms
from tests.decoding import prepared
from tests.drafters.scripted import (
    CHILDREN,
    VOCAB,
    Script,
    context_for,
    decoding,
    grown,
    paths_of,
    row_of,
    step_for,
)

POLICIES: dict[str, Callable[[str], TreePolicy]] = {
    "chain": lambda children: Chain(budget=4, children=children),
    "static": lambda children: Static(widths=[3, 2, 1], children=children),
    "static_wide": lambda children: Static(widths=[9, 8], children=children),
    "dynamic": lambda children: Dynamic(budget=9, width=3, depth=4, children=children),
    "dynamic_small": lambda children: Dynamic(budget=2, width=4, depth=5, children=children),
    "dynamic_one": lambda children: Dynamic(budget=1, width=4, depth=5, children=children),
}


@pytest.mark.parametrize("children", CHILDREN)
@pytest.mark.parametrize("roots", [(3,), (3, 1, 4)], ids=["alone", "three"])
@pytest.mark.parametrize("support", [VOCAB, 2], ids=["full", "two_tokens"])
@pytest.mark.parametrize("name", POLICIES)
def test_trees_are_valid_and_say_how_they_were_drawn(
    name: str, roots: tuple[int, ...], support: int, children: str
) -> None:
    policy = POLICIES[name](children)
    tree, expanded, script = grown(policy, roots, support=support)
    tree.check()
    assert tree.depth <= levels_of(policy, None)
    assert len(script.levels) == policy.levels(None)
    assert (tree.size - 1 <= policy.budget).all()
    assert (tree.size > 1).all()
    assert tree.nodes == int(tree.size.max())
    proposal = tree.proposal
    assert proposal is not None
    assert proposal.children == children
    for row, root in enumerate(roots):
        paths = paths_of(tree, row)
        assert tree.tokens[row, 0] == root
        parents = set(tree.parents[row].tolist()) - {-1, -2}
        for node in range(tree.nodes):
            number = int(expanded[row, node])
            probs = proposal.probs[row, node]
            if node >= len(paths) or number < 0:
                assert number == -1
                assert node not in parents
                assert (probs == 0).all()
                continue
            assert script.paths[row][number] == paths[node]
            pairs = zip(proposal.ids[row, node].tolist(), probs.tolist(), strict=True)
            found = [(token, p) for token, p in pairs if p > 0]
            listed = script.table(root, paths[node])
            assert len(found) == len(listed)
            assert dict(found) == pytest.approx(dict(listed))
            assert float(probs.sum()) == pytest.approx(1.0)
        for node in range(1, len(paths)):
            parent = int(tree.parents[row, node])
            assert int(expanded[row, parent]) >= 0
            assert expanded[row, node] == -1 or expanded[row, node] > expanded[row, parent]
            here = proposal.ids[row, parent] == tree.tokens[row, node]
            assert float(proposal.probs[row, parent][here].sum()) > 0


@pytest.mark.parametrize("children", CHILDREN)
@pytest.mark.parametrize("name", POLICIES)
def test_a_row_of_a_batch_is_the_row_alone(name: str, children: str) -> None:
    roots = (5, 2, 9)
    policy = POLICIES[name](children)
    together = grown(policy, roots)
    again = grown(policy, roots)
    for row, root in enumerate(roots):
        alone = grown(policy, (root,))
        size = int(alone[0].size[0])
        assert row_of(together[0], row) == row_of(alone[0], 0)
        assert together[1][row, :size].tolist() == alone[1][0, :size].tolist()
        assert row_of(together[0], row) == row_of(again[0], row)


@pytest.mark.parametrize("children", CHILDREN)
def test_only_sampled_children_depend_on_the_uniforms(children: str) -> None:
    policy = Static(widths=[2, 2], children=children)
    trees = [row_of(grown(policy, (3,), seed=seed)[0], 0) for seed in range(6)]
    assert (len({str(tree) for tree in trees}) == 1) == (children == "top_k")


@pytest.mark.parametrize("children", CHILDREN)
def test_siblings_stand_in_the_order_they_are_tried(children: str) -> None:
    tree, _, script = grown(Static(widths=[4], children=children), (3,))
    tokens = tree.tokens[0, 1:].tolist()
    table = script.table(3, ())
    if children == "top_k":
        assert tokens == [token for token, _ in table[:4]]
        return
    numbers = uniforms(0, [3], [0], 2, 4 * VOCAB)[0].tolist()
    if children == "sample":
        arrival = {t: -np.log1p(-u) / p for (t, p), u in zip(table, numbers, strict=False)}
        assert tokens == sorted(arrival, key=lambda token: arrival[token])[:4]
        return
    for draw in range(4):
        mine = numbers[draw * VOCAB : (draw + 1) * VOCAB]
        arrival = {t: -np.log1p(-u) / p for (t, p), u in zip(table, mine, strict=True)}
        assert tokens[draw] == min(arrival, key=lambda token: arrival[token])


@pytest.mark.parametrize("children", CHILDREN[1:])
def test_children_are_drawn_from_the_proposal(children: str) -> None:
    """First and second child of 20,000 roots, and the child of the first, against their law."""
    table = [0.55, 0.3, 0.15]
    below = [0.2, 0.1, 0.7]

    def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
        shape = (*frontier.tokens.shape, 3)
        if frontier.level == 0:
            return torch.arange(3).expand(shape), torch.tensor(table).double().expand(shape)
        order = torch.tensor([2, 0, 1])
        return order.expand(shape), torch.tensor(below).double()[order].expand(shape)

    rows = 20_000
    numbers = torch.tensor(np.random.default_rng(1).random((8, rows, 40)))

    def draws(stream: int, count: int) -> Tensor:
        return numbers[stream, :, :count]

    context = replace(context_for([0]), roots=torch.zeros(rows).long(), uniforms=draws)
    tree, _ = grow(Static(widths=[2, 1], children=children), 2, context, expand)
    repeated = tree.tokens[:, 1] == tree.tokens[:, 2]
    assert torch.equal(tree.size, 5 - repeated.int())
    assert (tree.parents[:, :4] == torch.tensor([-1, 0, 0, 1])).all()
    observed = np.zeros((3, 3, 3))
    np.add.at(observed, tuple(tree.tokens[:, 1:4].T.numpy()), 1)
    law = np.zeros((3, 3, 3))
    for first, second, third in np.ndindex(3, 3, 3):
        if children == "sample" and first == second:
            continue
        left = 1.0 if children == "sample_with_replacement" else 1 - table[first]
        law[first, second, third] = table[first] * table[second] / left * below[third]
    assert (observed[law == 0] == 0).all()
    assert stats.chisquare(observed[law > 0], law[law > 0] * rows).pvalue > 1e-6


def test_how_sure_a_drafter_is_decides_how_many_children_are_drawn() -> None:
    """And nothing else: what is proposed and drawn keeps its law."""
    table, below = torch.tensor([[0.55, 0.3, 0.15], [0.7, 0.2, 0.1]], dtype=torch.float64)

    def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
        shape = (*frontier.tokens.shape, 3)
        probs = below if frontier.level else table
        return torch.arange(3).expand(shape), probs.expand(shape)

    def sure(frontier: Frontier) -> Tensor:
        """Of nothing after token 1."""
        doubt = (frontier.tokens == 1) & (frontier.level > 0)
        return torch.where(doubt, 0.01, 1.0).double()

    rows = 20_000
    numbers = torch.tensor(np.random.default_rng(2).random((8, rows, 40)))
    context = replace(
        context_for([0]),
        roots=torch.zeros(rows).long(),
        uniforms=lambda stream, count: numbers[stream, :, :count],
    )
    policy = Threshold(threshold=0.05, budget=8, width=2, depth=2, children="sample")
    tree, _ = grow(policy, 2, context, expand, sure=sure)
    assert tree.proposal is not None
    law = tree.proposal.probs[:, 0].double()
    assert torch.equal(law, table.expand(rows, -1))
    parent = tree.tokens.gather(1, tree.parents.clamp(min=0))  # tokens of parents
    deep = tree.parents > 0
    for token, count in ((0, 2), (1, 0), (2, 1)):  # 0.15 * 0.2 does not pass
        mine = (tree.tokens[:, 1:3] == token).any(1)
        children = (deep & (parent == token)).sum(1)
        assert (children[mine] == count).all()
    first = tree.tokens[:, 1].bincount(minlength=3)
    assert stats.chisquare(first.numpy(), table.numpy() * rows).pvalue > 1e-6
    eldest = torch.tensor(
        [row[3] for row, at in zip(tree.tokens.tolist(), deep.tolist(), strict=True) if at[3]]
    ).bincount(minlength=3)
    expected = below.numpy() * int(eldest.sum())
    assert stats.chisquare(eldest.numpy(), expected).pvalue > 1e-6


def test_depth_of_the_drafter_and_of_the_policy() -> None:
    assert Chain(budget=5).levels(None) == 5
    assert Chain(budget=5).levels(3) == 3
    assert Chain(budget=5).levels(9) == 5
    assert Static(widths=[2, 1]).levels(None) == 2
    assert Static(widths=[2, 1]).levels(4) == 2
    assert Dynamic(budget=9, depth=4).levels(None) == 4
    assert Dynamic(budget=9, depth=4).levels(6) == 6
    assert Dynamic(budget=2, depth=4).levels(None) == 2
    for policy in (Chain(budget=0), Static(widths=[2, 1], budget=0), Dynamic(budget=0)):
        assert levels_of(policy, None) == 0


@pytest.mark.parametrize(
    "policy",
    [Chain(budget=0), Static(widths=[2, 2], budget=0), Dynamic(budget=0)],
    ids=lambda policy: type(policy).__name__,
)
def test_a_budget_of_zero_drafts_roots_alone(policy: TreePolicy) -> None:
    drafter = prepared(NGram(), policy)
    sequences = [decoding([1, 2, 1, 2, 1, 2], row=row, number=row) for row in range(2)]
    drafter.start(sequences)
    tree = drafter.draft(step_for(sequences))
    tree.check()
    assert tree.tokens.tolist() == [[2], [2]]
    assert tree.size.tolist() == [1, 1]


SHARED: dict[str, Callable[[str], TreePolicy]] = POLICIES | {
    "paths": lambda children: Paths(
        paths=[[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0], [0, 1, 0]], children=children
    )
}


@pytest.mark.parametrize("children", CHILDREN)
@pytest.mark.parametrize("name", SHARED)
def test_a_policy_may_be_shared_by_drafts_that_take_turns(name: str, children: str) -> None:
    """One of six candidates at each node and, between its levels, others of two."""
    policy = SHARED[name](children)
    narrow = []

    class Interrupted(Script):
        def __call__(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
            narrow.append(row_of(grown(policy, (3,), candidates=2)[0], 0))
            return super().__call__(frontier)

    levels = levels_of(policy, None)
    tree, _ = grow(policy, levels, context_for((3,)), Interrupted((3,)))
    assert row_of(tree, 0) == row_of(grown(SHARED[name](children), (3,))[0], 0)
    alone = row_of(grown(SHARED[name](children), (3,), candidates=2)[0], 0)
    assert narrow == [alone] * levels
