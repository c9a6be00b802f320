"""drafter=token_recycling: its table against what plain Python remembers, and what it drafts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.drafters.growth import Frontier
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.observation import Observation
from specdec.protocols import StepContext
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.decoding import prepared, requests_of
from tests.drafters.learning import PROMPTS, SMALL, V, decoder, following, ranked, run, spied


@pytest.mark.parametrize("from_prompt", [True, False])
@pytest.mark.parametrize("reset", ["prompt", "category", "never"])
def test_the_table_holds_what_the_target_named_last(reset: str, from_prompt: bool) -> None:
    """In each slot every token has what plain Python remembers: the prompt's bigrams, then the
    target's best at whatever node stood last. The scripted target always names the same."""
    count = 4
    drafter = spied(
        TokenRecycling,
        successors=count,
        reset=reset,
        from_prompt=from_prompt,
    )
    categories = ["a", "b", "a", "b"]
    known: dict[Any, dict[int, list[int]]] = {}

    def key(i: int) -> Any:
        return {"prompt": i, "category": categories[i], "never": None}[reset]

    def check() -> None:
        ids, tokens, _ = drafter.noted[-1]
        for i, row in zip(ids, tokens, strict=True):
            if from_prompt and (i, "read") not in known:
                known[i, "read"] = {}
                bigrams = list(zip(PROMPTS[i], PROMPTS[i][1:], strict=False))[::-1]
                mine = known.setdefault(key(i), {})
                before = set(mine)
                for token, after in bigrams:
                    if token not in before and after not in mine.setdefault(token, []):
                        mine[token] = [*mine[token], after][:count]
            for token in row:
                known.setdefault(key(i), {})[token] = ranked(token, count)
        for i in ids:
            row = next(s.row for s in loop.running if s.request.id == i)
            slot = int(drafter._slot[row])
            table = drafter._table[slot * V : (slot + 1) * V].tolist()
            mine = known.get(key(i), {})
            for token in range(V):
                assert table[token] == (mine.get(token, []) + [-1] * count)[:count]

    drafter.learnt = check
    loop = decoder(drafter, Dynamic(budget=12, width=3, depth=4))
    assert len(list(loop.run(requests_of(PROMPTS, 12, categories)))) == 4


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_of_several_nodes_with_a_token_the_last_is_remembered(last: int) -> None:
    drafter = prepared(TokenRecycling(successors=2, reset="never"), Chain(budget=3), SMALL)
    tokens = torch.tensor([[7, 7, 7, 7], [7, 8, 7, 9]])
    sizes = torch.tensor([4, last], dtype=torch.int32)
    tree = TokenTree(tokens=tokens, parents=torch.tensor([[-1, 0, 1, 2]] * 2), size=sizes, depth=3)
    candidates = torch.arange(24).view(2, 4, 3)
    drafter.follow(
        context_of([0, 1]),
        tree,
        Acceptance(
            path=torch.zeros(2, 4, dtype=torch.int64),
            length=torch.tensor([1, min(last, 1)]),  # a size of 0 is an idle row
            next_token=torch.zeros(2, dtype=torch.int64),
        ),
        Observation(tokens=candidates),
    )
    flat = [(7, [0, 1]), (7, [3, 4]), (7, [6, 7]), (7, [9, 10])]
    flat += [(7, [12, 13]), (8, [15, 16]), (7, [18, 19]), (9, [21, 22])][:last]
    expected = dict(flat)
    for token in range(V):
        assert drafter._table[token].tolist() == expected.get(token, [-1, -1])


