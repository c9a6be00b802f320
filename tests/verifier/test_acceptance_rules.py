"""What is claimed of each acceptance rule, shown by enumeration of the law of what it emits
(`experiments/studies/rule_laws.py`): it is the target's.

Pairs of a rule and children for which it is not are in `test_lossy.py`; how many drafted tokens a
rule keeps is in `test_lengths.py`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from specdec.experiments.studies.acceptance_bounds import mixture
from specdec.experiments.studies.rule_laws import (
    BELOW_ONE,
    DrawnTree,
    Table,
    Tokens,
    accepted_tokens,
    coin_chances,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    target_at_nodes,
    token_trees,
)
from specdec.tree import Children
from specdec.verifier.coins import CoinRule
from specdec.verifier.k_seq import KSeq
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.traversal import Traversal
from tests.verifier.laws import RULES, draws_of
from tests.verifier.worlds import (
    DRAWN,
    SHAPES,
    rules_for,
    worlds,
)

EXACT = 1e-12
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


@pytest.mark.some(80)
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


@settings(max_examples=25, deadline=None, derandomize=True)
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
