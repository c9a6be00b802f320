"""TokenTree and Acceptance: what is checked, padded, moved and kept."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.drafters.none import NoDrafter
from specdec.tree import Acceptance, Proposal, TokenTree
from tests.drafters.scripted import CHILDREN, context_for


def small_tree(**changes: object) -> TokenTree:
    """0 - 1 - 3 and 0 - 2, then padding; the second row is idle, the third a bare root."""
    parts: dict[str, object] = {
        "tokens": torch.tensor([[5, 1, 2, 1, 0], [0] * 5, [3, 0, 0, 0, 0]]),
        "parents": torch.tensor(
            [[-1, 0, 0, 1, -2], [-2] * 5, [-1, -2, -2, -2, -2]], dtype=torch.int32
        ),
        "size": torch.tensor([4, 0, 1], dtype=torch.int32),
        "depth": 2,
    }
    return TokenTree(**(parts | changes))  # type: ignore[arg-type]


def parents_with(row: int, node: int, parent: int) -> Tensor:
    parents = small_tree().parents.clone()
    parents[row, node] = parent
    return parents


def test_a_valid_tree_passes_its_check() -> None:
    small_tree().check()
    small_tree(depth=7).check()
    TokenTree.roots(torch.tensor([4, 2])).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parents": parents_with(0, 4, 0)}, "row 0, node 4: padding must have parent -2, not 0"),
        ({"parents": parents_with(1, 0, -1)}, "row 1, node 0: padding must have parent -2"),
        ({"parents": parents_with(0, 3, 3)}, "row 0, node 3: parent 3 is not an earlier node"),
        ({"parents": parents_with(0, 1, 2)}, "row 0, node 1: parent 2 is not an earlier node"),
        ({"parents": parents_with(0, 1, -1)}, "row 0, node 1: parent -1 is not"),
        ({"parents": parents_with(0, 2, -2)}, "row 0, node 2: parent -2 is not"),
        ({"parents": parents_with(0, 0, 0)}, "row 0, node 0: parent 0 is not"),
        ({"parents": parents_with(2, 0, -2)}, "row 2, node 0: parent -2 is not"),
        ({"depth": 1}, "row 0, node 3: depth 2 exceeds 1"),
        ({"size": torch.tensor([6, 0, 1])}, "row 0: size 6 of 5 nodes"),
        ({"size": torch.tensor([4, -1, 1])}, "row 1: size -1 of 5 nodes"),
        ({"size": torch.tensor([4, 0])}, "disagree in shape"),
        ({"tokens": torch.zeros(3, 4).long()}, "disagree in shape"),
        (
            {"tokens": torch.tensor([[5, 1, 1, 1, 0], [0] * 5, [3, 0, 0, 0, 0]])},
            "row 0, node 2: token 1 is already a child of node 0",
        ),
    ],
)
def test_check_names_the_violation(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        small_tree(**changes).check()


@pytest.mark.parametrize("children", CHILDREN)
def test_equal_siblings_are_legal_only_with_replacement(children: str) -> None:
    proposal = Proposal(
        ids=torch.zeros(3, 5, 1).long(), probs=torch.zeros(3, 5, 1), children=children
    )
    tokens = torch.tensor([[5, 1, 1, 1, 0], [0] * 5, [3, 0, 0, 0, 0]])
    tree = small_tree(tokens=tokens, proposal=proposal)
    if children == "sample_with_replacement":
        tree.check()
        return
    with pytest.raises(RuntimeError, match="already a child"):
        tree.check()


def test_roots_alone() -> None:
    tree = TokenTree.roots(torch.tensor([4, 2]))
    assert tree.tokens.tolist() == [[4], [2]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert tree.size.tolist() == [1, 1]
    assert tree.parents.dtype == torch.int32
    assert (tree.depth, tree.nodes, tree.proposal) == (0, 1, None)
    drafted = NoDrafter().draft(context_for([4, 2]))
    assert drafted.tokens.tolist() == [[4], [2]]


def test_new_tokens_are_the_path_without_the_root_and_the_next_token() -> None:
    tree = small_tree(
        tokens=torch.tensor([[5, 1, 2, 7, 0], [0, 0, 0, 0, 0], [3, 8, 9, 6, 6]]),
        parents=torch.tensor([[-1, 0, 0, 1, -2], [-2] * 5, [-1, 0, 1, 2, 0]], dtype=torch.int32),
        size=torch.tensor([4, 0, 5], dtype=torch.int32),
        depth=3,
    )
    tree.check()
    acceptance = Acceptance(
        path=torch.tensor([[0, 1, 3, 0], [0, 0, 0, 0], [0, 1, 2, 3]]),
        length=torch.tensor([3, 0, 4]),
        next_token=torch.tensor([50, 60, 70]),
    )
    rows = acceptance.new_tokens(tree).tolist()
    assert [row[:n] for row, n in zip(rows, [3, 0, 4], strict=True)] == [
        [1, 7, 50],
        [],
        [8, 9, 6, 70],
    ]
    bare = replace(acceptance, length=torch.tensor([1, 1, 2]))
    assert [row[:n] for row, n in zip(bare.new_tokens(tree).tolist(), [1, 1, 2], strict=True)] == [
        [50],
        [60],
        [8, 70],
    ]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_padding_adds_nothing_but_padding(data: st.DataObject) -> None:
    batch, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    parents = torch.tensor(
        [[-1, *(data.draw(st.integers(0, i)) for i in range(nodes - 1))] for _ in range(batch)]
    ).int()
    tokens = torch.arange(batch * nodes).view(batch, nodes)
    proposal = None
    if data.draw(st.booleans()):
        shape = batch, nodes, data.draw(st.integers(1, 3))
        proposal = Proposal(
            ids=torch.randint(9, shape), probs=torch.rand(shape), children="sample"
        )
    size = torch.full((batch,), nodes, dtype=torch.int32)
    tree = TokenTree(tokens=tokens, parents=parents, size=size, depth=nodes - 1, proposal=proposal)
    tree.check()
    rows, columns = batch + data.draw(st.integers(0, 2)), nodes + data.draw(st.integers(0, 4))
    padded = tree.padded(rows, columns)
    padded.check()
    assert padded.tokens.shape == (rows, columns)
    assert padded.depth == columns - 1
    assert padded.size.tolist() == [nodes] * batch + [0] * (rows - batch)
    for mine, theirs in zip(tree.tensors(), padded.tensors(), strict=True):
        inside = tuple(slice(0, n) for n in mine.shape)
        assert torch.equal(theirs[inside], mine)
    assert (padded.parents == -2).sum() == rows * columns - batch * nodes
    copy = padded.to(torch.device("cpu"))
    for mine, theirs in zip(copy.tensors(), padded.tensors(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
