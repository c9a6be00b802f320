"""Rules and children that do not go together say so, and are lossy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from specdec.experiments.studies.rule_laws import (
    DrawnTree,
    Tokens,
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
from specdec.sampling import SamplingParams, draw
from specdec.tree import Children, TokenTree
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.greedy import Greedy
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.likely import LikelyRule
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical
from tests.verifier.laws import RULES, likely_law, logits_table, naive_probabilities
from tests.verifier.worlds import COLD, DRAWN, SHAPES, WARM, uneven, worlds


@pytest.mark.parametrize(
    ("rule", "shape", "children"),
    [
        (RecursiveRejection(), "two_one", "top_k"),
        (Tokenwise(), "chain_of_two", "top_k"),
        (Block(), "chain_of_two", "top_k"),
        (Traversal(), "two_one", "top_k"),
        (Hsd(), "two_one", "top_k"),
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


@pytest.mark.parametrize(
    ("epsilon", "delta", "kept"),
    [(0.25, 4.0, 1), (0.2, 4.0, 2), (0.9, 0.9, 2), (0.9, 1.1, 1)],
    ids=["at epsilon", "above epsilon", "above the share", "below the share"],
)
def test_typical_acceptance_keeps_what_is_above_and_not_what_is_at(
    epsilon: float, delta: float, kept: int
) -> None:
    """Of four tokens of a quarter each; exp(-entropy) is a quarter as well."""
    tree = TokenTree(
        tokens=torch.tensor([[0, 1]]),
        parents=torch.tensor([[-1, 0]], dtype=torch.int32),
        size=torch.tensor([2], dtype=torch.int32),
        depth=1,
    )
    context = context_for(SamplingParams(temperature=1.0), 1)
    accepted = Typical(epsilon=epsilon, delta=delta).accept(context, tree, torch.zeros(1, 2, 4))
    assert accepted.length.tolist() == [kept]


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
