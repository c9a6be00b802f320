"""Prompt sets: read them from files or data sets, and encode them for a model."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple

from specdec.lab.prompt_files import records_of
from specdec.lab.prompt_records import Message, label_of, read_record
from specdec.lab.prompt_records import Prompt as Prompt
from specdec.lab.selection import Names, Selection
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
    category: Names | None = None,
    ids: Names | None = None,
    per_category: int | None = None,
    turns: int | None = None,
    shuffle: int | None = None,
) -> list[Prompt]:
    """The prompts of a set that are selected, at least one. (Long by its settings.)

    Args:
        path: None for the built-in set; a file of one of `FILE_SUFFIXES`; a folder; or the id of
            a data set that the `datasets` library can load.
        field: what holds the prompt: a string is raw text, a list a conversation's turns or
            messages. None takes the first of `TEXT_FIELDS` that a record has, a list in `prompt`
            before all but `turns`.
        split: of a data set; None takes `test`, else the only one there is.
        name: configuration of a data set that has several.
        turns: of each conversation, the first so many.
        limit, category, ids, per_category, shuffle: as in `Selection`; what is not selected is not
            looked into.

    Raises:
        ValueError: a setting that cannot be used, a set that is missing, empty or cannot be
            loaded, a category or an id that it does not have, or a record without a prompt.
    """
    selection = Selection(
        category=category, ids=ids, per_category=per_category, shuffle=shuffle, limit=limit
    )
    if turns is not None and turns < 1:
        raise ValueError(f"prompts.turns={turns}: must be at least 1; use null to ask all")
    shown, most = "null" if path is None else repr(path), selection.beginning
    records = list(
        islice(
            records_of(path=path, split=split, name=name, field=field),
            None if most is None else min(most, sys.maxsize),
        )
    )
    if not records:
        raise ValueError(f"prompts.path={shown} holds no records; give a set with at least one")
    labels = [label_of(record, index) for index, (_, record) in enumerate(records)]
    prompts = []
    for index in selection.places(labels, shown):
        place, record = records[index]
        prompt = read_record(record, index=index, field=field, shown=shown, place=place)
        prompts.append(replace(prompt, turns=prompt.turns[:turns]))
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
        ValueError: as of `load_prompts`, after the set's name, and `encode`.
    """
    found: dict[str, list[Asked]] = {}
    number = 0
    for name, path in paths.items():
        by_category = take == "by_category" and name in CATEGORIES
        each = max(1, limit // CATEGORIES[name]) if by_category else None
        first = None if by_category or take == "spread" else limit
        try:
            prompts = load_prompts(path=path, field=None, limit=first, per_category=each)
        except ValueError as error:
            raise ValueError(f"{name}={path}: {error}") from error
        if take == "spread":
            prompts = prompts[:: max(1, len(prompts) // limit)][:limit]
        known = {one.category for asked in found.values() for one in asked}
        found[name] = []
        for prompt in prompts:
            group = (prompt.category if by_category else None) or name
            if by_category and group in known:
                continue
            tokens = encode(tokenizer, prompt, chat=chat)
            found[name].append(Asked(number, f"{group}/{prompt.id}", tokens, prompt.category))
            number += 1
    return found


def prompt_hash(ids: Sequence[int]) -> str:
    """16 hex digits of the SHA-256 of a prompt's tokens, as JSON without spaces: equal where the
    same was asked."""
    text = json.dumps(list(ids), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    if chat == "always" and not has_template(tokenizer):
        raise ValueError(
            "prompts.chat='always' needs a tokenizer with a chat template, and this one has none; "
            "use auto or never"
        )

    by_template = told_by_template(tokenizer, prompt, chat)
    encoded = _templated if by_template else _joined
    ids = encoded(tokenizer, prompt, _dialogue(prompt, answers), chat)
    if prompt.keep is not None:
        ids = _last(ids, prompt.keep, tokenizer)
    if not ids:
        raise ValueError(
            f"prompts.chat={chat!r}: prompt {prompt.id!r} encodes to no tokens with this "
            "tokenizer; remove the prompt or use another tokenizer"
        )
    return ids


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def told_by_template(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, chat: str) -> bool:
    """Whether the prompt goes through the chat template; `chat` as in `encode`."""
    return chat == "always" or (chat == "auto" and has_template(tokenizer) and prompt.conversation)


def _last(ids: list[int], count: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """So many last tokens, those included that a tokenizer puts before every text."""
    special = set(tokenizer.all_special_ids)
    before = list(takewhile(special.__contains__, ids))[: count - 1]
    return [*before, *ids[len(before) :][len(before) - count :]] if len(ids) > count else ids


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
