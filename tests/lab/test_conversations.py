"""Conversations: numbers of requests, what is an answer, and what later turns are told."""

import json
import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from specdec.lab.conversations import (
    MORE_PROMPTS,
    MORE_TURNS,
    PROMPTS,
    SAMPLES,
    TURNS,
    Conversations,
    check_numbers,
    number_of,
    prompt_of,
)
from specdec.lab.prompts import Prompt
from specdec.models.load import zoo_path
from specdec.request import Decoding, Request
from tests.lab.asking import refusal


class Decoder:
    """Of a decoder what conversations ask of it; `answer` ends every request."""

    def __init__(self, *stop_tokens: int) -> None:
        self.capacity = SimpleNamespace(max_tokens=10**6)
        self.verifier = SimpleNamespace(max_context=10**6)
        self.stop_tokens = frozenset(stop_tokens)
        self.asked: list[Request] = []

    def submit(self, request: Request, *, first: bool = False) -> None:
        self.asked.append(request)

    def answer(self, tokens: list[int], reason: str) -> Decoding:
        request = self.asked.pop(0)
        done = Decoding(request, row=0, tokens=[*request.prompt_ids, *tokens], steps=1)
        done.finish_reason = reason
        return done


class Letters:
    """A tokenizer of characters, whose texts are those of `texts` where it has them."""

    chat_template = None

    def __init__(self, **texts: str) -> None:
        self.texts = texts

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return self.texts.get("all", "".join(map(chr, ids)))


def conversation(*turns: str, index: int = 0) -> Prompt:
    return Prompt(index=index, id="p", category=None, turns=turns, conversation=True)


def conversations(tokenizer: Any, *prompts: Prompt, samples: int = 1) -> Conversations:
    return Conversations(
        tokenizer,
        prompts,
        vocab_size=10**6,
        samples=samples,
        chat="auto",
        max_new_tokens=8,
        finished=[],
        marks={},
    )


# --- numbers


def test_numbers_of_ordinary_runs_are_what_they_were() -> None:
    """Random numbers follow from them, so finished runs would not go on otherwise."""
    for index, sample, turn in product((0, 7, 999_999), (0, 3, 5000, 999_999), (0, 1, 999)):
        assert number_of(index, sample, turn) == (sample * 1_000_000 + index) * 1000 + turn


def test_numbers_are_unique_and_fit_a_key_of_64_bits() -> None:
    draw = random.Random(3)
    most = (MORE_PROMPTS * PROMPTS, SAMPLES, MORE_TURNS * TURNS)
    edges = [
        sorted({0, 1, size - 1, size, size + 1, limit - 1})
        for size, limit in zip((PROMPTS, SAMPLES - 2, TURNS), most, strict=True)
    ]
    places = {tuple(draw.randrange(limit) for limit in most) for _ in range(2000)}
    places |= set(product(*edges))
    numbers = {number_of(*place): place for place in places}
    assert len(numbers) == len(places)
    assert all(prompt_of(number) == place for number, place in numbers.items())
    assert min(numbers) >= 0
    assert max(numbers) < 2**63


def test_more_than_there_are_numbers_is_refused() -> None:
    long = conversation(*["a"] * (MORE_TURNS * TURNS))
    check_numbers([long], SAMPLES)
    longer = conversation(*["a"] * (MORE_TURNS * TURNS + 1))
    assert "prompt 'p' has 100001 turns" in refusal(lambda: check_numbers([longer], 1))
    assert "prompts.samples=1000001" in refusal(lambda: check_numbers([long], SAMPLES + 1))
    far = conversation("a", index=MORE_PROMPTS * PROMPTS)
    assert "prompts.limit" in refusal(lambda: check_numbers([far], 1))


def test_a_conversation_of_more_than_a_thousand_turns() -> None:
    count, decoder = 1100, Decoder()
    queue = conversations(Letters(), conversation(*["a"] * count), conversation("b", index=1))
    assert list(queue.begin(decoder)) == []
    records = []
    while decoder.asked:
        records += list(queue.finish(decoder, decoder.answer([ord("x")], "length")))
    assert len({record["request"] for record in records}) == len(records) == count + 1
    told = [r for r in records if r["prompt"] == 0]
    assert [record["turn"] for record in told] == list(range(count))
    # Each turn was told the answers to all before it.
    assert len(told[-1]["prompt_ids"]) == len("\n\n".join(["a", "x"] * (count - 1) + ["a"]))


# --- answers


def with_stop(*, special: bool) -> tuple[Any, int]:
    """A tokenizer whose template ends every message with a token, and that token."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("target"))
    tokenizer.add_tokens([AddedToken("<stop>", special=special)], special_tokens=special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<stop>{% endfor %}assistant "
    )
    return tokenizer, tokenizer.convert_tokens_to_ids("<stop>")


@pytest.mark.parametrize("special", [True, False])
def test_a_final_stop_token_is_no_part_of_the_answer(special: bool) -> None:
    tokenizer, stop = with_stop(special=special)
    queue, decoder = (
        conversations(tokenizer, conversation("Two and two?", "And three?")),
        Decoder(stop),
    )
    list(queue.begin(decoder))
    said = tokenizer("It is four.").input_ids
    (record,) = queue.finish(decoder, decoder.answer([*said, stop], "stop"))
    assert record["output_ids"] == [*said, stop]
    assert record["tokens"] == len(said) + 1
    assert record["text"] == "It is four."
    (request,) = decoder.asked
    assert tokenizer.decode(request.prompt_ids) == (
        "user Two and two?<stop>assistant It is four.<stop>user And three?<stop>assistant "
    )


@pytest.mark.parametrize("special", [True, False])
def test_other_special_tokens_are_as_in_transformers(special: bool) -> None:
    """One that did not end the answer is told if its tokenizer does not call it special."""
    tokenizer, stop = with_stop(special=special)
    said = [*tokenizer("a").input_ids, stop, *tokenizer("b").input_ids, stop]
    whole = tokenizer.decode(said, skip_special_tokens=True)
    for stops, reason, expected in (
        ([], "length", whole),  # ignore_eos
        ([stop], "stop", tokenizer.decode(said[:-1], skip_special_tokens=True)),
    ):
        queue, decoder = conversations(tokenizer, conversation("Q")), Decoder(*stops)
        list(queue.begin(decoder))
        (record,) = queue.finish(decoder, decoder.answer(said, reason))
        assert record["text"] == expected
    assert ("<stop>" in whole) == (not special)


def test_texts_can_be_written() -> None:
    queue, decoder = conversations(Letters(all="a\ud800b"), conversation("Q")), Decoder()
    list(queue.begin(decoder))
    (record,) = queue.finish(decoder, decoder.answer([1], "length"))
    assert record["text"] == "a?b"
    json.dumps(record, ensure_ascii=False).encode("utf-8")
