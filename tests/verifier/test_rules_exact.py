"""The law of what the acceptance rules emit, worked out by enumeration.

`experiments/studies/rule_laws.py` lists all trees a drafter could draw in a tiny world, and all
ways the coins of a rule could fall; the tokens that come out must then follow the target. What
holds of single rules is in `test_acceptance_rules.py`, the real loop in `test_loop.py`.
"""

import itertools

import numpy as np
import pytest
import torch

from specdec.experiments.studies.rule_laws import (
    BELOW_ONE,
    ROOT_TOKEN,
    Counts,
    DrawnTree,
    Table,
    Tokens,
    coin_chances,
    context_for,
    dirichlet_table,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    target_at_nodes,
    token_trees,
    widths,
)
from specdec.protocols import AcceptanceRule
from specdec.sampling import SamplingParams, draw, probabilities
from specdec.tree import Proposal, TokenTree
from specdec.verifier.coins import CoinRule
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.support import SupportRule
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.typical import Typical
from tests.verifier.laws import (
    RULES,
    depth_first,
    draws_of,
    logits_table,
    naive_probabilities,
    shaped,
    split_table,
)

# The law of what comes out


def assert_lossless(
    rule: CoinRule, trees: list[DrawnTree], tree: TokenTree, target: Table, count: int = 2
) -> None:
    """The first `count` tokens of the step follow the target to nine digits."""
    law = extend_law(emitted_law(rule, trees, tree, target), target, count)
    assert distance(law, extend_law({(): 1.0}, target, count)) < 1e-9


VOCAB = 4
WORLDS: dict[str, tuple[Table, Table]] = {
    "unrelated": (dirichlet_table(1, VOCAB), dirichlet_table(2, VOCAB)),
    "zeros": (dirichlet_table(3, VOCAB, zeros=1), dirichlet_table(4, VOCAB, zeros=2)),
    "sparse": (dirichlet_table(5, VOCAB, zeros=2), dirichlet_table(6, VOCAB, zeros=1)),
    "equal": (dirichlet_table(7, VOCAB), dirichlet_table(7, VOCAB)),
    "disjoint": (split_table(VOCAB, low=True), split_table(VOCAB, low=False)),
}


def uneven(level: int, tokens: Tokens, place: int) -> int:
    """How many children a node has depends on its elders' level, never on its own draws."""
    return 2 if level == 0 else (tokens[0] + place) % 3


def no_children_of_repeats(level: int, tokens: Tokens, place: int) -> int:
    """A token drawn again among its siblings is not grown further."""
    return 2 if level == 0 or tokens[place] not in tokens[:place] else 0


SHAPES: dict[str, tuple[Counts, int]] = {
    "one": (widths(1), 1),
    "three": (widths(3), 1),
    "chain": (widths(1, 1, 1), 3),
    "two_two": (widths(2, 2), 2),
    "uneven": (uneven, 2),
    "no_repeats": (no_children_of_repeats, 2),
}
DRAWN = [
    (shape, children)
    for shape in SHAPES
    for children in ("sample", "sample_with_replacement")
    if shape != "no_repeats" or children == "sample_with_replacement"
]


@pytest.mark.some(30)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("shape", "children"), DRAWN)
def test_recursive_rejection_is_lossless(world: str, shape: str, children: str) -> None:
    target, draft = WORLDS[world]
    trees = drawn_trees(*SHAPES[shape], draft, children)
    tree = token_trees(trees, draft, children, compact=world == "zeros")
    assert_lossless(RecursiveRejection(), trees, tree, target)


@pytest.mark.some(25)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("shape", "children"),
    [*DRAWN, *((shape, "top_k") for shape in SHAPES if shape != "no_repeats")],
)
def test_target_only_is_lossless(world: str, shape: str, children: str) -> None:
    target, draft = WORLDS[world]
    trees = drawn_trees(*SHAPES[shape], draft, children)
    tree = token_trees(trees, draft if children == "sample_with_replacement" else None, children)
    assert_lossless(TargetOnly(), trees, tree, target)


