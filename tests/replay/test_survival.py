"""Survival functions against the real rules: K of every path by enumeration of draws and coins."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from specdec.experiments.studies.rule_laws import (
    Table,
    dirichlet_table,
    drawn_trees,
    emitted_law,
    token_trees,
)
from specdec.replay.chain import starts
from specdec.replay.siblings import EXACT, Along
from specdec.replay.survival import SAMPLED, check, survival
from specdec.tree import Children
from tests.verifier.laws import RULES

BY_NAME = {rule.name: rule for rule in RULES}
CHAIN = frozenset({(0,), (0, 0), (0, 0, 0)})
SHAPES = {
    "chain": CHAIN,
    "two_one": frozenset({(0,), (1,), (0, 0), (1, 0)}),
    "one_two": frozenset({(0,), (0, 0), (0, 1)}),
    "uneven": frozenset({(0,), (1,), (1, 0), (1, 1)}),
    "eldest": frozenset({(0,), (1,), (0, 0), (0, 1)}),
    "three": frozenset({(0,), (1,), (2,)}),
    "youngest": frozenset({(0,), (1,), (2,), (2, 0), (0, 0)}),
    "two_two": frozenset({(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)}),
}


def along(texts: list[tuple[int, ...]], target: Table, draft: Table) -> Along:
    """Distributions along texts, the support of the draft in its own order."""
    shape = len(texts), max(map(len, texts)), len(draft(()))
    p, q = np.zeros(shape), np.zeros(shape)
    own, text = np.full(shape[:2], -1), np.ones(shape[:2])
    for row, tokens in enumerate(texts):
        for place, token in enumerate(tokens):
            context = tokens[:place]
            order = np.argsort(-draft(context), kind="stable")
            q[row, place] = draft(context)[order]
            p[row, place] = np.where(q[row, place] > 0, target(context)[order], 0.0)
            found = int(np.flatnonzero(order == token)[0])
            own[row, place] = found if q[row, place, found] > 0 else -1
            text[row, place] = target(context)[token]
    count = np.array([len(tokens) for tokens in texts])
    return Along(count=count, own=own, text=text, target=p, draft=q)


def counts_of(shape: frozenset[tuple[int, ...]]):  # type: ignore[no-untyped-def]
    def counts(level: int, tokens: tuple[int, ...], place: int) -> int:
        if level == 0:
            return sum(len(node) == 1 for node in shape)
        parent = sorted(node for node in shape if len(node) == level)[place]
        return sum(node[:-1] == parent for node in shape)

    return counts


def kept(name: str, shape: str, children: Children, target: Table, draft: Table) -> dict:  # type: ignore[type-arg]
    """K of every path, by enumeration."""
    levels = max(map(len, SHAPES[shape]))
    trees = drawn_trees(counts_of(SHAPES[shape]), levels, draft, children)
    law = emitted_law(BY_NAME[name], trees, token_trees(trees, draft, children), target)
    found: dict[tuple[int, ...], float] = {}
    for tokens, mass in law.items():
        for depth in range(1, len(tokens)):
            found[tokens[:depth]] = found.get(tokens[:depth], 0.0) + mass
    return found


def combinations() -> list[tuple[str, str, Children]]:
    found: list[tuple[str, str, Children]] = []
    kinds: tuple[Children, ...] = ("sample", "sample_with_replacement", "top_k")
    for name, shape, children in itertools.product(SAMPLED, SHAPES, kinds):
        try:
            check(name, SHAPES[shape], children)
        except ValueError:
            continue
        found.append((name, shape, children))
    return found


@pytest.mark.parametrize(("name", "shape", "children"), combinations())
def test_survival_is_what_the_rule_keeps_of_every_path(
    name: str, shape: str, children: Children
) -> None:
    vocab = 3
    target, draft = dirichlet_table(1, vocab), dirichlet_table(2, vocab)
    expected = kept(name, shape, children, target, draft)
    depth = max(map(len, SHAPES[shape]))
    texts = list(itertools.product(range(vocab), repeat=depth))
    given = along(texts, target, draft)
    found = survival(name, SHAPES[shape], given, children=children, histories=EXACT)
    for row, tokens in enumerate(texts):
        chance = np.cumprod(given.text[row])
        k = [expected.get(tokens[: d + 1], 0.0) for d in range(depth)]
        np.testing.assert_allclose(found[row, 0, 1:] * chance, k, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["traversal", "recursive_rejection", "k_seq", "multi_path", "hsd"]
)
def test_drafts_that_depend_on_where_a_step_begins(name: str) -> None:
    """Of a head each depth has distributions of its own: what stands at later places, of which
    steps that begin there make their drafts, is another matter."""
    target, draft, other = (dirichlet_table(seed, 3) for seed in (5, 6, 7))
    shape = SHAPES["two_two"]
    texts = list(itertools.product(range(3), repeat=2))
    plain = along(texts, target, draft)
    later, elsewhere = plain.shifted(1), along(texts, target, other)
    mixed = [
        replace(one, draft=np.where(np.arange(2)[:, None] == 0, one.draft, two.draft))
        for one, two in ((plain, elsewhere), (later, elsewhere))
    ]
    given = replace(mixed[0], deeper=(mixed[1],))
    options = {"children": "sample_with_replacement", "histories": EXACT}
    expected = survival(name, shape, plain, **options)[:, 0]  # type: ignore[arg-type]
    found = survival(name, shape, given, **options)[:, 0]  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_draws_of_histories_are_unbiased() -> None:
    target, draft = dirichlet_table(3, 5), dirichlet_table(4, 5)
    texts = [(4, 0, 1), (0, 0, 2), (1, 3, 0)]
    given = along(texts, target, draft)
    shape = frozenset({*SHAPES["youngest"], (1, 0), (1, 0, 0), (0, 1), (0, 2)})
    for name in ("traversal", "hsd", "recursive_rejection", "target_only"):
        exact = survival(name, shape, given, children="sample", histories=EXACT)
        drawn = [
            survival(name, shape, given, children="sample", histories=2, seed=seed)
            for seed in range(600)
        ]
        error = np.std(drawn, axis=0) / np.sqrt(len(drawn))
        assert (np.abs(np.mean(drawn, axis=0) - exact) <= 4.5 * error + 1e-12).all(), name


def test_starts_are_those_of_decoding_a_text() -> None:
    """The chain against decoding plainly by hand: K of a step, then what follows."""
    random = np.random.default_rng(0)
    falls = np.sort(random.random((2, 6, 3)), -1)[..., ::-1]
    survivals = np.concatenate([np.ones((2, 6, 1)), falls], -1)
    count = np.array([6, 4])

    def reached(row: int, place: int) -> float:
        if place == 0:
            return 1.0
        total = 0.0
        for start in range(max(0, place - 4), place):
            kept = place - start - 1
            after = survivals[row, start, kept + 1] if kept + 1 < 4 else 0.0
            total += reached(row, start) * (survivals[row, start, kept] - after)
        return total

    found = starts(survivals, count)
    for row, place in itertools.product(range(2), range(6)):
        expected = reached(row, place) if place < count[row] else 0.0
        assert found[row, place] == pytest.approx(expected)
