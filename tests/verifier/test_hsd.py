"""Hierarchical verification (arXiv 2601.05724): definitions of the paper written out, what they
come to on chains, and what their order is worth on trees. That the rule is lossless is in
`test_acceptance_rules.py`, with all others."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from specdec.experiments.studies.rule_laws import (
    Law,
    Table,
    Tokens,
    accepted_tokens,
    coin_chances,
    dirichlet_table,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    target_at_nodes,
    token_trees,
    widths,
)
from specdec.tree import Children
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.hsd import Hsd
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.traversal import Traversal
from tests.verifier.test_lengths import pairs
from tests.verifier.worlds import DRAWN, worlds

Array = NDArray[np.float64]


def joint(table: Table, tokens: Tokens) -> float:
    """Probability of a text."""
    return math.prod(float(table(tokens[:i])[tokens[i]]) for i in range(len(tokens)))


def capped_ratio(target: Table, draft: Table, tokens: Tokens) -> float:
    """Definitions 4 and 5: the ratio of joint probabilities after the place before the last where
    it was greatest, if that was above 1."""
    ratios = [joint(target, tokens[:i]) / joint(draft, tokens[:i]) for i in range(len(tokens) + 1)]
    cut = max(range(1, len(tokens)), key=lambda i: ratios[i], default=0)
    return ratios[-1] / ratios[cut] if cut and ratios[cut] > 1 else ratios[-1]


def chance_of(target: Table, draft: Table, tokens: Tokens, *, last: bool) -> float:
    """Equations 17 to 19: what the coin after the text `tokens` is compared with."""
    if last:
        return min(1.0, capped_ratio(target, draft, tokens))
    above = below = 0.0
    for token in np.flatnonzero(draft(tokens)):
        longer = (*tokens, int(token))
        excess = (capped_ratio(target, draft, longer) - 1.0) * joint(draft, longer)
        above, below = above + max(excess, 0.0), below + max(-excess, 0.0)
    return above / below


@pytest.mark.parametrize("seed", range(6))
def test_capped_divergences_are_the_chances_of_block_verification(seed: int) -> None:
    """Against theorem 7 of the paper, which has them larger."""
    target, draft = dirichlet_table(100 + seed, 3), dirichlet_table(200 + seed, 3)
    trees = drawn_trees(widths(1, 1, 1), 3, draft, "sample")
    tree, at_nodes = token_trees(trees, draft), target_at_nodes(trees, target)
    block, ours = (coin_chances(rule, tree, at_nodes)[:, 1:] for rule in (Block(), Hsd()))
    torch.testing.assert_close(ours, block, rtol=0, atol=1e-12)
    for one, chances in zip(trees, block.tolist(), strict=True):
        for level, chance in enumerate(chances, start=1):
            expected = chance_of(target, draft, one.contexts[level], last=level == 3)
            assert chance == pytest.approx(expected, abs=1e-9)


def test_the_example_of_the_paper() -> None:
    """Section 5.4: after the first token the ratio is 0.8159 and the missing mass 0.0227, with the
    draft's joint probability in it; the chance is 0.1231."""
    q, ratio, missing = 0.8771, 0.7156 / 0.8771, 0.0227
    mass = missing / q
    assert mass / (mass + 1.0 - ratio) == pytest.approx(0.1231, abs=5e-4)


# Algorithm 3 written out over independent lines


def line_law(
    laws: list[tuple[Array, Array]], drawn: Tokens
) -> list[tuple[int, float, Array, Array]]:
    """How block verification of one drawn line may end: (tokens kept; the chance; what is left of
    the target there; what is left of the draft's law, without the drawn token).

    Args:
        laws: target and draft before each token, and the target after the last.
    """
    found, weights, rest = [], [1.0], 1.0
    for (p, q), token in zip(laws, drawn, strict=False):
        weights.append(min(1.0, weights[-1] * p[token] / q[token]))
    for kept in range(len(drawn), -1, -1):
        p, q = laws[kept]
        if kept == len(drawn):
            found.append((kept, weights[kept], p, q))
            rest *= 1.0 - weights[kept]
            continue
        lacking = np.clip(weights[kept] * p - q, 0.0, None)
        enough = lacking.sum() + 1.0 - weights[kept]
        chance = 1.0 if kept == 0 else lacking.sum() / enough if enough > 0 else 0.0
        without = q.copy()
        without[drawn[kept]] = 0.0
        law = lacking / lacking.sum() if lacking.sum() > 0 else p
        found.append((kept, rest * chance, law, without / max(without.sum(), 1e-300)))
        rest *= 1.0 - chance
    return found