def context_of(rows: Sequence[int], roots: Sequence[int] | None = None) -> StepContext:
    return StepContext(
        sequences=[],
        roots=torch.tensor(list(roots or rows)),
        sampling=SamplingParams(),
        uniforms=lambda stream, count: torch.zeros(len(rows), count, dtype=torch.float64),
        rows=torch.tensor(list(rows)),
    )


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_probabilities_are_a_prior_over_the_known_ranks(children: Children) -> None:
    drafter = prepared(
        TokenRecycling(successors=3, decay=0.5, reset="never"),
        Static(widths=[2, 1], children=children),
        SMALL,
    )
    drafter._table[4] = torch.tensor([9, 8, 7])
    drafter._table[5] = torch.tensor([6, -1, -1])
    expand = drafter.begin(context_of([0], roots=[4]))
    tokens = torch.tensor([[4, 5, 6]])
    frontier = Frontier(
        level=0, first=0, tokens=tokens, parents=tokens - 1, alive=torch.ones_like(tokens).bool()
    )
    ids, probs = expand(frontier)
    if children == "top_k":
        assert ids[0].tolist() == [[9, 8], [6, 0], [0, 0]]
        expected = [[4 / 7, 2 / 7], [4 / 7, 0.0], [0.0, 0.0]]
    else:
        assert ids[0].tolist() == [[9, 8, 7], [6, 0, 0], [0, 0, 0]]
        expected = [[4 / 7, 2 / 7, 1 / 7], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(probs[0], torch.tensor(expected, dtype=torch.float64))


class NoLook(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "item"}
        return func(*args, **(kwargs or {}))


def test_table_lookups_and_updates_can_be_captured() -> None:
    drafter = prepared(TokenRecycling(successors=2), Chain(budget=3), SMALL, rows=2)
    there = drafter._table.data_ptr()
    tokens = torch.tensor([[4, 5, 6], [4, 4, 4]])
    tree = TokenTree(
        tokens=tokens, parents=torch.tensor([[-1, 0, 1]] * 2), size=torch.tensor([3, 0]), depth=2
    )
    acceptance = Acceptance(
        path=torch.zeros(2, 3, dtype=torch.int64),
        length=torch.tensor([2, 0]),
        next_token=torch.tensor([1, 1]),
    )
    seen = Observation(tokens=torch.arange(18).view(2, 3, 3))
    context = context_of([0, 2])  # the last one is idle
    frontier = Frontier(
        level=0, first=0, tokens=tokens, parents=tokens, alive=torch.ones_like(tokens).bool()
    )
    with NoLook():
        drafter.begin(context)(frontier)
        drafter.end(context, tree, tokens)
        drafter.commit(context, acceptance, seen)
    assert drafter._table.data_ptr() == there
    assert (drafter._table[:-1] >= 0).any(1).nonzero()[:, 0].tolist() == [4, 5, 6]


def test_the_category_unused_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenRecycling, "CATEGORIES", 3)
    drafter = prepared(TokenRecycling(reset="category"), Chain(budget=2), SMALL, rows=2)
    assert len(drafter._table) == 3 * V + 1

    def begin(category: str | None, row: int = 0) -> Decoding:
        request = Request(id=0, prompt_ids=[1], max_new_tokens=9, category=category)
        sequence = Decoding(request, row, [1])
        drafter.start([sequence])
        return sequence

    def known(row: int = 0) -> bool:
        slot = int(drafter._slot[row])
        return bool(drafter._table[slot * V + 30, 0] >= 0)

    def learn(row: int = 0) -> None:
        drafter._table[int(drafter._slot[row]) * V + 30] = 2

    running = begin("a")
    learn()
    for name in ("b", None):
        one = begin(name, 1)
        assert not known(1)
        learn(1)
        drafter.finish(one)
    one = begin("b", 1)  # b is used again, so None is now the oldest but a, which is running
    assert known(1)
    drafter.finish(one)
    one = begin("c", 1)
    assert not known(1)
    assert known(0)
    drafter.finish(one)
    drafter.finish(running)
    for name, remembered in (("b", True), ("a", True), (None, False), ("c", False)):
        one = begin(name)
        assert known() == remembered, name
        drafter.finish(one)


def test_more_rows_than_categories_are_kept_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenRecycling, "CATEGORIES", 1)
    drafter = spied(TokenRecycling, reset="category")
    found = run(drafter, PROMPTS, Chain(budget=2), batch_size=4, categories=["a", "b", "c", "d"])
    assert found == [following(prompt[-1], 30) for prompt in PROMPTS]


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_recycled_tokens_can_be_sampled(zoo: Any, children: Children) -> None:
    target, prompts, _ = zoo
    tree = Static(widths=[3, 2], children=children)
    drafter = spied(TokenRecycling)
    more: dict[str, Any] = {"rule": RecursiveRejection(), "temperature": 1.0, "new": 8}
    found = [run(drafter, prompts[:2], tree, target=target, batch_size=b, **more) for b in (1, 2)]
    assert found[0] == found[1]
    assert max(tree.nodes for tree in drafter.trees) > 4
