"""drafter=compose: mixtures against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.mixture import mix, sources_of
from specdec.tree import TokenTree

ANSWER = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0.01, 1.0)), max_size=4, unique_by=lambda pair: pair[0]
)


@given(st.lists(ANSWER, min_size=2, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_the_weighted_sum(
    answers: list[list[tuple[int, float]]], data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.1, 1.0)) for _ in answers]
    width = data.draw(st.integers(1, 12))
    tensors = {}
    for number, answer in enumerate(answers):
        total = sum(p for _, p in answer)
        ids, probs = torch.zeros(1, 1, 4).long(), torch.zeros(1, 1, 4).double()
        for slot, (token, p) in enumerate(answer):
            ids[0, 0, slot], probs[0, 0, slot] = token, p / total
        tensors[number] = ids, probs
    ids, probs, sources = mix(tensors, torch.tensor([weights]).double(), width)

    speaking = sum(w for w, answer in zip(weights, answers, strict=True) if answer)
    expected: dict[int, list[float]] = {}
    for number, answer in enumerate(answers):
        for token, p in answer:
            shares = expected.setdefault(token, [0.0] * len(answers))
            shares[number] += weights[number] / speaking * p / sum(q for _, q in answer)
    best = sorted((-sum(shares), token) for token, shares in expected.items())[:width]
    found = [(t, p) for t, p in zip(ids[0, 0].tolist(), probs[0, 0].tolist(), strict=True) if p]
    assert [p for _, p in found] == pytest.approx([-mass for mass, _ in best])
    for (token, p), source in zip(found, sources[0, 0].tolist(), strict=False):
        assert p == pytest.approx(sum(expected[token]))
        assert expected[token][source] == pytest.approx(max(expected[token]))


def test_sources_are_found_by_parent_and_token() -> None:
    tree = TokenTree(
        tokens=torch.tensor([[9, 4, 5, 4, 0]]),
        parents=torch.tensor([[-1, 0, 0, 1, -2]], dtype=torch.int32),
        size=torch.tensor([4], dtype=torch.int32),
        depth=2,
    )
    expanded = torch.tensor([[0, 1, -1, -1, -1]])
    offered = [
        (torch.tensor([[[4, 5]]]), torch.tensor([[[1, 0]]])),
        (torch.tensor([[[7, 3, 4]]]), torch.tensor([[[0, 0, 2]]])),
    ]
    assert sources_of(tree, expanded, offered).tolist() == [[0, 1, 0, 2, 0]]
