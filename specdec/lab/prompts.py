"""Prompt sets: read them from files or data sets, and encode them for a model."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from specdec.lab.prompt_files import records_of
from specdec.lab.prompt_records import Message, read_record
from specdec.lab.prompt_records import Prompt as Prompt
from specdec.lab.templates import templated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MODES = ("auto", "always", "never")
# Sets that have categories, and how many of them share a limit.
CATEGORIES = {"mt_bench": 8, "spec_bench": 1}


class Asked(NamedTuple):
    """The first turn of a prompt in tokens: the number that seeds its randomness, and its name,
    which begins with that of its set or category."""

    id: int
    name: str
    tokens: list[int]
    category: str | None = None


def load_prompts(
    *,
    path: str | None,
    field: str | None,
    limit: int | None,
    split: str | None = None,
    name: str | None = None,
) -> list[Prompt]:
    """The prompts of a set in its order, at least one.

    Args:
        path: None for the built-in set; a `.jsonl`, `.json` or `.parquet` file; a folder; or the
            id of a data set that the `datasets` library can load.
        field: what holds the prompt: a string is raw text, a list a conversation's turns or
            messages. None takes the first of `TEXT_FIELDS` that a record has, a list in `prompt`
            before all but `turns`.
        limit: the first so many; None for all.
        split: of a data set; None takes `test`, else the only one there is.
        name: configuration of a data set that has several.

    Raises:
        ValueError: a setting that cannot be used, a set that is missing, empty or cannot be
            loaded, or a record without a prompt.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"prompts.limit={limit} must be at least 1; use null to read all")
    shown = "null" if path is None else repr(path)
    records = records_of(path=path, split=split, name=name)
    prompts = [
        read_record(record, index=index, field=field, shown=shown, place=place)
        for index, (place, record) in enumerate(
            islice(records, None if limit is None else min(limit, sys.maxsize))
        )
    ]
    if not prompts:
        raise ValueError(f"prompts.path={shown} holds no records; give a set with at least one")
    return prompts


def ask(
    tokenizer: "PreTrainedTokenizerBase",
    paths: Mapping[str, str | None],
    *,
    limit: int,
    take: Literal["first", "spread", "by_category"] = "first",
    chat: str = "auto",
) -> dict[str, list[Asked]]:
    """Read the prompts of several sets, numbered through.

    Args:
        paths: by set, as in `load_prompts`.
        limit: prompts of each set.
        take: the first, or spread evenly over the set. By category: of MT-Bench equally many of
            each category, of Spec-Bench `limit` of each category that no other set has; names then
            begin with the category.
        chat: as in `encode`.

    Raises:
        ValueError: as of `load_prompts` and `encode`.
    """
    found: dict[str, list[Asked]] = {}
    number = 0
    for name, path in paths.items():
        prompts = load_prompts(path=path, field=None, limit=None)
        step = max(1, len(prompts) // limit) if take == "spread" else 1
        by_category = take == "by_category" and name in CATEGORIES
        most = max(1, limit // CATEGORIES[name]) if by_category else limit
        known = {one.category for asked in found.values() for one in asked}
        counts: Counter[str] = Counter()
        found[name] = []
        for prompt in prompts[::step]:
            group = (prompt.category if by_category else None) or name
            counts[group] += 1
            if counts[group] > most or (by_category and group in known):
                continue
            tokens = encode(tokenizer, prompt, chat=chat)
            found[name].append(Asked(number, f"{group}/{prompt.id}", tokens, prompt.category))
            number += 1
    return found


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, *, chat: str, answers: Sequence[str] = ()
) -> list[int]:
    """Token ids, at least one, of the turn that comes after the given answers, with all before it.
    Plain text gets the special tokens its tokenizer adds; a template decides for itself.

    Args:
        chat: `auto` applies the chat template to conversations if the tokenizer has one, `always`
            applies it to every prompt, `never` joins turns and answers with blank lines.
        answers: the model's to the earlier turns.

    Raises:
        ValueError: `chat` is unknown or cannot be obeyed, no turn is left, there are no tokens, or
            the chat template fails or does not tell the model all of it.
    """
    if chat not in CHAT_MODES:
        raise ValueError(f"prompts.chat={chat!r} is not known; use one of {', '.join(CHAT_MODES)}")
    if len(answers) >= len(prompt.turns):
        raise ValueError(
            f"answers holds {len(answers)} texts but prompt {prompt.id!r} has "
            f"{len(prompt.turns)} turns; give fewer answers than turns"
        )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat == "always" and not has_template:
        raise ValueError(
            "prompts.chat='always' needs a tokenizer with a chat template, and this one has none; "
            "use auto or never"
        )

    told = chat == "always" or (chat == "auto" and has_template and prompt.conversation)
    ids = (_templated if told else _joined)(tokenizer, prompt, _dialogue(prompt, answers), chat)
    if not ids:
        raise ValueError(
            f"prompts.chat={chat!r}: prompt {prompt.id!r} encodes to no tokens with this "
            "tokenizer; remove the prompt or use another tokenizer"
        )
    return ids


def _templated(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, messages: list[Message], chat: str
) -> list[int]:
    try:
        text = templated(tokenizer, messages, prompt.tools)
    except ValueError as error:
        tools = _has_tools(prompt, messages)
        mend = "use another model, or remove the prompt" if tools else "use never"
        raise ValueError(
            f"prompts.chat={chat!r}: the chat template of {tokenizer.name_or_path!r} refuses "
            f"prompt {prompt.id!r} ({error}); {mend}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _joined(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, messages: list[Message], chat: str
) -> list[int]:
    if _has_tools(prompt, messages):
        raise ValueError(
            f"prompts.chat={chat!r}: prompt {prompt.id!r} has tools, which only a chat template "
            "can tell a model; use auto and a model that has one, or remove the prompt"
        )
    return list(tokenizer("\n\n".join(one["content"] for one in messages))["input_ids"])


def _has_tools(prompt: Prompt, messages: Sequence[Message]) -> bool:
    return bool(prompt.tools) or any(one.get("tool_calls") for one in messages)


def _dialogue(prompt: Prompt, answers: Sequence[str]) -> list[Message]:
    messages = list(prompt.messages)
    for turn, answer in zip(prompt.turns, answers, strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": prompt.turns[len(answers)]})
    return [*messages, *prompt.after]


def unused_fields(prompts: Sequence[Prompt]) -> list[str]:
    """Fields of the records that are no part of any prompt, in the order of their appearance."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.unused))
