"""Tries as tensors answer as tries do."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.growth import Frontier
from specdec.drafters.host import Trie
from specdec.drafters.tries import TrieTable
from specdec.protocols import StepContext
from specdec.sampling import SamplingParams


def answers_of(
    table: TrieTable, rows: list[int], paths: list[list[int]]
) -> list[dict[int, float]]:
    """What a table says after these paths, one for each row, followed from the root."""
    context = StepContext(
        sequences=[],
        roots=torch.zeros(len(rows), dtype=torch.int64),
        sampling=SamplingParams(),
        uniforms=lambda stream, count: torch.zeros(len(rows), count),
        rows=torch.tensor(rows),
    )
    answer = table.expand(context)
    ids = probs = torch.empty(0)
    for level in range(len(paths[0]) + 1):
        tokens = torch.tensor([[path[level - 1] if level else 0] for path in paths])
        frontier = Frontier(
            level=level,
            first=level,
            tokens=tokens,
            parents=torch.full_like(tokens, level - 1),
            alive=torch.ones_like(tokens, dtype=torch.bool),
        )
        ids, probs = answer(frontier)
    return [
        {int(t): float(p) for t, p in zip(ids[row, 0], probs[row, 0], strict=True) if p}
        for row in range(len(rows))
    ]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.floats(0.1, 2.0)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_table_answers_like_its_trie(paths: list[tuple[list[int], float]]) -> None:
    trie, empty = Trie(), Trie()
    for path, weight in paths:
        trie.add(path, weight)
    table = TrieTable(rows=3, nodes=64, width=4, device=torch.device("cpu"))
    table.write(0, trie)
    table.write(2, empty)
    table.send()
    for length in range(4):
        for path in itertools.product(range(4), repeat=length):
            node = trie
            for token in path:
                node = node.children.get(token, empty)
            mine, nothing = answers_of(table, [0, 2], [list(path)] * 2)
            assert mine == pytest.approx(dict(node.best(4)))
            assert nothing == {}


def test_a_small_table_keeps_the_most_probable_nodes() -> None:
    trie = Trie()
    trie.add([1, 2, 3], 8.0)
    trie.add([4, 5, 6], 1.0)
    table = TrieTable(rows=1, nodes=2, width=2, device=torch.device("cpu"))
    table.write(0, trie)
    table.send()
    assert answers_of(table, [0], [[]]) == [pytest.approx({1: 8 / 9, 4: 1 / 9})]
    assert answers_of(table, [0], [[1]]) == [{2: 1.0}]
    assert answers_of(table, [0], [[1, 2]]) == [{}]
    assert answers_of(table, [0], [[4]]) == [{}]
