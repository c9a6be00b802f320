"""Selections: what is asked of a set, in which order, and that it is decoded as in the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.drafters.ngram import NGram
from specdec.drafters.trees.chain import Chain
from specdec.lab.conversations import Conversations
from specdec.lab.prompts import load_prompts
from specdec.lab.selection import Label, Selection
from specdec.models.load import load_model
from tests.decoding import decoder_of
from tests.lab.asking import Write, load, refusal

LABELS = st.lists(
    st.builds(Label, st.sampled_from("abcdef"), st.sampled_from([None, "x", "y", "z"])),
    max_size=12,
)


def some(labels: list[Label], name: str) -> st.SearchStrategy[Any]:
    """Some of the names in a set, or None."""
    there = sorted({value for label in labels if (value := getattr(label, name)) is not None})
    chosen = st.lists(st.sampled_from(there), min_size=1) if there else st.nothing()
    return st.none() | chosen


@given(data=st.data(), labels=LABELS)
def test_selections_of_all_kinds(data: st.DataObject, labels: list[Label]) -> None:
    category, ids = data.draw(some(labels, "category")), data.draw(some(labels, "id"))
    seed = data.draw(st.none() | st.integers())
    each, limit = (data.draw(st.none() | st.integers(1, 4)) for _ in range(2))

    def places(**said: Any) -> list[int]:
        return Selection(shuffle=seed, **said).places(labels, "set")

    order = places()
    assert sorted(order) == list(range(len(labels)))
    assert seed is not None or order == sorted(order)
    fit = [
        p
        for p in order
        if (category is None or labels[p].category in category)
        and (ids is None or labels[p].id in ids)
    ]
    if labels and not fit:
        with pytest.raises(ValueError, match="none of them is of prompts"):
            places(category=category, ids=ids)
        return
    # A part is in the order of the whole, and holds the first of every category.
    assert places(category=category, ids=ids) == fit
    found = places(category=category, ids=ids, per_category=each, limit=limit)
    groups: dict[str | None, list[int]] = {}
    for place in fit:
        groups.setdefault(labels[place].category, []).append(place)
    evenly = {place for group in groups.values() for place in group[:each]}
    assert found == [place for place in fit if place in evenly][:limit]


def test_orders_are_drawn_by_the_seed() -> None:
    labels = [Label(str(i), None) for i in range(40)]
    orders = {tuple(Selection(shuffle=seed).places(labels, "")) for seed in range(50)}
    assert len(orders) == 50
    firsts = [Selection(shuffle=seed, limit=10).places(labels, "") for seed in range(400)]
    counts = [sum(place in first for first in firsts) for place in range(40)]
    # 400 draws with chance 1/4 each: 100, give or take 4 standard deviations of 8.7
    assert all(65 < count < 135 for count in counts)
    # What is appended to a set changes no order among those that were there.
    longer = Selection(shuffle=3).places([*labels, *labels], "")
    assert [p for p in longer if p < 40] == Selection(shuffle=3).places(labels, "")


RECORDS = [
    {"id": 7, "category": "code", "text": "a"},
    {"id": "x-1", "category": "talk", "turns": ["b", "c", "d"]},
    {"id": "x-2", "category": "code", "text": "e"},
    {"category": "code", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
]


def test_selected_prompts_keep_their_places(write: Write) -> None:
    path = write(*RECORDS)
    (talk,) = load(path, category="talk")
    assert (talk.index, talk.turns) == (1, ("b", "c", "d"))
    assert [p.index for p in load(path, ids=[7, "x-2"])] == [0, 2]
    assert [p.index for p in load(path, category=["code"], limit=2)] == [0, 2]
    assert [p.turns for p in load(path, ids="x-1", turns=2)] == [("b", "c")]
    # What is not selected is not looked into; what is, is.
    assert "image_url" in refusal(lambda: load(path, category="code"))
    assert "image_url" in refusal(lambda: load(path, ids=3))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"category": "cde"}, "has no such category; the nearest is code; there are code, talk"),
        ({"category": ["code", "prose"]}, "prompts.category=prose: "),
        ({"ids": "x-3"}, "has no such id; the nearest is x-"),
        ({"ids": [7, 8]}, "prompts.ids=8: "),
        ({"ids": []}, "prompts.ids=[]: names nothing"),
        ({"category": []}, "prompts.category=[]: names nothing"),
        ({"category": "talk", "ids": 7}, "prompts.ids=7: none of them is of"),
        ({"per_category": 0}, "prompts.per_category=0: must be at least 1"),
        ({"turns": 0}, "prompts.turns=0: must be at least 1"),
        ({"limit": 0}, "prompts.limit=0: must be at least 1"),
    ],
)
def test_what_cannot_be_selected(write: Write, asked: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: load(write(*RECORDS), **asked))


def test_a_set_without_categories(write: Write) -> None:
    message = refusal(lambda: load(write({"text": "a"}), category="code"))
    assert "have none" in message
    assert len(load(write({"text": "a"}, {"text": "b"}), per_category=1)) == 1


SPEC_BENCH = Path(__file__).parents[2].parent / "shared" / "data" / "spec_bench.jsonl"


@pytest.mark.skipif(not SPEC_BENCH.is_file(), reason=f"Spec-Bench's file is not at {SPEC_BENCH}")
def test_six_of_each_category_of_spec_bench() -> None:
    prompts = load_prompts(path=str(SPEC_BENCH), field=None, limit=None, per_category=6, turns=1)
    records = [json.loads(line) for line in SPEC_BENCH.read_text().splitlines()]
    expected: list[tuple[int, str]] = []
    for category in dict.fromkeys(record["category"] for record in records):
        places = [i for i, record in enumerate(records) if record["category"] == category][:6]
        expected += [(i, records[i]["turns"][0]) for i in places]
    assert [(p.index, *p.turns) for p in prompts] == sorted(expected)
    assert len(prompts) == 13 * 6


def test_a_selection_decodes_the_same_texts() -> None:
    """At temperature 1, in other batches and another order."""
    target = load_model("zoo:target")

    def texts(**asked: Any) -> dict[str, list[int]]:
        decoder = decoder_of(
            target, NGram(), Chain(budget=3), temperature=1.0, rows=2, max_tokens=512
        )
        queue = Conversations(
            target.tokenizer,
            load(**asked),
            vocab_size=target.vocab_size,
            samples=1,
            chat="auto",
            max_new_tokens=6,
            finished=[],
            marks={},
        )
        assert not list(queue.begin(decoder))
        found = [r for done in decoder.run() for r in queue.finish(decoder, done)]
        return {record["prompt_hash"]: record["output_ids"] for record in found}

    every = texts(limit=7)
    part = texts(shuffle=2, ids=[prompt.id for prompt in load(limit=7)][2::2])
    assert len(every) == 7
    assert len(part) == 3
    assert list(part) != [name for name in every if name in part]
    assert part.items() <= every.items()
