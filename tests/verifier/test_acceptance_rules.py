"""What is claimed of each acceptance rule, shown by enumeration
(`experiments/studies/rule_laws.py`): the law of what it emits, how many drafted tokens it keeps,
and that none keeps more than is possible.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from specdec.experiments.studies import acceptance_bounds
from specdec.experiments.studies.acceptance_bounds import mixture, most_accepted
from specdec.experiments.studies.rule_laws import (
    BELOW_ONE,
    Counts,
    DrawnTree,
    Law,
    Table,
    Tokens,
    accepted_tokens,
    coin_chances,
    context_for,
    dirichlet_table,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    likely_law,
    target_at_nodes,
    token_trees,
    widths,
)
from specdec.sampling import SamplingParams, draw
from specdec.tree import Children, TokenTree
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.greedy import Greedy
from specdec.verifier.k_seq import KSeq
from specdec.verifier.likely import LikelyRule
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical
from tests.verifier.test_rules_exact import (
    RULES,
    draws_of,
    logits_table,
    naive_probabilities,
    split_table,
)

WARM, COLD = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
EXACT = 1e-12
SOLVED = 1e-6  # what the solver of linear programmes may be off
DRAWN: tuple[Children, ...] = ("sample", "sample_with_replacement")


def worlds(vocab: int) -> dict[str, tuple[Table, Table]]:
    """Target and draft by what is special about them."""
    target = dirichlet_table(1, vocab)
    zeros = 1 if vocab < 4 else 2
    return {
        "unrelated": (target, dirichlet_table(2, vocab)),
        "zeros_in_target": (dirichlet_table(3, vocab, zeros), dirichlet_table(4, vocab)),
        "zeros_in_draft": (dirichlet_table(5, vocab), dirichlet_table(6, vocab, zeros)),
        "zeros_in_both": (dirichlet_table(7, vocab, 1), dirichlet_table(8, vocab, zeros)),
        "equal": (target, target),
        "near": (target, mixture(target, dirichlet_table(2, vocab), 1e-6)),
        "disjoint": (split_table(vocab, low=True), split_table(vocab, low=False)),
        "one_token_in_target": (dirichlet_table(9, vocab, vocab - 1), target),
        "one_token_in_draft": (target, dirichlet_table(10, vocab, vocab - 1)),
    }


def ending(level: int, tokens: Tokens, place: int) -> int:
    """A chain that ends where its own last token says so."""
    return 1 if level == 0 else tokens[0] % 2


def uneven(level: int, tokens: Tokens, place: int) -> int:
    """Children by what the eldest of the level is."""
    return 2 if level == 0 else (tokens[0] + place) % 3


def youngest(level: int, tokens: Tokens, place: int) -> int:
    """The eldest is judged first, and has children by what the youngest is."""
    return 2 if level == 0 else (tokens[-1] + place) % 3


def cousins(level: int, tokens: Tokens, place: int) -> int:
    """On the last level each has children by what the other one's child is."""
    if level < 2:
        return 2 - level
    return tokens[1 - place] % 2 if len(tokens) == 2 else 1


def no_repeats(level: int, tokens: Tokens, place: int) -> int:
    """A token drawn again among its siblings is not grown further."""
    return 2 if level == 0 or tokens[place] not in tokens[:place] else 0


SHAPES: dict[str, tuple[Counts, int]] = {
    "one": (widths(1), 1),
    "three": (widths(3), 1),
    "chain_of_two": (widths(1, 1), 2),
    "chain_of_three": (widths(1, 1, 1), 3),
    "ending": (ending, 3),
    "two_one": (widths(2, 1), 2),
    "one_two": (widths(1, 2), 2),
    "two_two": (widths(2, 2), 2),
    "three_one": (widths(3, 1), 2),
    "two_one_one": (widths(2, 1, 1), 3),
    "uneven": (uneven, 2),
    "youngest": (youngest, 2),
    "cousins": (cousins, 3),
    "no_repeats": (no_repeats, 2),
}
CHAINS = ("one", "chain_of_two", "chain_of_three", "ending")
SIZES = {  # vocabularies
    "one": (2, 3, 4, 5, 6),
    "three": (2, 4, 5),
    "chain_of_two": (2, 6),
    "chain_of_three": (2, 4),
    "ending": (3,),
    "two_one": (2, 4),
    "one_two": (3,),
    "two_two": (2, 3),
    "three_one": (3,),
    "two_one_one": (2, 3),
    "uneven": (3,),
    "youngest": (3,),
    "cousins": (2, 3),
    "no_repeats": (3,),
}
LARGER = {
    "one": (9,),
    "three": (6,),
    "chain_of_three": (6,),
    "two_one": (6,),
    "one_two": (5,),
    "two_two": (4,),
    "three_one": (4,),
    "youngest": (4,),
    "no_repeats": (4,),
}


