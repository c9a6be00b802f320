"""Prompt sets: read them from files or data sets, and encode them for a model.

A record becomes a `Prompt` by the fields it has, so the published files of Spec-Bench, MT-Bench,
HumanEval and GSM8K are read as they are, and one file may mix layouts. Scoring answers is no part
of this file.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BUILT_IN = Path(__file__).parents[1] / "data" / "prompts.jsonl"
CHAT_MODES = ("auto", "always", "never")
# Sets that have categories, and how many of them share a limit.
CATEGORIES = {"mt_bench": 8, "spec_bench": 1}

ID_FIELDS = ("question_id", "task_id", "prompt_id", "id")
TEXT_FIELDS = ("turns", "messages", "prompt", "question", "instruction", "text")
# Beside `prompt`, these mark a beginning of code to be continued.
CODE_TASK_FIELDS = ("task_id", "entry_point")
# Instruction sets keep the material an instruction speaks of in a field of its own.
INSTRUCTION_INPUTS = ("input", "context")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a set.

    Args:
        index: place in the set, from 0.
        id: the record's own name, else the index.
        turns: one or more user texts.
        conversation: whether these are messages in a dialogue, or one raw text to continue.
        messages: what was said before the first turn, each with `role` and `content`.
    """

    index: int
    id: str
    category: str | None
    turns: tuple[str, ...]
    conversation: bool
    messages: tuple[dict[str, str], ...] = ()


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
            messages. None finds the layout from each record's own fields.
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
    records = _records(path=path, split=split, name=name)
    prompts = [
        _read(record, index=index, field=field, shown=shown)
        for index, record in enumerate(islice(records, limit))
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
        ValueError: `chat` is unknown or cannot be obeyed, no turn is left, or there are no tokens.
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

    templated = chat == "always" or (chat == "auto" and has_template and prompt.conversation)
    ids = _ids(tokenizer, prompt, _dialogue(prompt, answers), chat if templated else None)
    if not ids:
        raise ValueError(
            f"prompts.chat={chat!r}: prompt {prompt.id!r} encodes to no tokens with this "
            "tokenizer; remove the prompt or use another tokenizer"
        )
    return ids


def _ids(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    messages: list[dict[str, str]],
    chat: str | None,
) -> list[int]:
    """The messages under the chat template, if `chat` asked for it, else joined."""
    if chat is None:
        return list(tokenizer("\n\n".join(one["content"] for one in messages))["input_ids"])
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        # Templates refuse what their model was not trained on, most often a system prompt.
        raise ValueError(
            f"prompts.chat={chat!r}: the chat template refuses prompt {prompt.id!r} "
            f"({_first_line(error)}); use never"
        ) from error
    return list(encoded["input_ids"])


def _dialogue(prompt: Prompt, answers: Sequence[str]) -> list[dict[str, str]]:
    messages = list(prompt.messages)
    for turn, answer in zip(prompt.turns, answers, strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": prompt.turns[len(answers)]})
    return messages


def _records(
    *, path: str | None, split: str | None, name: str | None
) -> Iterator[Mapping[str, Any]]:
    source = BUILT_IN if path is None else Path(path).expanduser()
    shown = "null" if path is None else repr(path)
    if source.suffix not in FILE_SUFFIXES and not source.is_file():
        return iter(_load(path=str(path), split=split, name=name))
    for setting, value in (("split", split), ("name", name)):
        if value is not None:
            raise ValueError(
                f"prompts.{setting}={value!r} is for data sets, but prompts.path={shown} is one "
                "file; use null"
            )
    if not source.is_file():
        raise ValueError(f"prompts.path={shown} is not a file; check the spelling or use null")
    if source.suffix not in FILE_SUFFIXES:
        raise ValueError(
            f"prompts.path={shown} is no kind of file that can be read; "
            f"use one of {', '.join(FILE_SUFFIXES)}"
        )
    # The readers below would call an empty file malformed; no records is what the caller reports.
    if source.stat().st_size == 0:
        return iter(())
    if source.suffix == ".jsonl":
        return _json_lines(source)
    return iter(_load(path=str(source), split="train", name=None))


def _json_lines(source: Path) -> Iterator[Mapping[str, Any]]:
    # Bytes, so that a line that is not UTF-8 is reported by its number like any other.
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"prompts.path={str(source)!r}: line {number} is not JSON "
                    f"({_first_line(error)}); write one record per line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"prompts.path={str(source)!r}: line {number} is a JSON "
                    f"{type(record).__name__}; write one object with named fields per line"
                )
            yield record


def _load(*, path: str, split: str | None, name: str | None) -> "Dataset":
    """Load one split through `datasets`, which is imported only when it is needed."""
    source = Path(path).expanduser()
    saved = any((source / file).is_file() for file in ("dataset_dict.json", "state.json"))
    loaded: Any
    try:
        import datasets

        if saved:
            loaded = datasets.load_from_disk(str(source))
        elif source.is_file():
            loaded = datasets.load_dataset(source.suffix[1:], data_files=str(source), split=split)
        else:
            loaded = datasets.load_dataset(
                str(source) if source.is_dir() else path, name, split=split
            )
    # Every layer below (files, Arrow, the hub, the network) raises kinds of its own.
    except Exception as error:
        advice = "check the file or folder, and prompts.split and prompts.name if they are given"
        if not source.exists():
            advice = (
                "check the id, prompts.name and prompts.split, or give a local file or folder "
                "in case no hub can be reached from here"
            )
        raise ValueError(
            f"prompts.path={path!r} could not be loaded "
            f"({type(error).__name__}: {_first_line(error)}); {advice}"
        ) from error

    if saved and name is not None:
        raise ValueError(f"prompts.name={name!r}: {path!r} was saved without names; use null")
    if isinstance(loaded, datasets.Dataset):
        if saved and split not in (None, str(loaded.split)):
            raise ValueError(f"prompts.split={split!r}: {path!r} was saved as one split; use null")
        return loaded
    chosen = split or ("test" if "test" in loaded or len(loaded) > 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise ValueError(
            f"prompts.split={'null' if split is None else repr(split)} does not name a split of "
            f"prompts.path={path!r}; use one of {', '.join(loaded)}"
        )
    return loaded[chosen]


def _read(record: Mapping[str, Any], *, index: int, field: str | None, shown: str) -> Prompt:
    """Turn one record into a prompt, or say what is wrong with it."""
    # `datasets` fills the fields that a record lacks with None.
    present = {key: value for key, value in record.items() if value is not None}
    name = next((str(present[key]) for key in ID_FIELDS if key in present), str(index))
    where = f"prompt {index} (id {name!r}) of prompts.path={shown}"
    fields = ", ".join(present) or "none"
    key = _find_field(present) if field is None else field
    if key is None:
        raise ValueError(
            f"{where} has no field that is known to hold a prompt (fields: {fields}); "
            "name the one that does with prompts.field"
        )
    if key not in present:
        raise ValueError(f"prompts.field={key!r} is not in {where}; use one of: {fields}")

    value = present[key]
    messages: tuple[dict[str, str], ...] = ()
    if isinstance(value, str):
        code_task = key == "prompt" and not present.keys().isdisjoint(CODE_TASK_FIELDS)
        raw = field is not None or key == "text" or code_task
        if field is None and key == "instruction":
            inputs = (present.get(extra) for extra in INSTRUCTION_INPUTS)
            texts = [text for text in inputs if isinstance(text, str) and text.strip()]
            value = "\n\n".join([value, *texts])
        turns: tuple[str, ...] = (value,)
    elif isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        raw, turns = False, tuple(value)
    elif isinstance(value, list) and all(_is_message(message) for message in value):
        raw = False
        messages, turns = _split_messages(value)
    else:
        setting = f"prompts.path={shown}" if field is None else f"prompts.field={field!r}"
        raise ValueError(
            f"{setting}: {key!r} of {where} is a {type(value).__name__} that is neither text "
            "nor a list of texts or messages; choose another field with prompts.field"
        )
    if not turns:
        raise ValueError(f"{where} has no user turns; remove the record or add a turn")
    if not all(turn.strip() for turn in turns):
        raise ValueError(f"{where} is blank; remove the record or give it a text")
    category = present.get("category")
    return Prompt(
        index=index,
        id=name,
        category=None if category is None else str(category),
        turns=turns,
        conversation=not raw,
        messages=messages,
    )


def _find_field(record: Mapping[str, Any]) -> str | None:
    # MT-Bench on the hub keeps its turns in `prompt`; a `prompt` beside `messages` repeats them.
    if "turns" not in record and isinstance(record.get("prompt"), list):
        return "prompt"
    return next((key for key in TEXT_FIELDS if key in record), None)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _split_messages(
    messages: Sequence[Mapping[str, str]],
) -> tuple[tuple[dict[str, str], ...], tuple[str, ...]]:
    """Split recorded messages into what was said before and the user turns to ask.

    Without recorded answers every user message is a turn. With answers, the dialogue up to its
    last user message is history and only that message is asked; what follows it is dropped.
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    asked = [place for place, message in enumerate(plain) if message["role"] == "user"]
    if not asked:
        return (), ()
    if all(message["role"] == "user" for message in plain[asked[0] :]):
        return tuple(plain[: asked[0]]), tuple(plain[place]["content"] for place in asked)
    return tuple(plain[: asked[-1]]), (plain[asked[-1]]["content"],)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
