"""Growing trees: the invariants every drafter gets from `grow`, the policies, and drafter=ngram.

A scripted drafter answers from tables of random distributions keyed by the path from the root, so
what a tree should look like can be worked out without any of the code that grows it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from specdec.drafters.growth import Frontier, grow, levels_of
from specdec.drafters.host import HostDrafter, Trie
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams, uniforms
from specdec.tree import Acceptance, Proposal, TokenTree
from tests.decoding import prepared

VOCAB = 6
CHILDREN = ("top_k", "sample", "sample_with_replacement")
Path = tuple[int, ...]


class Script:
    """A drafter's `expand` that looks distributions up by path and notes what it was asked.

    Args:
        roots: last committed token of each row; a row's tables depend on it.
        support: tokens with probability above zero; the last of the candidates are void.
        candidates: K, how many tokens an answer lists.
    """

    def __init__(
        self, roots: Sequence[int], *, support: int = VOCAB, candidates: int = VOCAB
    ) -> None:
        self.roots, self.support, self.candidates = roots, support, candidates
        self.paths: list[list[Path]] = [[] for _ in roots]  # by number of expanded node
        self.levels: list[int] = []

    def table(self, root: int, path: Path) -> list[tuple[int, float]]:
        """(token, probability), most probable first; sums to 1."""
        generator = np.random.default_rng([root, *(token + 1 for token in path)])
        probs = np.sort(generator.dirichlet(np.full(self.support, 0.8)))[::-1]
        tokens = generator.permutation(VOCAB)[: self.support]
        chosen = probs[: self.candidates] / probs[: self.candidates].sum()
        return [(int(t), float(p)) for t, p in zip(tokens, chosen, strict=False)]

    def __call__(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        batch, count = frontier.tokens.shape
        assert frontier.level == len(self.levels)
        assert frontier.first == len(self.paths[0])
        assert len(self.roots) == batch
        self.levels.append(count)
        ids = torch.zeros(batch, count, self.candidates, dtype=torch.int64)
        probs = torch.zeros(batch, count, self.candidates, dtype=torch.float64)
        for row in range(batch):
            for place in range(count):
                token = int(frontier.tokens[row, place])
                parent = int(frontier.parents[row, place])
                if frontier.level == 0:
                    assert (token, parent) == (self.roots[row], -1)
                    path: Path = ()
                else:
                    assert 0 <= parent < frontier.first
                    path = (*self.paths[row][parent], token)
                self.paths[row].append(path)
                for slot, (token, p) in enumerate(self.table(self.roots[row], path)):
                    ids[row, place, slot], probs[row, place, slot] = token, p
        return ids, probs


def context_for(roots: Sequence[int], *, seed: int = 0, step: int = 0) -> StepContext:
    """The root is also the number of the sequence."""

    def draws(stream: int, count: int) -> Tensor:
        return uniforms(seed, list(roots), [step] * len(roots), stream, count)

    return StepContext(
        sequences=[],
        roots=torch.tensor(list(roots)),
        sampling=SamplingParams(temperature=1.0),
        uniforms=draws,
    )


def grown(
    policy: TreePolicy, roots: Sequence[int], *, seed: int = 0, **script: int
) -> tuple[TokenTree, Tensor, Script]:
    expand = Script(roots, **script)
    levels = levels_of(policy, None)
    tree, expanded = grow(policy, levels, context_for(roots, seed=seed), expand)
    return tree, expanded, expand


def paths_of(tree: TokenTree, row: int) -> list[Path]:
    """The path of each real node, in the order of nodes."""
    found: list[Path] = []
    for node in range(int(tree.size[row])):
        parent = int(tree.parents[row, node])
        token = int(tree.tokens[row, node])
        found.append(() if node == 0 else (*found[parent], token))
    return found


def row_of(tree: TokenTree, row: int) -> list[object]:
    """All there is to know about one row, padding cut off."""
    size = int(tree.size[row])
    assert tree.proposal is not None
    support = tree.proposal.probs[row, :size] > 0
    return [
        tree.tokens[row, :size].tolist(),
        tree.parents[row, :size].tolist(),
        tree.proposal.probs[row, :size].tolist(),
        tree.proposal.ids[row, :size].masked_fill(~support, -1).tolist(),
    ]


POLICIES: dict[str, Callable[[str], TreePolicy]] = {
    "chain": lambda children: Chain(budget=4, children=children),
    "static": lambda children: Static(widths=[3, 2, 1], children=children),
    "static_wide": lambda children: Static(widths=[9, 8], children=children),
    "dynamic": lambda children: Dynamic(budget=9, width=3, depth=4, children=children),
    "dynamic_small": lambda children: Dynamic(budget=2, width=4, depth=5, children=children),
    "dynamic_one": lambda children: Dynamic(budget=1, width=4, depth=5, children=children),
}


# Trees of any policy


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


# Policies


@pytest.mark.parametrize("widths", [[1], [4], [2, 2], [3, 2, 1], [1, 5, 1, 2]])
@pytest.mark.parametrize("children", CHILDREN)
def test_static_gives_every_node_the_children_of_its_level(
    widths: list[int], children: str
) -> None:
    """All but a token drawn again among its siblings, which no rule would ever enter."""
    tree, _, _ = grown(Static(widths=widths, children=children), (7, 8))
    full = [int(np.prod(widths[: level + 1])) for level in range(len(widths))]
    assert Static(widths=widths).budget == sum(full)
    for row in range(2):
        paths = paths_of(tree, row)
        parents = tree.parents[row].tolist()
        for node, path in enumerate(paths):
            repeated = path in paths[:node]
            expected = 0 if repeated or len(path) == len(widths) else widths[len(path)]
            assert parents.count(node) == expected
        if children != "sample_with_replacement":
            assert np.bincount([len(path) for path in paths]).tolist() == [1, *full]


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_widths_beyond_the_support_give_fewer_nodes(children: str) -> None:
    tree, _, _ = grown(Static(widths=[4, 5], children=children), (7,), support=2)
    tree.check()
    assert int(tree.size[0]) == 1 + 2 + 4
    cut, _, _ = grown(Static(widths=[4, 5], children=children), (7,), candidates=3)
    cut.check()
    assert int(cut.size[0]) == 1 + 3 + 9


def test_chain_follows_the_most_probable_token() -> None:
    tree, _, script = grown(Chain(budget=5, children="top_k"), (7,))
    path: Path = ()
    while len(path) < 5:
        path = (*path, script.table(7, path)[0][0])
    assert paths_of(tree, 0)[-1] == path
    assert tree.size.tolist() == [6]


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
    ("build", "message"),
    [
        (lambda: Chain(budget=-1), "tree.budget=-1: must be 0"),
        (lambda: Chain(budget=2, children="best"), "tree.children=best: must be one of .*top_k"),
        (lambda: Static(widths=[]), r"tree.widths=\[\]: must be a list"),
        (lambda: Static(widths=[2, 0]), r"tree.widths=\[2, 0\]: must be a list"),
        (
            lambda: Static(widths=[2, 2], budget=5),
            r"tree.widths=\[2, 2\]: 6 nodes exceed tree.budget=5",
        ),
        (lambda: Static(widths=[2], budget=-1), "tree.budget=-1|tree.widths"),
        (
            lambda: Static(widths=[2, 2]).levels(1),
            r"drafter.depth=1: tree.widths=\[2, 2\] has 2 levels",
        ),
        (lambda: Dynamic(budget=-3), "tree.budget=-3"),
        (lambda: Dynamic(budget=3, width=0), "tree.width=0: must be at least 1"),
        (lambda: Dynamic(budget=3, depth=0), "tree.depth=0: must be at least 1"),
        (lambda: Dynamic(budget=3, children="x"), "tree.children=x"),
        (lambda: NGram(depth=0), "drafter.depth=0: must be at least 1"),
        (lambda: NGram(candidates=0), "drafter.candidates=0: must be at least 1"),
        (lambda: NGram(min_match=0), "drafter.min_match=0"),
        (
            lambda: NGram(min_match=4, max_match=3),
            "drafter.min_match=4, drafter.max_match=3",
        ),
        (lambda: NGram(matches=0), "drafter.matches=0"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# TokenTree and Acceptance


def small_tree(**changes: object) -> TokenTree:
    """0 - 1 - 3 and 0 - 2, then padding; the second row is idle, the third a bare root."""
    parts: dict[str, object] = {
        "tokens": torch.tensor([[5, 1, 2, 1, 0], [0] * 5, [3, 0, 0, 0, 0]]),
        "parents": torch.tensor(
            [[-1, 0, 0, 1, -2], [-2] * 5, [-1, -2, -2, -2, -2]], dtype=torch.int32
        ),
        "size": torch.tensor([4, 0, 1], dtype=torch.int32),
        "depth": 2,
    }
    return TokenTree(**(parts | changes))  # type: ignore[arg-type]


def parents_with(row: int, node: int, parent: int) -> Tensor:
    parents = small_tree().parents.clone()
    parents[row, node] = parent
    return parents


def test_a_valid_tree_passes_its_check() -> None:
    small_tree().check()
    small_tree(depth=7).check()
    TokenTree.roots(torch.tensor([4, 2])).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parents": parents_with(0, 4, 0)}, "row 0, node 4: padding must have parent -2, not 0"),
        ({"parents": parents_with(1, 0, -1)}, "row 1, node 0: padding must have parent -2"),
        ({"parents": parents_with(0, 3, 3)}, "row 0, node 3: parent 3 is not an earlier node"),
        ({"parents": parents_with(0, 1, 2)}, "row 0, node 1: parent 2 is not an earlier node"),
        ({"parents": parents_with(0, 1, -1)}, "row 0, node 1: parent -1 is not"),
        ({"parents": parents_with(0, 2, -2)}, "row 0, node 2: parent -2 is not"),
        ({"parents": parents_with(0, 0, 0)}, "row 0, node 0: parent 0 is not"),
        ({"parents": parents_with(2, 0, -2)}, "row 2, node 0: parent -2 is not"),
        ({"depth": 1}, "row 0, node 3: depth 2 exceeds 1"),
        ({"size": torch.tensor([6, 0, 1])}, "row 0: size 6 of 5 nodes"),
        ({"size": torch.tensor([4, -1, 1])}, "row 1: size -1 of 5 nodes"),
        ({"size": torch.tensor([4, 0])}, "disagree in shape"),
        ({"tokens": torch.zeros(3, 4).long()}, "disagree in shape"),
        (
            {"tokens": torch.tensor([[5, 1, 1, 1, 0], [0] * 5, [3, 0, 0, 0, 0]])},
            "row 0, node 2: token 1 is already a child of node 0",
        ),
    ],
)
def test_check_names_the_violation(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        small_tree(**changes).check()


@pytest.mark.parametrize("children", CHILDREN)
def test_equal_siblings_are_legal_only_with_replacement(children: str) -> None:
    proposal = Proposal(
        ids=torch.zeros(3, 5, 1).long(), probs=torch.zeros(3, 5, 1), children=children
    )
    tokens = torch.tensor([[5, 1, 1, 1, 0], [0] * 5, [3, 0, 0, 0, 0]])
    tree = small_tree(tokens=tokens, proposal=proposal)
    if children == "sample_with_replacement":
        tree.check()
        return
    with pytest.raises(RuntimeError, match="already a child"):
        tree.check()


def test_roots_alone() -> None:
    tree = TokenTree.roots(torch.tensor([4, 2]))
    assert tree.tokens.tolist() == [[4], [2]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert tree.size.tolist() == [1, 1]
    assert tree.parents.dtype == torch.int32
    assert (tree.depth, tree.nodes, tree.proposal) == (0, 1, None)
    drafted = NoDrafter().draft(context_for([4, 2]))
    assert drafted.tokens.tolist() == [[4], [2]]


def test_new_tokens_are_the_path_without_the_root_and_the_next_token() -> None:
    tree = small_tree(
        tokens=torch.tensor([[5, 1, 2, 7, 0], [0, 0, 0, 0, 0], [3, 8, 9, 6, 6]]),
        parents=torch.tensor([[-1, 0, 0, 1, -2], [-2] * 5, [-1, 0, 1, 2, 0]], dtype=torch.int32),
        size=torch.tensor([4, 0, 5], dtype=torch.int32),
        depth=3,
    )
    tree.check()
    acceptance = Acceptance(
        path=torch.tensor([[0, 1, 3, 0], [0, 0, 0, 0], [0, 1, 2, 3]]),
        length=torch.tensor([3, 0, 4]),
        next_token=torch.tensor([50, 60, 70]),
    )
    rows = acceptance.new_tokens(tree).tolist()
    assert [row[:n] for row, n in zip(rows, [3, 0, 4], strict=True)] == [
        [1, 7, 50],
        [],
        [8, 9, 6, 70],
    ]
    bare = replace(acceptance, length=torch.tensor([1, 1, 2]))
    assert [row[:n] for row, n in zip(bare.new_tokens(tree).tolist(), [1, 1, 2], strict=True)] == [
        [50],
        [60],
        [8, 70],
    ]


# Host drafters and drafter=ngram


def decoding(tokens: Sequence[int], row: int = 0, number: int = 0) -> Decoding:
    request = Request(id=number, prompt_ids=list(tokens), max_new_tokens=8)
    return Decoding(request, row, list(tokens))


def step_for(sequences: list[Decoding]) -> StepContext:
    return replace(
        context_for([sequence.request.id for sequence in sequences]),
        sequences=sequences,
        roots=torch.tensor([sequence.tokens[-1] for sequence in sequences]),
    )


class Listed(HostDrafter):
    """Proposes what it was told, by row."""

    proposals: list[list[tuple[list[int], float]]]

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        return [(path[:levels], weight) for path, weight in self.proposals[sequence.row]]


@pytest.mark.parametrize("children", CHILDREN)
def test_host_drafters_grow_from_shares_of_the_weights(children: str) -> None:
    drafter = prepared(Listed(), Static(widths=[2, 2], children=children))
    drafter.proposals = [
        [([1, 2], 3.0), ([1, 3], 1.0), ([2, 0], 4.0), ([5], 2.0)],
        [],
        [([4], 1.0)],
    ]
    sequences = [decoding([9, row], row=row, number=row) for row in range(3)]
    tree = drafter.draft(step_for(sequences))
    tree.check()
    assert tree.proposal is not None
    shares = {1: 0.4, 2: 0.4, 5: 0.2} if children != "top_k" else {1: 0.5, 2: 0.5}
    pairs = zip(tree.proposal.ids[0, 0].tolist(), tree.proposal.probs[0, 0].tolist(), strict=True)
    assert {token: p for token, p in pairs if p} == pytest.approx(shares)
    assert tree.size[1] == 1
    known = {(), (1,), (1, 2), (1, 3), (2,), (2, 0), (5,)}
    assert set(paths_of(tree, 0)) <= known
    assert set(paths_of(tree, 2)) == {(), (4,)}
    if children == "top_k":
        assert set(paths_of(tree, 0)) == known - {(5,)}


def test_trie_merges_common_beginnings() -> None:
    trie = Trie()
    for path, weight in [([1, 2], 1.0), ([3], 2.5), ([1, 4], 2.0), ([5], 2.5)]:
        trie.add(path, weight)
    assert trie.best(9) == [(1, 3.0 / 8.0), (3, 2.5 / 8.0), (5, 2.5 / 8.0)]
    assert trie.best(2) == [(1, 3.0 / 5.5), (3, 2.5 / 5.5)]
    assert trie.children[1].best(9) == [(4, 2.0 / 3.0), (2, 1.0 / 3.0)]
    assert trie.children[3].best(9) == []


def naive_continuations(
    tokens: list[int],
    levels: int,
    *,
    min_match: int,
    max_match: int,
    matches: int,
    scanned: int,
    factor: float,
) -> list[tuple[list[int], float]]:
    """By looking at every earlier place in the text."""
    found = []
    for end in range(1, len(tokens)):
        lengths = [
            n for n in range(1, min(end, max_match) + 1) if tokens[end - n : end] == tokens[-n:]
        ]
        if max(lengths, default=0) >= min_match:
            found.append((max(lengths), end))
    best = sorted(found[-scanned:], reverse=True)[:matches]
    return [
        (tokens[end : end + min(levels, int(factor * length))], 2.0**length)
        for length, end in best
    ]


streams = st.lists(st.integers(0, 2), min_size=1, max_size=60) | st.builds(
    lambda part, times, tail: part * times + tail,
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.integers(1, 30),
    st.lists(st.integers(0, 3), max_size=4),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=streams,
    min_match=st.integers(1, 3),
    longer=st.integers(0, 5),
    matches=st.integers(1, 9),
    levels=st.integers(1, 5),
    factor=st.sampled_from([1.0, 1.5, 2.0, 9.0]),
)
def test_ngram_finds_the_longest_and_latest_matches(
    tokens: list[int], min_match: int, longer: int, matches: int, levels: int, factor: float
) -> None:
    settings_ = {"min_match": min_match, "max_match": min_match + longer, "matches": matches}
    drafter = NGram(max_spec_factor=factor, **settings_)
    sequence = decoding(tokens)
    drafter.start([sequence])
    found = [(list(path), weight) for path, weight in drafter.propose(sequence, levels)]
    expected = naive_continuations(
        tokens, levels, **settings_, scanned=NGram.SCANNED, factor=factor
    )
    assert found == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=streams, cuts=st.lists(st.integers(1, 6), max_size=8), min_match=st.integers(1, 3))
def test_ngram_index_of_a_growing_text_is_that_of_the_whole(
    tokens: list[int], cuts: list[int], min_match: int
) -> None:
    growing = NGram(min_match=min_match)
    start = max(1, len(tokens) - sum(cuts))
    sequence = decoding(tokens[:start])
    growing.start([sequence])
    for cut in [0, *cuts]:
        sequence.tokens += tokens[len(sequence.tokens) : len(sequence.tokens) + cut]
        fresh = NGram(min_match=min_match)
        fresh.start([sequence])
        expected = list(fresh.propose(sequence, 4))
        assert list(growing.propose(sequence, 4)) == expected
        assert list(growing.propose(sequence, 4)) == expected


def test_ngram_drafts_what_followed_last_time() -> None:
    drafter = prepared(NGram(), Chain(budget=3, children="top_k"))
    sequences = [
        decoding([1, 2, 3, 4, 5, 6, 1, 2, 3], row=1, number=10),
        decoding([7, 8, 9], row=0, number=11),
        decoding([0, 5, 0, 5], row=2, number=12),
    ]
    drafter.start(sequences)
    tree = drafter.draft(step_for(sequences))
    tree.check()
    assert paths_of(tree, 0)[-1] == (4, 5, 6)
    assert tree.size.tolist() == [4, 1, 3]
    assert paths_of(tree, 2)[-1] == (0, 5)


@pytest.mark.parametrize("children", CHILDREN)
def test_ngram_rows_do_not_hear_of_each_other(children: str) -> None:
    tree_policy = Static(widths=[2, 2, 1], children=children)
    texts = [[1, 2, 3, 1, 2, 4, 1, 2], [3, 1, 3, 1, 0, 3, 1], [2, 2, 2, 2, 2]]
    together = prepared(NGram(), tree_policy)
    sequences = [decoding(text, row=row, number=row) for row, text in enumerate(texts)]
    together.start(sequences)
    batch = together.draft(step_for(sequences))
    for row, text in enumerate(texts):
        alone = prepared(NGram(), tree_policy)
        sequence = decoding(text, row=0, number=row)
        alone.start([sequence])
        assert row_of(alone.draft(step_for([sequence])), 0) == row_of(batch, row)


def test_ngram_forgets_a_row_that_has_finished() -> None:
    drafter = prepared(NGram(), Chain(budget=3))
    first = decoding([1, 2, 3, 1, 2, 4, 1, 2], row=0)
    drafter.start([first])
    assert list(drafter.propose(first, 3))
    drafter.finish(first)
    second = decoding([9, 9, 5, 1, 2], row=0, number=1)
    drafter.start([second])
    assert list(drafter.propose(second, 3)) == []
    assert drafter.draft(step_for([second])).nodes == 1


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


def test_ngram_scans_only_the_latest_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer match that lies too far back is not found."""
    monkeypatch.setattr(NGram, "SCANNED", 3)
    far = [0, 8, 1, 2, 3]
    near = [[7, 1, 2, 4], [6, 1, 2, 5], [5, 1, 2, 6]]
    tokens = [*far, *(token for part in near for token in part), 0, 8, 1, 2]
    drafter = NGram(matches=8)
    sequence = decoding(tokens)
    drafter.start([sequence])
    assert [path for path, _ in drafter.propose(sequence, 1)] == [[6], [5], [4]]


