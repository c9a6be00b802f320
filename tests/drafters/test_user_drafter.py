"""drafter=user: the trees a plain function gets, and what becomes of its mistakes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.drafters.user import UserFunction
from specdec.protocols import StepContext, TreePolicy
from specdec.reasons import DraftError
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from tests.decoding import prepared

TARGET: Any = SimpleNamespace(vocab_size=10)
Path = tuple[int, ...]


def sequence(number: int, tokens: list[int]) -> Decoding:
    return Decoding(
        Request(id=number, prompt_ids=tokens, max_new_tokens=4), row=number, tokens=tokens
    )


def draft(function: Any, policy: TreePolicy, *tokens: list[int]) -> tuple[UserFunction, TokenTree]:
    sequences = [sequence(number, own) for number, own in enumerate(tokens or ([1, 2, 3],))]
    drafter = prepared(UserFunction(function=function), policy, TARGET)
    drafter.name = "user (f)"
    context = StepContext(
        sequences=sequences,
        roots=torch.tensor([s.tokens[-1] for s in sequences]),
        sampling=SamplingParams(),
        uniforms=lambda stream, count: torch.zeros(len(sequences), count, dtype=torch.float64),
    )
    tree = drafter.draft(context)
    tree.check()
    return drafter, tree


def paths_of(tree: TokenTree, row: int = 0) -> list[Path]:
    """The path of each node but the root, in the order of nodes."""
    paths: list[Path] = [()]
    for node in range(1, int(tree.size[row])):
        parent = int(tree.parents[row, node])
        paths.append((*paths[parent], int(tree.tokens[row, node])))
    return paths[1:]


def test_paths_are_merged_and_cut_where_the_tree_ends():
    _, tree = draft(lambda tokens: [[4, 5, 6], [4, 7], [8]], Static(widths=[2, 2]))
    assert paths_of(tree) == [(4,), (8,), (4, 5), (4, 7)]


def test_the_first_path_goes_first_however_many_agree_against_it():
    paths = [[9], *([8, n % 3] for n in range(40))]
    _, tree = draft(lambda tokens: paths, Chain(budget=3))
    assert paths_of(tree) == [(9,)]
    _, tree = draft(lambda tokens: paths, Static(widths=[2]))
    assert paths_of(tree) == [(9,), (8,)]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6])
def test_a_dynamic_tree_spends_its_budget_path_by_path(budget):
    paths = [[4, 5, 6], [4, 7], [8, 9]]
    _, tree = draft(lambda tokens: paths, Dynamic(budget=budget, width=6, depth=3))
    wanted = [(4,), (4, 5), (4, 5, 6), (4, 7), (8,), (8, 9)]
    assert sorted(paths_of(tree)) == sorted(wanted[:budget])


def test_the_function_sees_prompt_and_output_of_each_sequence_and_may_keep_them():
    seen = []

    def function(tokens: list[int]) -> list[list[int]]:
        seen.append(list(tokens))
        tokens.clear()
        return [[5]] if seen[-1][0] == 1 else []

    drafter, tree = draft(function, Chain(budget=2), [1, 2], [3, 4, 5])
    assert seen == [[1, 2], [3, 4, 5]]
    assert tree.size.tolist() == [2, 1]
    one, other = sequence(0, [1, 2]), sequence(1, [3, 4, 5])
    assert (drafter.match_length(one), drafter.match_length(other)) == (2, 0)


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [[]],
        (path for path in ()),
        np.zeros((0, 3), dtype=np.int64),
    ],
)
def test_no_path_is_a_legal_answer(answer):
    _, tree = draft(lambda tokens: answer, Chain(budget=2))
    assert tree.size.tolist() == [1]


def test_whatever_counts_as_an_integer_will_do():
    for answer in (np.array([[4, 5]]), torch.tensor([[4, 5]]), ((t for t in (4, 5)),)):
        _, tree = draft(lambda tokens, answer=answer: answer, Chain(budget=2))
        assert paths_of(tree) == [(4,), (4, 5)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "guess returned None; must be continuations, [] for none"),
        ([4, 5], "guess returned 4; a continuation must be a sequence of token ids"),
        (["text"], "guess returned 'text'; a continuation must be"),
        ([[4.0]], "guess returned [4.0]; a continuation must be"),
        ([[4], [3, 10]], "guess returned 10; token ids must be from 0 to 9"),
        ([[-1]], "guess returned -1; token ids must be from 0 to 9"),
    ],
)
def test_an_answer_that_is_none_names_function_and_value(answer, reason):
    def guess(tokens: list[int]) -> Any:
        return answer if tokens[0] == 7 else []

    guess.__qualname__ = "guess"
    with pytest.raises(DraftError, match=r"^user \(f\) failed on request 1: ValueError") as error:
        draft(guess, Chain(budget=2), [1, 2], [7], [8])
    assert reason in error.value.reason
    assert error.value.requests == [1]


def test_a_failure_is_blamed_on_the_one_sequence_and_line():
    def guess(tokens: list[int]) -> Any:
        return [[tokens[2]]]

    with pytest.raises(DraftError) as error:
        draft(guess, Chain(budget=2), [1, 2, 3], [1, 2])
    assert error.value.requests == [1]
    line = guess.__code__.co_firstlineno + 1
    expected = f"IndexError: list index out of range (test_user_drafter.py:{line})"
    assert error.value.reason == expected
    assert isinstance(error.value.__cause__, IndexError)