def emitted(target: Table, draft: Table, shape: Tokens, repeats: bool, start: Tokens = ()) -> Law:
    """The law of a step on trees of `shape` children by level, drawn while it is judged: what lies
    beside the line is drawn when the walk comes to it, which is all the same to the law."""
    law: Law = {}

    def walk(context: Tokens, p: Array, q: Array, left: int, mass: float) -> None:
        depth = len(context)
        if depth == len(shape) or left == 0 or q.sum() <= 0:
            for token, share in enumerate(p):
                key = (*context, token)
                law[key] = law.get(key, 0.0) + mass * float(share)
            return
        for tokens in itertools.product(range(len(p)), repeat=len(shape) - depth):
            places = [(*context, *tokens[:i]) for i in range(len(tokens) + 1)]
            laws = [(p, q), *((target(c), draft(c)) for c in places[1:])]
            share = math.prod(float(laws[i][1][t]) for i, t in enumerate(tokens))
            if share == 0.0:
                continue
            for kept, chance, after, rest in line_law(laws, tokens):
                if chance * share * mass == 0.0:
                    continue
                more = (left if kept == 0 else shape[min(depth + kept, len(shape) - 1)]) - 1
                again = laws[kept][1] if repeats else rest
                walk(places[kept], after, again, more, mass * share * chance)

    walk(start, target(start), draft(start), shape[0], 1.0)
    return law


@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("children", DRAWN)
def test_the_law_is_that_of_algorithm_3(shape: Tokens, children: Children) -> None:
    for name in ("unrelated", "zeros_in_draft", "zeros_in_target"):
        target, draft = worlds(3)[name]
        trees = drawn_trees(widths(*shape), len(shape), draft, children)
        found = emitted_law(Hsd(), trees, token_trees(trees, draft, children), target)
        expected = emitted(target, draft, shape, children == "sample_with_replacement")
        assert distance(found, expected) < 1e-12


# What it keeps


def kept_by(
    rule: CoinRule, shape: Tokens, target: Table, draft: Table, children: Children
) -> float:
    trees = drawn_trees(widths(*shape), len(shape), draft, children)
    return accepted_tokens(emitted_law(rule, trees, token_trees(trees, draft, children), target))


@pytest.mark.parametrize("children", DRAWN)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_between_recursive_rejection_and_traversal(shape: Tokens, children: Children) -> None:
    """Equal to traversal where nothing but the root has more than one child, below it else."""
    losses, gains = [], []
    for target, draft in pairs(5, 3):
        low, ours, high = (
            kept_by(rule, shape, target, draft, children)
            for rule in (RecursiveRejection(), Hsd(), Traversal())
        )
        gains.append(ours - low)
        losses.append(high - ours)
    assert min(*gains, *losses) > -1e-12
    assert max(gains) > 0.005
    if max(shape[1:]) == 1:
        assert max(losses) < 1e-12
    else:
        assert max(losses) > 0.005


# The last coin of the published listing is compared with the whole ratio, which is not capped


def uncapped_law(target: Table, draft: Table, depth: int) -> Law:
    """The law of chains under the rule whose last coin is compared with p / q of the whole text,
    at most 1; all others as they are."""
    law: Law = {}
    vocab = range(len(target(())))
    for tokens in itertools.product(vocab, repeat=depth):
        mass = joint(draft, tokens)
        if mass == 0.0:
            continue
        laws = [(target(tokens[:i]), draft(tokens[:i])) for i in range(depth + 1)]
        ends = line_law(laws, tokens)
        whole = min(1.0, joint(target, tokens) / mass)
        capped = ends[0][1]
        for kept, chance, after, _ in ends:
            if kept == depth:
                share = whole
            else:
                share = chance / (1.0 - capped) * (1.0 - whole) if capped < 1.0 else 0.0
            for token in vocab:
                key = (*tokens[:kept], token)
                law[key] = law.get(key, 0.0) + mass * share * float(after[token])
    return law


def test_the_last_coin_of_the_published_listing_is_lossy() -> None:
    """And it is that coin by which it keeps more than block verification."""
    p, q = np.array([1 / 3, 2 / 3]), np.array([2 / 3, 1 / 3])
    flat: tuple[Table, Table] = (lambda _: p, lambda _: q)
    for target, draft in (flat, (dirichlet_table(1, 3), dirichlet_table(2, 3))):
        law = uncapped_law(target, draft, 2)
        assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
        off = distance(extend_law(law, target, 2), extend_law({(): 1.0}, target, 2))
        kept, ours = accepted_tokens(law), kept_by(Hsd(), (1, 1), target, draft, "sample")
        if (target, draft) == flat:  # the worked example of the block verification paper
            assert (off, kept, ours) == pytest.approx((1 / 9, 12 / 9, 11 / 9), abs=1e-12)
        assert off > 0.02
        assert kept > ours + 0.02
