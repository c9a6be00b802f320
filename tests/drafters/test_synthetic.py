"""drafter=synthetic with its rule: accepted lengths against closed formulas, the next token
against the target's law."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, product
from math import prod
from operator import mul
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec.drafters.synthetic import Synthetic as Drafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.protocols import StepContext, TreePolicy
from specdec.rates import by_depth
from specdec.sampling import SamplingParams, probabilities, uniforms
from specdec.tree import Acceptance, Proposal, TokenTree
from specdec.verifier.synthetic import Synthetic as Rule
from tests.decoding import prepared

VOCAB = 11
TARGET: Any = SimpleNamespace(vocab_size=VOCAB, device=torch.device("cpu"))
ROWS = 4000
LEVEL = 1e-4  # chance of a statistical test to fail a correct program


def context_for(temperature: float, rows: int = ROWS) -> StepContext:
    def draws(stream: int, count: int) -> Tensor:
        return uniforms(5, range(rows), [0] * rows, stream, count)

    return StepContext(
        sequences=[],
        roots=torch.arange(rows) % VOCAB,
        sampling=SamplingParams(temperature=temperature),
        uniforms=draws,
    )


def one_step(
    policy: TreePolicy, rates: Any, temperature: float = 0.0
) -> tuple[TokenTree, Tensor, Acceptance]:
    context = context_for(temperature)
    tree = prepared(Drafter(rates=rates), policy, TARGET).draft(context)
    tree.check()
    assert bool(((tree.tokens >= 0) & (tree.tokens < VOCAB)).all())
    logits = torch.randn(ROWS, tree.nodes, VOCAB, generator=torch.manual_seed(0))
    return tree, logits, Rule().accept(context, tree, logits)


def likely(count: int, chance: float) -> bool:
    return bool(stats.binomtest(count, ROWS, chance).pvalue > LEVEL)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("policy", "rates", "by_level"),
    [
        (Chain(budget=4), 0.7, [0.7] * 4),
        (Chain(budget=4), [0.9, 0.6, 0.3], [0.9, 0.6, 0.3, 0.3]),
        (Static(widths=[3, 2, 1]), [[0.5, 0.3, 0.1], [0.4, 0.4], 0.5], [0.9, 0.8, 0.5]),
        (Static(widths=[2, 2]), [[0.5, 0.3, 0.2], 1], [0.8, 1.0]),  # the third is not drafted
    ],
)
def test_paths_reach_each_depth_as_often_as_the_rates_say(policy, rates, by_level, temperature):
    tree, _, acceptance = one_step(policy, rates, temperature)
    assert tree.depth == len(by_level)
    for depth, chance in enumerate(accumulate(by_level, mul), start=1):
        assert likely(int((acceptance.length > depth).sum()), chance)


def test_each_rank_is_entered_as_often_as_its_rate_says():
    rates = [0.5, 0.25, 0.15]
    tree, _, acceptance = one_step(Static(widths=[3]), [rates])
    assert tree.nodes == 4
    entered = acceptance.path[:, 1][acceptance.length > 1].bincount(minlength=4)[1:]
    counts = [*entered.tolist(), ROWS - int(entered.sum())]
    expected = [ROWS * p for p in (*rates, 1 - sum(rates))]
    assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_a_dynamic_tree_has_the_best_nodes_and_the_length_they_promise():
    rates, budget, depth = [0.6, 0.3, 0.05], 6, 3
    chances = sorted(
        (prod(path) for n in range(1, depth + 1) for path in product(rates, repeat=n)),
        reverse=True,
    )[:budget]
    tree, _, acceptance = one_step(Dynamic(budget=budget, width=3, depth=depth), [rates])
    assert tree.size.tolist() == [budget + 1] * ROWS
    drafted = (acceptance.length - 1).double().numpy()
    assert stats.ttest_1samp(drafted, sum(chances)).pvalue > LEVEL
    # Every node by itself: a dropped sibling leaves the others what they were.
    inside = torch.arange(tree.depth + 1) < acceptance.length[:, None]
    counts = acceptance.path[inside].bincount(minlength=budget + 1)[1:].sort(descending=True)
    assert all(likely(n, p) for n, p in zip(counts.values.tolist(), chances, strict=True))


def test_rates_of_zero_and_one_are_certain():
    tree, _, acceptance = one_step(Chain(budget=3), 1.0)
    assert acceptance.length.tolist() == [4] * ROWS
    tree, _, acceptance = one_step(Chain(budget=3), 0)
    assert (tree.depth, acceptance.length.tolist()) == (0, [1] * ROWS)


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_the_rule_says_that_it_is_lossy(children):
    assert "does not look at the target" in str(Rule().lossy(children, SamplingParams()))


def test_the_next_token_is_the_targets_own():
    tree, logits, acceptance = one_step(Chain(budget=2), 0.5)
    rows = torch.arange(ROWS)
    last = acceptance.path[rows, acceptance.length - 1]
    assert acceptance.next_token.equal(logits[rows, last].argmax(-1))

    context = context_for(0.7)
    logits = torch.randn(VOCAB, generator=torch.manual_seed(1))
    acceptance = Rule().accept(context, tree, logits.expand(ROWS, tree.nodes, VOCAB))
    law = probabilities(logits, context.sampling).double()
    counts = acceptance.next_token.bincount(minlength=VOCAB)
    assert stats.chisquare(counts, ROWS * (law / law.sum()).numpy()).pvalue > LEVEL


def test_repeated_siblings_and_idle_rows():
    proposal = Proposal(
        ids=torch.tensor([[[4, 5]] * 3] * 2),
        probs=torch.tensor([[[0.6, 0.4]] * 3] * 2),
        children="sample_with_replacement",
    )
    tree = TokenTree(
        tokens=torch.tensor([[1, 4, 4]] * 2),
        parents=torch.tensor([[-1, 0, 0], [-2, -2, -2]], dtype=torch.int32),
        size=torch.tensor([3, 0], dtype=torch.int32),
        depth=1,
        proposal=proposal,
    )

    def accepted(coin: float) -> list[int]:
        context = StepContext(
            sequences=[],
            roots=tree.tokens[:, 0],
            sampling=SamplingParams(),
            uniforms=lambda stream, count: torch.full((2, count), coin, dtype=torch.float64),
        )
        acceptance: Acceptance = Rule().accept(context, tree, torch.zeros(2, 3, VOCAB))
        return acceptance.length.tolist()

    assert accepted(0.59) == [2, 0]
    assert accepted(float(torch.tensor(0.6))) == [1, 0]  # coins may be 0, and so may rates
    assert accepted(0.61) == [1, 0]  # the same token again is no second chance


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_stated_rates_take_the_place_of_what_a_drafter_says(children):
    """By depth and rank, of whatever drafter: this one says that all of its guesses are sure."""
    rule = Rule(rates=[[0.5, 0.3], 0.8])
    assert (rule.needs_proposal, Rule().needs_proposal) == (False, True)
    context = context_for(0.0)
    tree = prepared(Drafter(rates=[[0.5, 0.25, 0.25]]), Static(widths=[3, 1]), TARGET).draft(
        context
    )
    assert tree.proposal is not None
    tree = replace(tree, proposal=replace(tree.proposal, children=children))
    logits = torch.randn(ROWS, tree.nodes, VOCAB, generator=torch.manual_seed(0))
    acceptance = rule.accept(context, tree, logits)
    first = acceptance.path[:, 1][acceptance.length > 1].bincount(minlength=4)[1:4].tolist()
    assert first[2] == 0  # the third child has no rate
    assert likely(first[0], 0.5)
    assert likely(first[1], 0.3)
    assert likely(int((acceptance.length > 2).sum()), 0.8 * 0.8)
    untold = rule.accept(context, replace(tree, proposal=None), logits)
    assert untold.path.equal(acceptance.path)


def test_neither_waits_for_the_device():
    # Fake tensors hold no numbers: whatever would have to read one raises.
    policy = Static(widths=[2, 1])
    with FakeTensorMode():
        context = StepContext(
            sequences=[],
            roots=torch.zeros(3, dtype=torch.int64),
            sampling=SamplingParams(temperature=1.0),
            uniforms=lambda stream, count: torch.zeros(3, count, dtype=torch.float64),
        )
        expand: Callable[..., Any] = prepared(Drafter(rates=[[0.5, 0.2]]), policy, TARGET).begin(
            context
        )
        tokens = context.roots[:, None]
        ids, probs = expand(SimpleNamespace(level=1, tokens=tokens))
        assert ids.shape == probs.shape == (3, 1, 2)
        tree = TokenTree(
            tokens=torch.zeros(3, 4, dtype=torch.int64),
            parents=torch.zeros(3, 4, dtype=torch.int32),
            size=torch.zeros(3, dtype=torch.int32),
            depth=2,
            proposal=Proposal(
                ids=ids.expand(3, 4, 2), probs=probs.expand(3, 4, 2), children="top_k"
            ),
        )
        assert Rule().accept(context, tree, torch.zeros(3, 4, VOCAB)).path.shape == (3, 3)


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ([], "depth 1 has []; there must be at least one"),
        ([0.5, []], "depth 2 has []; there must be at least one"),
        (-0.1, "each must be from 0 to 1"),
        ([[0.2, float("nan")]], "each must be from 0 to 1"),
        ([[0.2, 0.3]], "siblings must be in descending order"),
        ([[0.7, 0.4]], "must sum to 1 at most, not 1.1"),
    ],
)
def test_rates_that_are_none_are_refused(rates, reason):
    with pytest.raises(ValueError, match=r"^drafter\.rates=") as error:
        by_depth(rates)
    assert reason in str(error.value)


def test_more_children_than_tokens_are_refused():
    with pytest.raises(ValueError, match="only 11 tokens"):
        prepared(Drafter(rates=[[0.01] * 12]), Chain(budget=1), TARGET)
    prepared(Drafter(rates=[[0.1, *[0.09] * 10]]), Chain(budget=1), TARGET)


def test_a_tree_without_probabilities_is_refused():
    roots = TokenTree.roots(torch.tensor([3, 4]))
    assert Rule().accept(context_for(0.0, 2), roots, torch.zeros(2, 1, 5)).length.tolist() == [
        1,
        1,
    ]
    tree = TokenTree(
        tokens=torch.zeros(2, 2, dtype=torch.int64),
        parents=torch.tensor([[-1, 0]] * 2, dtype=torch.int32),
        size=torch.full((2,), 2, dtype=torch.int32),
        depth=1,
    )
    with pytest.raises(ValueError, match="acceptance=synthetic: the tree has no draft prob"):
        Rule().accept(context_for(0.0, 2), tree, torch.zeros(2, 2, 5))