@pytest.mark.parametrize("rule", [TargetOnly(), RecursiveRejection()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_three_tokens_of_a_three_level_tree(rule: CoinRule, children: str) -> None:
    target, draft = dirichlet_table(11, 3), dirichlet_table(12, 3)
    trees = drawn_trees(widths(2, 1, 1), 3, draft, children)
    trees = [depth_first(tree) for tree in trees]
    assert_lossless(rule, trees, token_trees(trees, draft, children), target, count=3)


def test_large_vocabulary_of_deterministic_children() -> None:
    target, draft = dirichlet_table(13, 5), dirichlet_table(14, 5)
    trees = drawn_trees(widths(3, 2, 1), 3, draft, "top_k")
    order = depth_first(trees[0])
    for fixed in (trees[0], order):
        small = DrawnTree(1.0, fixed.tokens[:14], fixed.parents[:14], fixed.contexts[:14])
        assert_lossless(TargetOnly(), [small], token_trees([small], None), target, count=3)


@pytest.mark.parametrize("seed", range(4))
def test_five_tokens_with_an_uncut_and_a_cut_draft(seed: int) -> None:
    target = dirichlet_table(100 + seed, 5, zeros=seed % 2)
    draft = dirichlet_table(200 + seed, 5)

    def cut(context: Tokens) -> np.ndarray:
        probs = draft(context).copy()
        probs[np.argsort(probs)[:2]] = 0.0
        return probs / probs.sum()

    for table in (draft, cut):
        for children in ("sample", "sample_with_replacement"):
            trees = drawn_trees(widths(3), 1, table, children)
            tree = token_trees(trees, table, children, compact=True)
            assert_lossless(RecursiveRejection(), trees, tree, target)


@pytest.mark.some(24)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7),
        SamplingParams(temperature=1.0, top_k=2),
        SamplingParams(temperature=1.2, top_p=0.7),
        SamplingParams(temperature=0.9, top_k=3, top_p=0.8, min_p=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_lossless_under_sampling_parameters(rule: CoinRule, params: SamplingParams) -> None:
    target_logits, draft_logits = logits_table(21, VOCAB), logits_table(22, VOCAB)

    def warped(logits: Table) -> Table:
        return lambda context: probabilities(torch.tensor(logits(context)), params).numpy()

    def expected(context: Tokens) -> np.ndarray:
        return naive_probabilities(target_logits(context), params)

    target, draft = warped(target_logits), warped(draft_logits)
    for children in draws_of(rule):
        trees = drawn_trees(*shaped(rule, 2, 1), draft, children)
        law = emitted_law(rule, trees, token_trees(trees, draft, children), target)
        law = extend_law(law, expected, 2)
        assert distance(law, extend_law({(): 1.0}, expected, 2)) < 1e-9


@pytest.mark.some(4)
@pytest.mark.parametrize("children", ["top_k", "sample"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_temperature_zero_gives_the_argmax_path(rule: CoinRule, children: str) -> None:
    params = SamplingParams(temperature=0.0)
    logits, draft = logits_table(31, VOCAB), dirichlet_table(32, VOCAB)

    def target(context: Tokens) -> np.ndarray:
        return probabilities(torch.tensor(logits(context)), params).numpy()

    trees = drawn_trees(*shaped(rule, 2, 2), draft, children)
    law = emitted_law(rule, trees, token_trees(trees, draft, children), target)
    best: Tokens = ()
    while len(best) < 3:
        best = (*best, int(np.argmax(logits(best))))
    law = {tokens: mass for tokens, mass in law.items() if mass > 0}
    assert {tokens == best[: len(tokens)] for tokens in law} == {True}
    if children == "sample":
        assert {len(tokens) for tokens in law} == {1, 2, 3}


# What `accept` adds to `judge`


@pytest.mark.parametrize("rule", [Greedy(), *RULES, Typical()], ids=lambda rule: rule.name)
def test_accept_at_temperature_zero_follows_the_argmax(rule: AcceptanceRule) -> None:
    """Rows of several sizes at once; the expected path is found by a plain walk."""
    logits, draft = logits_table(41, VOCAB), dirichlet_table(42, VOCAB)
    trees = drawn_trees(uneven, 2, draft, "sample")
    tree = token_trees(trees, draft)
    accepted = rule.accept(
        context_for(SamplingParams(temperature=0.0), len(trees)),
        tree,
        target_at_nodes(trees, logits),
    )
    lengths = set()
    for row, drawn in enumerate(trees):
        path = [0]
        while True:
            token = int(np.argmax(logits(drawn.contexts[path[-1]])))
            wanted = (*drawn.contexts[path[-1]], token)
            if wanted not in drawn.contexts:
                break
            path.append(drawn.contexts.index(wanted))
        assert accepted.length[row] == len(path)
        assert accepted.path[row, : len(path)].tolist() == path
        assert accepted.next_token[row] == token
        lengths.add(len(path))
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_accept_flips_the_coins_it_is_given(rule: CoinRule) -> None:
    """One row per possible coin vector; what `accept` keeps is what `judge` keeps."""
    logits, draft = logits_table(43, VOCAB), dirichlet_table(44, VOCAB)
    params = SamplingParams(temperature=0.8, top_k=3)
    trees = drawn_trees(*shaped(rule, 2, 1), draft, "sample")
    tree, scores = token_trees(trees, draft), target_at_nodes(trees, logits)
    context = context_for(params, len(trees), seed=5)
    accepted = rule.accept(context, tree, scores)
    path, length, rest = rule.judge(
        tree, probabilities(scores, params), context.uniforms(0, tree.nodes)
    )
    assert torch.equal(accepted.path, path)
    assert torch.equal(accepted.length, length)
    assert torch.equal(accepted.next_token, draw(rest, context.uniforms(1, VOCAB)))
    assert len(set(length.tolist())) > 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rows_of_a_batch_are_judged_as_if_alone(rule: CoinRule) -> None:
    """A chain of four nodes and a bush (or a chain of three) in one padded batch."""
    target, draft = dirichlet_table(51, VOCAB), dirichlet_table(52, VOCAB)
    chain = drawn_trees(widths(1, 1, 1), 3, draft, "sample")[7]
    bush = drawn_trees(*shaped(rule, 3, 1), draft, "sample")[10]
    both = token_trees([chain, bush], draft)
    generator = np.random.default_rng(0)
    lengths = set()
    for _ in range(40):
        coins = torch.tensor(generator.random((2, both.nodes)))
        path, length, rest = rule.judge(both, target_at_nodes([chain, bush], target), coins)
        for row, drawn in enumerate([chain, bush]):
            alone, nodes = token_trees([drawn], draft), len(drawn.tokens)
            own = rule.judge(alone, target_at_nodes([drawn], target), coins[[row], :nodes])
            assert int(own[1]) == int(length[row])
            kept = int(length[row])
            assert own[0][0, :kept].tolist() == path[row, :kept].tolist()
            torch.testing.assert_close(own[2][0], rest[row], rtol=1e-12, atol=1e-15)
            lengths.add(kept)
    assert len(lengths) > 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_coin_accepts_below_the_chance_and_not_at_it(rule: CoinRule) -> None:
    target, draft = dirichlet_table(53, VOCAB), dirichlet_table(54, VOCAB)
    trees = drawn_trees(*shaped(rule, 2), draft, "sample")
    tree, at_nodes = token_trees(trees, draft), target_at_nodes(trees, target)
    coins = torch.full_like(at_nodes[..., 0], BELOW_ONE)
    chance = coin_chances(rule, tree, at_nodes, coins)
    coins[:, 1] = chance[:, 1]
    at = rule.judge(tree, at_nodes, coins)[1]
    coins[:, 1] = torch.nextafter(chance[:, 1], torch.zeros(()).double())
    below = rule.judge(tree, at_nodes, coins)[1]
    inner = ~chance[:, 1].isnan() & (chance[:, 1:].nan_to_num() < 1).all(1)
    assert inner.any()
    assert (at[inner] == 1).all()
    assert (below[inner] == 2).all()


# Closed formulas and edges


@pytest.mark.parametrize("seed", range(5))
def test_one_child_is_accepted_with_the_overlap_of_the_distributions(seed: int) -> None:
    target, draft = dirichlet_table(seed, 5), dirichlet_table(60 + seed, 5, zeros=seed % 3)
    trees = drawn_trees(widths(1), 1, draft, "sample")
    law = emitted_law(RecursiveRejection(), trees, token_trees(trees, draft), target)
    accepted = sum(mass for tokens, mass in law.items() if len(tokens) == 2)
    assert accepted == pytest.approx(np.minimum(target(()), draft(())).sum(), abs=1e-12)


def test_a_tree_of_a_root_and_one_child_has_a_child() -> None:
    """The target is sure of it, and the draft was not."""
    target = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    proposal = Proposal(
        ids=torch.arange(3).expand(1, 2, 3),
        probs=torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]]),
        children="sample",
    )
    tree = TokenTree(
        tokens=torch.tensor([[ROOT_TOKEN, 1]]),
        parents=torch.tensor([[-1, 0]], dtype=torch.int32),
        size=torch.tensor([2]),
        depth=1,
        proposal=proposal,
    )
    path, length, rest = RecursiveRejection().judge(tree, target, torch.full((1, 2), 0.9))
    assert (path.tolist(), length.tolist()) == ([[0, 1]], [2])
    assert rest.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_top_k_children_are_accepted_with_their_mass(count: int) -> None:
    target, draft = dirichlet_table(71, 5), dirichlet_table(72, 5)
    trees = drawn_trees(widths(count), 1, draft, "top_k")
    law = emitted_law(TargetOnly(), trees, token_trees(trees, None), target)
    accepted = sum(mass for tokens, mass in law.items() if len(tokens) == 2)
    mass = sum(target(())[token] for token in trees[0].tokens[1:])
    assert accepted == pytest.approx(mass, abs=1e-12)


def test_lossy_says_what_the_enumeration_shows() -> None:
    """Recursive rejection overrates top-k children, and says so; every other pair is silent."""
    target, draft = np.array([0.4, 0.4, 0.2]), np.array([0.5, 0.3, 0.2])
    trees = drawn_trees(widths(1), 1, lambda context: draft, "top_k")
    tree = token_trees(trees, lambda context: draft, "top_k")
    law = emitted_law(RecursiveRejection(), trees, tree, lambda context: target)
    first = extend_law(law, lambda context: target, 1)
    # Token 0 is accepted with 0.4 / 0.5, and the residual is token 1 alone.
    assert first[(0,)] == pytest.approx(0.8)
    assert first[(1,)] == pytest.approx(0.2)

    warm, cold = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
    assert "top-k" in str(RecursiveRejection().lossy("top_k", warm))
    assert "temperature=1.0" in str(Greedy().lossy("top_k", warm))
    for children in ("sample", "sample_with_replacement"):
        assert RecursiveRejection().lossy(children, warm) is None
    for children in ("top_k", "sample", "sample_with_replacement"):
        assert TargetOnly().lossy(children, warm) is None
        assert Greedy().lossy(children, cold) is None
        assert RecursiveRejection().lossy(children, cold) is None
    assert RecursiveRejection().needs_proposal
    assert not TargetOnly().needs_proposal
    assert not Greedy().needs_proposal


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_coin_zero_never_accepts_what_the_target_excludes(rule: CoinRule) -> None:
    target = np.array([0.0, 0.3, 0.0, 0.7])
    children = draws_of(rule)[0]
    trees = drawn_trees(*shaped(rule, 4), lambda context: np.full(4, 0.25), children)
    tree = token_trees(trees, lambda context: np.full(4, 0.25), children)
    at_nodes = target_at_nodes(trees, lambda context: target)
    path, length, _ = rule.judge(tree, at_nodes, torch.zeros(len(trees), tree.nodes).double())
    possible = torch.isin(tree.tokens[:, 1:], torch.tensor([1, 3]))
    assert torch.equal(length == 2, possible.any(1))
    token = tree.tokens.gather(1, path)[length == 2, 1]
    assert set(token.tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_nan_when_nothing_is_left(rule: CoinRule, dtype: torch.dtype) -> None:
    """Draft equal to the target, and children that use the whole support up."""
    for target in ([0.5, 0.25, 0.25, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0]):
        probs = np.array(target)
        for count, children in itertools.product((1, 2, 3), draws_of(rule)):
            trees = drawn_trees(*shaped(rule, count), lambda context, p=probs: p, children)
            tree = token_trees(trees, lambda context, p=probs: p, children)
            at_nodes = target_at_nodes(trees, lambda context, p=probs: p).to(dtype)
            for coin in (0.0, 0.5, BELOW_ONE):
                coins = torch.full((len(trees), tree.nodes), coin, dtype=torch.float64)
                _, length, rest = rule.judge(tree, at_nodes, coins)
                assert rest.isfinite().all()
                assert (rest >= 0).all()
                assert (rest.sum(-1) > 0).all()
                assert (rest[:, probs == 0] == 0).all()
                # K-SEQ looks for its divisor, and multi-path verification for the best child.
                if rule.name not in ("target_only", "k_seq", "multi_path"):
                    assert (length == 2).all()


@pytest.mark.parametrize(
    "rule", [Greedy(), *RULES, Typical(), Relaxed()], ids=lambda rule: rule.name
)
def test_idle_rows_and_bare_roots(rule: AcceptanceRule) -> None:
    """A row of size 0 keeps nothing; a bare root keeps itself and emits a draw of the target."""
    parents = torch.tensor([[-2, -2, -2], [-1, -2, -2], [-1, 0, 1]], dtype=torch.int32)
    tree = TokenTree(
        tokens=torch.tensor([[2, 2, 2], [2, 2, 2], [0, 2, 2]]),
        parents=parents,
        size=torch.tensor([0, 1, 3], dtype=torch.int32),
        depth=2,
        proposal=Proposal(
            ids=torch.tensor([2]).expand(3, 3, 1),
            probs=torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 0.0]])[..., None],
            children="sample",
        ),
    )
    tree.check()
    logits = torch.tensor([0.0, 0.0, 60.0]).expand(3, 3, 3)
    accepted = rule.accept(context_for(SamplingParams(temperature=1.0), 3), tree, logits)
    assert accepted.length.tolist() == [0, 1, 3]
    assert accepted.path[2].tolist() == [0, 1, 2]
    assert accepted.next_token[1:].tolist() == [2, 2]


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.name)
def test_a_proposal_is_asked_for_only_where_there_are_children(rule: SupportRule) -> None:
    params = SamplingParams(temperature=1.0)
    roots = TokenTree.roots(torch.tensor([ROOT_TOKEN, ROOT_TOKEN]))
    target = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]])
    path, length, rest = rule.judge(roots, target, torch.zeros(2, 1))
    assert path.tolist() == [[0], [0]]
    assert length.tolist() == [1, 1]
    torch.testing.assert_close(rest, target[:, 0])
    tree = token_trees(drawn_trees(widths(1), 1, dirichlet_table(0, 2), "top_k"), None)
    with pytest.raises(ValueError, match=rf"acceptance={rule.name}: .*no draft prob"):
        rule.accept(context_for(params, 1), tree, torch.zeros(1, 2, 2))