def rules_for(shape: str, children: Children) -> list[CoinRule]:
    """Those that are lossless for such trees."""
    return [
        rule
        for rule in RULES
        if rule.lossy(children, WARM) is None
        and (shape in CHAINS or not getattr(rule, "chains", False))
    ]


def assert_lossless(shape: str, children: Children, target: Table, draft: Table) -> None:
    """Tokens emitted in a step, and plainly sampled ones up to one more than the tree is deep,
    follow the target under every rule."""
    counts, levels = SHAPES[shape]
    trees = drawn_trees(counts, levels, draft, children)
    tree = token_trees(trees, draft, children, compact=(draft(()) == 0).any())
    plain = extend_law({(): 1.0}, target, levels + 1)
    for rule in rules_for(shape, children):
        law = extend_law(emitted_law(rule, trees, tree, target), target, levels + 1)
        assert distance(law, plain) < EXACT, rule.name


def sizes(vocabs: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, Children]]:
    """Shapes, vocabularies and children; what becomes of repeats is asked of draws that repeat."""
    return [
        (shape, vocab, children)
        for shape in vocabs
        for vocab in vocabs[shape]
        for children in (*DRAWN, "top_k")
        if shape != "no_repeats" or children == "sample_with_replacement"
    ]


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize(("shape", "vocab", "children"), sizes(SIZES))
def test_lossless_rules_are_lossless(
    world: str, shape: str, vocab: int, children: Children
) -> None:
    assert_lossless(shape, children, *worlds(vocab)[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize(("shape", "vocab", "children"), sizes(LARGER))
def test_lossless_rules_are_lossless_in_larger_worlds(
    world: str, shape: str, vocab: int, children: Children
) -> None:
    assert_lossless(shape, children, *worlds(vocab)[world])


def contexts_of(vocab: int, levels: int) -> list[Tokens]:
    return [c for n in range(levels + 1) for c in itertools.product(range(vocab), repeat=n)]


def table_of(weights: NDArray[np.int64], levels: int) -> Table:
    """[C, V] weights, a row for each context."""
    full = np.where(weights.sum(1, keepdims=True) > 0, weights, 1)
    rows = full / full.sum(1, keepdims=True)
    return dict(zip(contexts_of(weights.shape[1], levels), rows, strict=True)).__getitem__


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(["chain_of_two", "two_one", "two_two", "youngest", "no_repeats"]),
    weights=st.integers(2, 3).flatmap(
        lambda vocab: hnp.arrays(
            np.int64,
            (2, len(contexts_of(vocab, 2)), vocab),
            elements=st.integers(0, 4),
            fill=st.nothing(),
        )
    ),
)
def test_lossless_in_any_world(shape: str, weights: NDArray[np.int64]) -> None:
    """Small whole numbers make zeros, ties and equal distributions frequent."""
    target, draft = (table_of(one, 2) for one in weights)
    for children in DRAWN:
        if (shape, children) != ("no_repeats", "sample"):
            assert_lossless(shape, children, target, draft)


@pytest.mark.parametrize("children", DRAWN)
@pytest.mark.parametrize("shape", ["chain_of_three", "two_two", "youngest"])
def test_one_low_coin_is_enough_to_know_what_traversal_does(
    shape: str, children: Children
) -> None:
    """The enumeration leaves out ways the coins may fall that differ in coins nobody looks at."""
    target, draft = worlds(3)["unrelated"]
    trees = drawn_trees(*SHAPES[shape], draft, children)
    tree = token_trees(trees, draft, children)
    few = emitted_law(Traversal(), trees, tree, target)
    assert distance(few, emitted_law(Traversal(), trees, tree, target, every=True)) < 1e-14


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_lossless_in_float32_up_to_its_rounding(rule: CoinRule) -> None:
    """Also where draft and target nearly agree, and what is left of the target is small."""
    for world, children in itertools.product(("unrelated", "zeros_in_both"), draws_of(rule)):
        target, other = worlds(3)[world]
        for share in (1.0, 1e-2, 1e-4):
            draft = mixture(target, other, share)
            shape = "chain_of_three" if getattr(rule, "chains", False) else "two_one"
            trees = drawn_trees(*SHAPES[shape], draft, children)
            tree = token_trees(trees, draft, children)
            assert tree.proposal is not None
            narrow = replace(tree.proposal, probs=tree.proposal.probs.float())
            law = emitted_law(rule, trees, replace(tree, proposal=narrow), target)
            plain = extend_law({(): 1.0}, target, 3)
            assert distance(extend_law(law, target, 3), plain) < 4 * torch.finfo().eps


# Rules and children that do not go together


@pytest.mark.parametrize(
    ("rule", "shape", "children"),
    [
        (RecursiveRejection(), "two_one", "top_k"),
        (Tokenwise(), "chain_of_two", "top_k"),
        (Block(), "chain_of_two", "top_k"),
        (Traversal(), "two_one", "top_k"),
        (KSeq(), "two_one", "top_k"),
        (KSeq(), "two_one", "sample"),
        (MultiPath(), "two_one", "top_k"),
        (MultiPath(), "two_one", "sample"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_lossy_pairs_say_so_and_are(rule: CoinRule, shape: str, children: Children) -> None:
    assert rule.name in str(rule.lossy(children, WARM))
    assert rule.lossy(children, COLD) is None
    target, draft = worlds(4)["unrelated"]
    trees = drawn_trees(*SHAPES[shape], draft, children)
    law = emitted_law(rule, trees, token_trees(trees, draft, children), target)
    plain = extend_law({(): 1.0}, target, 2)
    assert distance(extend_law(law, target, 2), plain) > 0.01


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_all_other_pairs_are_silent(rule: CoinRule) -> None:
    for children in DRAWN:
        independent = rule.name in ("k_seq", "multi_path")
        silent = rule.lossy(children, WARM) is None
        assert silent == (not independent or children == "sample_with_replacement")
    assert (rule.lossy("top_k", WARM) is None) == (rule.name == "target_only")


@pytest.mark.parametrize(
    ("rule", "params"),
    [(Typical(), WARM), (Relaxed(), WARM), (Relaxed(), COLD)],
    ids=["typical", "relaxed", "relaxed at temperature 0"],
)
@pytest.mark.parametrize("children", ["top_k", *DRAWN])
def test_rules_that_prefer_the_likely_are_lossy(
    rule: LikelyRule, params: SamplingParams, children: Children
) -> None:
    assert rule.lossy(children, params) is not None
    logits, draft = logits_table(81, 4), dirichlet_table(82, 4)
    trees = drawn_trees(widths(2, 1), 2, draft, children)
    law = likely_law(rule, trees, token_trees(trees, draft, children), logits, params)

    def target(context: Tokens) -> NDArray[np.float64]:
        if params.greedy:
            return np.eye(4)[np.argmax(logits(context))]
        return naive_probabilities(logits(context), params)

    plain = extend_law({(): 1.0}, target, 2)
    assert distance(extend_law(law, target, 2), plain) > 0.01


def longest(tree: DrawnTree, taken: list[bool]) -> list[int]:
    """The longest path of taken nodes, of equals the first."""
    best = [0]
    for node in range(1, len(tree.tokens)):
        path = [node]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        if all(taken[i] for i in path[1:]) and len(path) > len(best):
            best = path
    return best


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("top_k", [None, 3])
def test_likely_rules_keep_the_longest_path_that_their_formula_allows(
    temperature: float, top_k: int | None
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    own = replace(params, temperature=1.0, top_k=None) if params.greedy else params
    typical, relaxed = Typical(epsilon=0.2, delta=0.6), Relaxed(top_n=2, delta=0.3)
    logits, draft = logits_table(83, 4), dirichlet_table(84, 4)
    trees = drawn_trees(uneven, 2, draft, "sample")
    tree, at_nodes = token_trees(trees, draft), target_at_nodes(trees, logits)
    context = context_for(params, len(trees))
    for rule in (typical, relaxed):
        accepted = rule.accept(context, tree, at_nodes)
        lengths = set()
        for row, drawn in enumerate(trees):
            taken = [True]
            for node in range(1, len(drawn.tokens)):
                scores, token = logits(drawn.contexts[drawn.parents[node]]), drawn.tokens[node]
                probs = naive_probabilities(scores, own)
                if rule is relaxed:
                    best = sorted(probs)[-2:]
                    taken.append(probs[token] >= max(best[0], best[1] - 0.3))
                elif params.greedy:
                    taken.append(token == np.argmax(scores))
                else:
                    entropy = -sum(p * np.log(p) for p in probs if p > 0)
                    taken.append(probs[token] > min(0.2, 0.6 * np.exp(-entropy)))
            path = longest(drawn, taken)
            assert accepted.path[row, : accepted.length[row]].tolist() == path
            lengths.add(len(path))
        assert len(lengths) > 1
        rows = torch.arange(len(trees))
        after = at_nodes[rows, accepted.path[rows, accepted.length - 1]].numpy()
        if params.greedy:
            expected = torch.tensor(after.argmax(-1))
        else:
            law = torch.tensor(np.array([naive_probabilities(row, params) for row in after]))
            expected = draw(law, context.uniforms(1, 4))
        assert torch.equal(accepted.next_token, expected)


def test_relaxed_acceptance_keeps_to_the_filters() -> None:
    """Of four tokens near enough to the first a filter leaves two."""
    probs = np.log([0.4, 0.3, 0.2, 0.1])
    tree = TokenTree(
        tokens=torch.tensor([[0, token] for token in range(4)]),
        parents=torch.tensor([[-1, 0]] * 4, dtype=torch.int32),
        size=torch.tensor([2] * 4, dtype=torch.int32),
        depth=1,
    )
    logits = torch.tensor(np.broadcast_to(probs, (4, 2, 4)).copy())
    context = context_for(SamplingParams(temperature=1.0, top_k=2), 4)
    accepted = Relaxed(top_n=10, delta=0.6).accept(context, tree, logits)
    assert accepted.length.tolist() == [2, 2, 1, 1]


def test_typical_and_strict_relaxed_acceptance_are_greedy_at_temperature_zero() -> None:
    logits, draft = logits_table(85, 4), dirichlet_table(86, 4)
    assert Typical().lossy("top_k", COLD) is None
    for children in ("top_k", "sample"):
        trees = drawn_trees(widths(2, 2), 2, draft, children)
        tree, at_nodes = token_trees(trees, draft, children), target_at_nodes(trees, logits)
        context = context_for(COLD, len(trees))
        greedy = Greedy().accept(context, tree, at_nodes)
        for rule in (Typical(), Relaxed(delta=0.0)):
            found = rule.accept(context, tree, at_nodes)
            assert torch.equal(found.length, greedy.length)
            assert torch.equal(found.new_tokens(tree), greedy.new_tokens(tree))


# Edges


@pytest.mark.parametrize("children", DRAWN)
@pytest.mark.parametrize("shape", ["chain_of_three", "two_one", "two_two"])
def test_a_draft_equal_to_the_target_is_accepted_whatever_the_coins(
    shape: str, children: Children
) -> None:
    target, _ = worlds(3)["equal"]
    counts, depth = SHAPES[shape]
    trees = drawn_trees(counts, depth, target, children)
    tree, at_nodes = token_trees(trees, target, children), target_at_nodes(trees, target)
    for rule in rules_for(shape, children):
        if rule.name in ("target_only", "multi_path"):
            continue  # the first does not look at the draft, the second picks what is rarer
        law = emitted_law(rule, trees, tree, target)
        assert accepted_tokens(law) == pytest.approx(depth, abs=1e-12)
        for coin in (0.0, 0.5, BELOW_ONE):
            if rule.name == "k_seq" and coin == BELOW_ONE:
                continue  # its divisor is looked for from above
            length = rule.judge(tree, at_nodes, torch.full_like(at_nodes[..., 0], coin))[1]
            assert (length == depth + 1).all(), rule.name


@pytest.mark.parametrize("children", DRAWN)
@pytest.mark.parametrize("shape", ["chain_of_two", "two_one", "three"])
def test_nothing_is_accepted_of_what_the_target_excludes(shape: str, children: Children) -> None:
    target, draft = worlds(4)["disjoint"]
    trees = drawn_trees(*SHAPES[shape], draft, children)
    tree = token_trees(trees, draft, children)
    for rule in rules_for(shape, children):
        law = emitted_law(rule, trees, tree, target)
        assert {len(tokens) for tokens, mass in law.items() if mass > 0} == {1}


@pytest.mark.parametrize("rule", [RecursiveRejection(), KSeq()], ids=lambda rule: rule.name)
def test_a_token_drawn_twice_is_entered_where_it_was_first_drawn(rule: CoinRule) -> None:
    """Root, the same token three times, and a child of the eldest."""
    draft, target = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    twins = DrawnTree(1.0).with_children(0, (0, 0, 0), 1.0).with_children(1, (2,), 1.0)
    tree = token_trees([twins], lambda context: draft, "sample_with_replacement")
    at_nodes = target_at_nodes([twins], lambda context: target)
    for accepted in (1, 2, 3):
        coins = torch.full((1, 5), BELOW_ONE, dtype=torch.float64)
        coins[0, 4] = 0.0
        coins[0, accepted] = 0.0
        chance = coin_chances(rule, tree, at_nodes)
        path, length, _ = rule.judge(tree, at_nodes, coins)
        if chance[0, accepted] > 0:
            assert path[0].tolist() == [0, 1, 4]
            assert length.tolist() == [3]
        else:  # after a rejection recursive rejection has nothing left of this token
            assert rule.name == "recursive_rejection"
            assert accepted > 1


# How many drafted tokens are kept


def lengths(
    shape: tuple[int, ...], target: Table, draft: Table, children: Children
) -> tuple[dict[str, float], dict[str, Law], list[DrawnTree]]:
    """Expected accepted tokens and laws by rule, for those that are lossless there; and the
    trees."""
    trees = drawn_trees(widths(*shape), len(shape), draft, children)
    tree: TokenTree = token_trees(trees, draft, children)
    chain = "chain_of_two" if set(shape) == {1} else "two_one"
    laws = {
        rule.name: emitted_law(rule, trees, tree, target) for rule in rules_for(chain, children)
    }
    return {name: accepted_tokens(law) for name, law in laws.items()}, laws, trees


def pairs(count: int, vocab: int) -> list[tuple[Table, Table]]:
    """Random targets and drafts, some with tokens that one of them excludes."""
    return [
        (
            dirichlet_table(1000 + i, vocab, zeros=i % 3 == 1),
            dirichlet_table(2000 + i, vocab, zeros=i % 3 == 2),
        )
        for i in range(count)
    ]


def transport(trees: list[DrawnTree], target: Table, levels: int) -> float:
    """The most that trees and texts of the target can have in common, if they are paired as well
    as can be: the expected length of the longest beginning of the text that is in the tree."""
    drawn: dict[frozenset[Tokens], float] = {}
    for tree in trees:
        nodes = frozenset(tree.contexts)
        drawn[nodes] = drawn.get(nodes, 0.0) + tree.probability
    texts = extend_law({(): 1.0}, target, levels)
    gain = [
        sum(text[: n + 1] in nodes for n in range(levels)) for nodes in drawn for text in texts
    ]
    count, size = len(gain), len(texts)
    pair = np.arange(count)
    rows = np.concatenate([pair // size, len(drawn) + pair % size])
    matrix = coo_array((np.ones(2 * count), (rows, np.tile(pair, 2))))
    limits = [*drawn.values(), *texts.values()]
    solved = linprog(-np.array(gain), A_ub=matrix.tocsr(), b_ub=limits, method="highs")
    assert solved.status == 0
    return -float(solved.fun)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_block_verification_of_chains_keeps_all_that_can_be_kept(depth: int) -> None:
    """And token-wise sampling less, but for chains of one token; traversal and multi-path
    verification are the same as block verification, recursive rejection and K-SEQ the same as
    token-wise sampling."""
    gains = []
    for target, draft in pairs(8, 3):
        for children in DRAWN:
            kept, laws, trees = lengths((1,) * depth, target, draft, children)
            assert distance(laws["traversal"], laws["block"]) < 1e-12
            assert distance(laws["recursive_rejection"], laws["tokenwise"]) < 1e-15
            if children == "sample_with_replacement":
                assert distance(laws["k_seq"], laws["tokenwise"]) < 1e-12
                assert distance(laws["multi_path"], laws["block"]) < 1e-12
        assert kept["target_only"] <= kept["tokenwise"] + 1e-12
        gains.append(kept["block"] - kept["tokenwise"])
        most = most_accepted(trees, target)
        assert kept["block"] == pytest.approx(most, abs=SOLVED)
        assert most <= transport(trees, target, depth) + SOLVED
    if depth == 1:
        assert gains == pytest.approx([0.0] * 8, abs=1e-12)
    else:
        assert min(gains) > -1e-12
        assert max(gains) > 0.05


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2), (2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("children", DRAWN)
def test_order_of_the_rules_for_trees(shape: tuple[int, ...], children: Children) -> None:
    """Traversal and K-SEQ keep at least what recursive rejection does, and nothing more than any
    lossless rule could."""
    gains = []
    for target, draft in pairs(4, 3):
        kept, laws, trees = lengths(shape, target, draft, children)
        most = most_accepted(trees, target)
        assert max(kept.values()) <= most + SOLVED
        assert most <= transport(trees, target, len(shape)) + SOLVED
        assert kept["target_only"] <= kept["recursive_rejection"] + 1e-12
        assert kept["traversal"] >= kept["recursive_rejection"] - 1e-12
        if "k_seq" in kept:
            assert kept["k_seq"] >= kept["recursive_rejection"] - 1e-12
        if len(shape) == 1:
            assert distance(laws["traversal"], laws["recursive_rejection"]) < 1e-12
        gains.append(kept["traversal"] - kept["recursive_rejection"])
    assert (max(gains) > 0.01) == (len(shape) > 1)


def test_no_rule_for_independent_draws_is_always_the_best() -> None:
    """Near the target K-SEQ keeps the most, further away multi-path verification or traversal."""
    best: dict[float, set[str]] = {0.1: set(), 0.5: set()}
    for (target, other), share in itertools.product(pairs(4, 3), best):
        kept, _, _ = lengths((2, 1), target, mixture(target, other, share), DRAWN[1])
        best[share].add(max(kept, key=lambda name: kept[name]))
    assert best == {0.1: {"k_seq"}, 0.5: {"traversal", "multi_path"}}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_k_seq_keeps_its_share_of_the_optimum(count: int) -> None:
    """Of k draws at one level 1 - (1 - 1/k)^k of what optimal transport keeps (SpecTr)."""
    share = 1 - (1 - 1 / count) ** count
    for target, draft in [*pairs(6, 4), worlds(4)["near"], worlds(4)["one_token_in_draft"]]:
        kept, _, trees = lengths((count,), target, draft, "sample_with_replacement")
        most = transport(trees, target, 1)
        assert most == pytest.approx(most_accepted(trees, target), abs=SOLVED)
        assert share * most - SOLVED <= kept["k_seq"] <= most + SOLVED


@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 2), (3, 2, 1)], ids=str)
def test_target_only_keeps_all_that_can_be_kept_of_a_fixed_tree(shape: tuple[int, ...]) -> None:
    for target, draft in pairs(6, 4):
        trees = drawn_trees(widths(*shape), len(shape), draft, "top_k")
        small = replace(
            trees[0],
            tokens=trees[0].tokens[:10],
            parents=trees[0].parents[:10],
            contexts=trees[0].contexts[:10],
        )
        law = emitted_law(TargetOnly(), [small], token_trees([small], None), target)
        plain = extend_law({(): 1.0}, target, len(shape))
        in_tree = sum(
            mass * sum(text[: n + 1] in small.contexts for n in range(len(shape)))
            for text, mass in plain.items()
        )
        assert accepted_tokens(law) == pytest.approx(in_tree, abs=1e-12)
        assert most_accepted([small], target) == pytest.approx(in_tree, abs=SOLVED)
        assert transport([small], target, len(shape)) == pytest.approx(in_tree, abs=SOLVED)


# Closed forms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_tokens_per_step_of_token_wise_sampling_without_context(seed: int, depth: int) -> None:
    """(1 - a^(n + 1)) / (1 - a) new tokens, where a is 1 less the total variation (Leviathan et
    al. 2023, theorem 3.5 and equation 1)."""
    vocab = 2 if depth > 3 else 3
    p, q = dirichlet_table(300 + seed, vocab)(()), dirichlet_table(400 + seed, vocab)(())
    kept, _, _ = lengths((1,) * depth, lambda context: p, lambda context: q, "sample")
    rate = 1 - np.abs(p - q).sum() / 2
    assert kept["tokenwise"] + 1 == pytest.approx((1 - rate ** (depth + 1)) / (1 - rate))


def test_example_of_block_verification() -> None:
    """Two tokens without context (the motivating example of Sun et al. 2024); 12/9 is what a chain
    and a text of the target can have in common, which no rule attains."""
    p, q = np.array([1 / 3, 2 / 3]), np.array([2 / 3, 1 / 3])
    kept, _, trees = lengths((1, 1), lambda context: p, lambda context: q, "sample")
    assert kept["tokenwise"] == pytest.approx(10 / 9, abs=1e-12)
    assert kept["block"] == pytest.approx(11 / 9, abs=1e-12)
    assert most_accepted(trees, lambda context: p) == pytest.approx(11 / 9, abs=SOLVED)
    assert transport(trees, lambda context: p, 2) == pytest.approx(12 / 9, abs=SOLVED)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chances_that_a_beginning_of_a_chain_is_kept(depth: int) -> None:
    """At least i tokens are kept with the chance the draft has of them times the weight of the
    last: a product of min(1, p / q) token by token, min(1, w * p / q) from one to the next in
    block verification."""
    for target, draft in pairs(4, 3):
        kept, _, _ = lengths((1,) * depth, target, draft, "sample")
        tokenwise = block = 0.0
        level: Mapping[Tokens, tuple[float, float, float]] = {(): (1.0, 1.0, 1.0)}
        for _ in range(depth):
            level = {
                (*context, x): (chance * q, one * min(1, p / q), min(1, joint * p / q))
                for context, (chance, one, joint) in level.items()
                for x, (p, q) in enumerate(zip(target(context), draft(context), strict=True))
                if q > 0
            }
            tokenwise += sum(chance * one for chance, one, _ in level.values())
            block += sum(chance * joint for chance, _, joint in level.values())
        assert kept["tokenwise"] == pytest.approx(tokenwise, abs=1e-12)
        assert kept["block"] == pytest.approx(block, abs=1e-12)


# The experiment


def test_bounds_from_worlds_to_plot(tmp_path: Path) -> None:
    out = tmp_path / "bounds.json"
    assert acceptance_bounds.main(["worlds=1", "steps=2", f"out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["settings"] | {"worlds": 1, "steps": 2} == result["settings"]
    assert result["command"].startswith(
        "python -m specdec.experiments.studies.acceptance_bounds worlds=1"
    )
    assert {"versions", "hardware", "git"} <= result.keys()
    for name, panel in result["panels"].items():
        assert panel["total_variation"][0] == 0 < panel["total_variation"][1]
        found = panel["accepted"]
        for line, values in found.items():
            most = found[f"{acceptance_bounds.MOST}, {line.rpartition(', ')[2]}"]
            assert all(value <= limit + 2e-6 for value, limit in zip(values, most, strict=True))
            if "top_k" not in line and "multi_path" not in line:
                assert values[0] == len(panel["shape"]) > values[1]
        assert found["target_only, top_k"] == found[f"{acceptance_bounds.MOST}, top_k"]
        if name == "chain":
            assert found["block, sample"] == found[f"{acceptance_bounds.MOST}, sample"]
    assert set(acceptance_bounds.LINES) < {
        line for panel in result["panels"].values() for line in panel["accepted"]
    }
    assert out.with_suffix(".png").stat().st_size > 10_000