# --- trees made by the host, brought to a size


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_padding_adds_nothing_but_padding(data: st.DataObject) -> None:
    batch, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    parents = torch.tensor(
        [[-1, *(data.draw(st.integers(0, i)) for i in range(nodes - 1))] for _ in range(batch)]
    ).int()
    tokens = torch.arange(batch * nodes).view(batch, nodes)
    proposal = None
    if data.draw(st.booleans()):
        shape = batch, nodes, data.draw(st.integers(1, 3))
        proposal = Proposal(
            ids=torch.randint(9, shape), probs=torch.rand(shape), children="sample"
        )
    size = torch.full((batch,), nodes, dtype=torch.int32)
    tree = TokenTree(tokens=tokens, parents=parents, size=size, depth=nodes - 1, proposal=proposal)
    tree.check()
    rows, columns = batch + data.draw(st.integers(0, 2)), nodes + data.draw(st.integers(0, 4))
    padded = tree.padded(rows, columns)
    padded.check()
    assert padded.tokens.shape == (rows, columns)
    assert padded.depth == columns - 1
    assert padded.size.tolist() == [nodes] * batch + [0] * (rows - batch)
    for mine, theirs in zip(tree.tensors(), padded.tensors(), strict=True):
        inside = tuple(slice(0, n) for n in mine.shape)
        assert torch.equal(theirs[inside], mine)
    assert (padded.parents == -2).sum() == rows * columns - batch * nodes
    copy = padded.to(torch.device("cpu"))
    for mine, theirs in zip(copy.tensors(), padded.tensors(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
