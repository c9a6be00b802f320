"""How many drafted tokens each rule keeps, and that none keeps more than is possible."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import coo_array

from specdec.experiments.studies import acceptance_bounds
from specdec.experiments.studies.acceptance_bounds import mixture, most_accepted
from specdec.experiments.studies.rule_laws import (
    DrawnTree,
    Law,
    Table,
    Tokens,
    accepted_tokens,
    dirichlet_table,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    token_trees,
    widths,
)
from specdec.tree import Children, TokenTree
from specdec.verifier.target_only import TargetOnly
from tests.verifier.worlds import DRAWN, rules_for, worlds

SOLVED = 1e-6  # what the solver of linear programmes may be off


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
    """And token-wise sampling less, but for chains of one token; traversal, multi-path and
    hierarchical verification are the same as block verification, recursive rejection and K-SEQ the
    same as token-wise sampling."""
    gains = []
    for target, draft in pairs(8, 3):
        for children in DRAWN:
            kept, laws, trees = lengths((1,) * depth, target, draft, children)
            assert distance(laws["traversal"], laws["block"]) < 1e-12
            assert distance(laws["hsd"], laws["block"]) < 1e-12
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


@pytest.mark.some(2)
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
        assert kept["traversal"] >= kept["hsd"] - 1e-12
        assert kept["hsd"] >= kept["recursive_rejection"] - 1e-12
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
        best[share].add(max(kept, key=lambda name: round(kept[name], 12)))  # of equals the first
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
        assert found.get("target_only, top_k") == found.get(f"{acceptance_bounds.MOST}, top_k")
        if name == "chain":
            assert found["block, sample"] == found[f"{acceptance_bounds.MOST}, sample"]
    assert set(acceptance_bounds.LINES) < {
        line for panel in result["panels"].values() for line in panel["accepted"]
    }
    assert out.with_suffix(".png").stat().st_size > 10_000
