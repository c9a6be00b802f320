"""Prompts that are too long: refused, left out or cut, and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specdec.lab.lengths import Fitted, fitted
from specdec.lab.prompts import Prompt, encode
from specdec.models.load import zoo_path
from tests.lab.asking import Write, refusal

CONTEXT, NEW = 40, 10


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(zoo_path("target"))


def raw(tokenizer: PreTrainedTokenizerBase, tokens: int, **said: Any) -> Prompt:
    """A prompt of so many tokens."""
    text = " ".join(f"number {i}" for i in range(tokens))
    ids = tokenizer(text).input_ids[:tokens]
    said = {"turns": (tokenizer.decode(ids),), "conversation": False, **said}
    prompt = Prompt(index=tokens, id=str(tokens), category=None, **said)
    assert len(encode(tokenizer, prompt, chat="never")) == tokens
    return prompt


def fit(tokenizer: PreTrainedTokenizerBase, *prompts: Prompt, **said: Any) -> Fitted:
    said = {"context": CONTEXT, "max_new_tokens": NEW, "chat": "auto", **said}
    return fitted(prompts, tokenizer, **said)


def test_what_leaves_no_room_for_an_answer_is_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    edge = [raw(tokenizer, tokens) for tokens in (29, 30, 31, 60)]
    brief = raw(tokenizer, 35, max_new_tokens=5)
    greedy = raw(tokenizer, 5, max_new_tokens=36)
    found = fit(tokenizer, *edge, brief, greedy, too_long="skip")
    assert [prompt.index for prompt in found.prompts] == [29, 30, 35]
    assert (found.skipped, found.truncated) == (3, 0)
    assert found.told == "prompts.too_long=skip: 3 of 6 prompts skipped: 31, 60, 5"
    assert fit(tokenizer, *edge, too_long="refuse") == Fitted(prompts=edge)
    assert fit(tokenizer, *edge[:2], too_long="skip") == Fitted(prompts=edge[:2])
    for long, names in (
        (range(31, 36), "31, 32, 33, 34, 35"),
        (range(31, 37), "31, 32, 33, 34, 35, ..."),
    ):
        prompts = [edge[0], *(raw(tokenizer, tokens) for tokens in long)]
        assert fit(tokenizer, *prompts, too_long="skip").told.endswith(f"skipped: {names}")
    message = refusal(lambda: fit(tokenizer, edge[3], too_long="skip"))
    assert "prompts.too_long=skip leaves none of 1 prompts" in message


def test_of_a_text_the_last_tokens_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [raw(tokenizer, tokens) for tokens in (30, 31, 60)]
    found = fit(tokenizer, *prompts, too_long="truncate")
    assert (found.skipped, found.truncated) == (0, 2)
    assert found.told == "prompts.too_long=truncate: 2 of 3 prompts truncated: 31, 60"
    for before, after in zip(prompts, found.prompts, strict=True):
        assert after.index == before.index
        ids = encode(tokenizer, before, chat="auto")
        assert encode(tokenizer, after, chat="auto") == ids[-30:]
    message = refusal(
        lambda: fit(tokenizer, raw(tokenizer, 5, max_new_tokens=40), too_long="truncate")
    )
    assert "wants 40 new tokens, the whole context; use skip" in message


def test_what_a_tokenizer_puts_before_every_text_stays(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    class WithBeginning:
        all_special_ids = (1, 2)
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, *tokenizer(text).input_ids]}

    prompt = raw(tokenizer, 60)
    known: Any = WithBeginning()
    (cut,) = fit(known, prompt, too_long="truncate").prompts
    ids = encode(tokenizer, prompt, chat="auto")
    assert encode(known, cut, chat="auto") == [1, 2, *ids[-28:]]
    # At least one token is the prompt's own.
    for room, expected in ((1, ids[-1:]), (2, [1, *ids[-1:]]), (3, [1, 2, *ids[-1:]])):
        (cut,) = fit(known, prompt, too_long="truncate", context=NEW + room).prompts
        assert encode(known, cut, chat="auto") == expected


def test_chat_templates_are_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = raw(tokenizer, 60, conversation=True)
    message = refusal(lambda: fit(tokenizer, asked, too_long="truncate"))
    assert message.startswith("prompts.too_long=truncate: prompt '60' has ")
    assert message.endswith("(prompts.chat=auto); use skip, or prompts.chat=never")
    assert fit(tokenizer, asked, too_long="truncate", chat="never").truncated == 1
    short = raw(tokenizer, 3, conversation=True)
    assert fit(tokenizer, short, asked, too_long="skip").prompts == [short]


def test_a_run_says_what_it_left_out(
    specdec: Callable[..., tuple[int, str, str]], write: Write, tmp_path: Path
) -> None:
    long = {"text": "word " * 5000, "category": "c"}
    path = write({"text": "Once", "category": "c"}, {"text": "x"}, {**long, "id": "far"})
    words = f"prompts.path={path} prompts.category=c max_new_tokens=4 baseline=false tracker=none"
    code, out, err = specdec(*words.split(), "prompts.too_long=skip", f"out={tmp_path}/o")
    assert code == 0, out + err
    assert "prompts.too_long=skip: 1 of 2 prompts skipped: far\n" in out
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert summary["too_long"] == {"skipped": 1, "truncated": 0}
    assert summary["prompts"] == 1
    code, _, err = specdec(*words.split(), "prompts.too_long=cut", f"out={tmp_path}/p")
    assert code == 2
    assert "prompts.too_long=cut: must be one of refuse, skip, truncate" in err
