"""Records of prompt sets: a record becomes a `Prompt` by the fields it has.

The published files of Spec-Bench, MT-Bench, HumanEval, GSM8K and their like are read as they are,
and one file may mix layouts. What stands beside the prompt and is no part of it is named, not
used: scoring answers is no part of this.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from specdec.lab.selection import Label

ID_FIELDS = ("question_id", "task_id", "prompt_id", "id")
DIALOGUES = ("turns", "messages", "conversations", "conversation")  # JSON as text, in some sets
TEXT_FIELDS = (*DIALOGUES, "prompt", "question", "instruction", "text")
# Beside `prompt`, these mark a beginning of code to be continued; in sets that keep the code
# apart, as MBPP does, the prompt is a task in words.
CODE_TASK_FIELDS, CODE_APART = ("task_id", "entry_point"), ("code", "test_list")
SYSTEM_FIELDS = ("system", "system_prompt")
CHOICE_FIELDS = ("choices", "options")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What sets call those who speak, where chat templates have another word.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}
TEXT_PARTS = ("text", "input_text", "output_text")
# What SPEED-Bench's published files have where other sets' texts belong.
UNPREPARED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a set.

    Args:
        index: place in the set, from 0.
        id: the record's own name, else the index.
        turns: one or more user texts.
        conversation: whether these are messages in a dialogue, or one raw text to continue.
        messages: what was said before the first turn, each with `role` and `content`.
        after: what was said since the only turn, such as a tool's result.
        tools: descriptions of functions, for the chat template.
        max_new_tokens: of each turn, where the record says so.
        unused: fields of the record that are no part of the prompt.
        keep: of a plain text that is too long, so many of its last tokens are asked.
    """

    index: int
    id: str
    category: str | None
    turns: tuple[str, ...]
    conversation: bool
    messages: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    max_new_tokens: int | None = None
    unused: tuple[str, ...] = ()
    keep: int | None = None


def label_of(record: Mapping[str, Any], index: int) -> Label:
    """What a record is selected by: its own name, else its place, and its category."""
    names = (record.get(key) for key in ID_FIELDS)
    name = next((str(one) for one in names if one is not None), str(index))
    category = record.get("category")
    return Label(name, None if category is None else str(category))


def read_record(
    record: Mapping[str, Any], *, index: int, field: str | None, shown: str, place: str
) -> Prompt:
    """Turn one record into a prompt, or say what is wrong with it.

    Args:
        index, field: as in `Prompt` and `load_prompts`.
        shown: the set, and
        place: where in it the record stands, for error messages.

    Raises:
        ValueError: no prompt in it, or none that can be used.
    """
    # `datasets` fills the fields that a record lacks with None.
    present = {key: value for key, value in record.items() if value is not None}
    name, category = label_of(present, index)
    where = f"prompts.path={shown}: {place} (id {name!r})"
    key = _find_field(present) if field is None else field
    fields = ", ".join(map(_shown, present)) or "none"
    if key is None:
        raise ValueError(
            f"{where} has no field that is known to hold a prompt (fields: {fields}); "
            "name the one that does with prompts.field"
        )
    if key not in present:
        raise ValueError(f"prompts.field={key!r} is not in {where}; use one of: {fields}")
    named = where if field is None else f"prompts.field={field!r} of {where}"
    reader = _Reader(present, key, named=field is not None, where=named)
    prompt = Prompt(index=index, id=name, category=category, **reader.read())
    _check_texts(prompt, key, where)
    return prompt


def _check_texts(prompt: Prompt, key: str, where: str) -> None:
    """Raise ValueError for a text that is blank, stands in place of another, or is none."""
    if not all(turn.strip() for turn in prompt.turns):
        raise ValueError(f"{where}: {key} is blank; remove the record or give it a text")
    if any(UNPREPARED in turn for turn in prompt.turns):
        raise ValueError(
            f"{where}: {key} is SPEED-Bench's placeholder, not the text; prepare the set with its "
            "own prepare script, and give the file that it writes"
        )
    said = [prompt.id, prompt.category, prompt.turns, prompt.messages, prompt.after, prompt.tools]
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a surrogate pair ({error.object[error.start]!a}), which is no "
            "character; remove it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; remove the record") from error


def _find_field(record: Mapping[str, Any]) -> str | None:
    # MT-Bench on the hub keeps its turns in `prompt`; a `prompt` beside `messages` repeats them.
    if "turns" not in record and isinstance(record.get("prompt"), list):
        return "prompt"
    return next((key for key in TEXT_FIELDS if key in record), None)


class _Reader:
    """Reads one record and notes which of its fields it used.

    Args:
        fields: those that hold something.
        key: the one that holds the prompt.
        named: whether the settings named it.
        where: the record, for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], key: str, *, named: bool, where: str) -> None:
        self.fields, self.key, self.named, self.where = fields, key, named, where
        self.used = {key, "category", *ID_FIELDS}
        self.dropped: list[str] = []  # parts of a field that are not used

    def read(self) -> dict[str, Any]:
        """What the record says about a `Prompt`."""
        value = self.fields[self.key]
        if self.key in DIALOGUES and isinstance(value, str):
            value = self._unpacked(value)
        said: dict[str, Any] = {"conversation": not self._raw(value)}
        said["max_new_tokens"] = self._limit()
        if isinstance(value, str):
            said["turns"] = (value if self._raw(value) else self._question(value),)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            said |= self._dialogue(self._messages(value, self.key))
        elif isinstance(value, list):
            said["turns"] = self._turns(value)
        else:
            self._refuse(
                self.key,
                f"is {_kind(value)}, neither text nor a list of texts or messages",
                "choose another field with prompts.field",
            )
        if not said["turns"]:
            raise ValueError(f"{self.where} has no user turns; remove the record or add a turn")
        if said["conversation"]:
            said["messages"] = self._before(said.get("messages"))
            said["tools"] = self._tools()
        rest = {k: v for k, v in self.fields.items() if k not in self.used}
        unused = [_shown(name) for name, value in rest.items() if not _holds_nothing(value)]
        return {**said, "unused": (*unused, *self.dropped)}

    def _raw(self, value: Any) -> bool:
        """Whether it is a text to be continued as it is."""
        if not isinstance(value, str):
            return False
        code_task = (
            self.key == "prompt"
            and not self.fields.keys().isdisjoint(CODE_TASK_FIELDS)
            and self.fields.keys().isdisjoint(CODE_APART)
        )
        return self.named or self.key == "text" or code_task

    def _unpacked(self, text: str) -> Any:
        """A list that was written as JSON, or the text of one turn."""
        if not text.lstrip().startswith(("[", "{")):
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self._refuse(self.key, "looks like JSON and is none", "write it as JSON")

    def _turns(self, texts: list[Any]) -> tuple[str, ...]:
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                self._refuse(f"{self.key}[{place}]", f"is {_kind(text)}", "give it a text")
        if not self.named and self.key not in ("turns", "messages", "prompt"):
            self._refuse(
                self.key,
                "is a list of texts that does not say who speaks",
                "write turns, or messages with role and content",
            )
        return tuple(texts)

    def _question(self, text: str) -> str:
        """With what it is about before it, and what there is to choose from under it."""
        parts = [text]
        if self.key in ("question", "instruction"):
            parts.insert(0, self._text("context"))
            if self.key == "instruction":
                parts.append(self._text("input"))
            parts = ["\n\n".join(part for part in parts if part), *self._choices()]
        return "\n".join(parts)

    def _text(self, name: str) -> str:
        """A field that is used if it is a text that is not blank; else an empty one."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            return ""
        self.used.add(name)
        return value

    def _choices(self) -> list[str]:
        """A line for each choice; lists of texts, and the objects of ARC and MedQA."""
        for name in CHOICE_FIELDS:
            value = self.fields.get(name)
            labels: Any = LETTERS
            if isinstance(value, dict) and isinstance(value.get("text"), list):
                labels, value = value.get("label", LETTERS), value["text"]
            elif isinstance(value, dict):
                labels, value = list(value), list(value.values())
            if (
                isinstance(value, list)
                and 0 < len(value) <= len(labels)
                and all(isinstance(text, str) for text in value)
            ):
                self.used.add(name)
                return [f"{a}. {text}" for a, text in zip(labels, value, strict=False)]
        return []

    def _messages(self, values: Sequence[Any], name: str) -> list[Message]:
        return [self._message(value, f"{name}[{i}]") for i, value in enumerate(values)]

    def _message(self, value: Mapping[str, Any], name: str) -> Message:
        message = {key: given for key, given in value.items() if given is not None}
        role = message.pop("from", None) if "role" not in message else message["role"]
        content = message.pop("value", None) if "content" not in message else message["content"]
        if not isinstance(role, str):
            self._refuse(name, "does not say who speaks", "give it a role")
        if isinstance(content, list):
            content = "\n".join(
                self._part(part, f"{name}.content[{i}]") for i, part in enumerate(content)
            )
        if role == "function_call":  # as LLaMA-Factory has it: the call as JSON in place of a text
            message, content = {**message, "function_call": self._unpacked(str(content))}, None
        if (called := message.pop("function_call", None)) is not None:  # before there were tools
            called = called if isinstance(called, list) else [called]
            if not all(isinstance(one, dict) for one in called):
                mend = "write an object with name and arguments"
                self._refuse(name, "is no call of a function", mend)
            message["tool_calls"] = [{"type": "function", "function": one} for one in called]
        calls = message.get("tool_calls")
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            self._refuse(f"{name}.content", f"is {_kind(content)}", "give it a text")
        if calls:
            message["tool_calls"] = self._calls(calls, f"{name}.tool_calls")
        return {**message, "role": ROLES.get(role, role), "content": content}

    def _part(self, part: Any, name: str) -> str:
        text = part.get("text") if isinstance(part, dict) else part
        other = isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS
        if other or not isinstance(text, str):
            kind = part.get("type", "object") if isinstance(part, dict) else _kind(part)
            self._refuse(name, f"is no text ({kind!r})", "leave the record out")
        return text

    def _calls(self, calls: Any, name: str) -> list[Any]:
        """Calls of tools, with arguments as templates want them: not as the JSON of OpenAI."""
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            self._refuse(name, "is no list of calls", "write a list of objects")
        found = []
        for call in calls:
            inner = call.get("function")
            if isinstance(inner, dict):
                found.append({**call, "function": _with_arguments(inner)})
            else:
                found.append(_with_arguments(call))
        return found

    def _dialogue(self, messages: list[Message]) -> dict[str, Any]:
        """Split recorded messages into what was said before and the user turns to ask.

        Without recorded answers every user message is a turn. With answers, the dialogue is what
        was said up to the last message that is not one, and the last user message in it is asked;
        answers after that are left out.
        """
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
            self.dropped = [f"the last answer of {self.key}"]
        asked = [place for place, one in enumerate(messages) if one["role"] == "user"]
        if not asked:
            return {"turns": ()}
        if len(asked) == len(messages) - asked[0]:
            turns, first = [messages[place]["content"] for place in asked], asked[0]
            return {"messages": tuple(messages[:first]), "turns": tuple(turns)}
        last = asked[-1]
        return {
            "messages": tuple(messages[:last]),
            "turns": (messages[last]["content"],),
            "after": tuple(messages[last + 1 :]),
        }

    def _before(self, messages: Sequence[Message] | None) -> tuple[Message, ...]:
        """What was said before the first turn: the system's words, the history, and these."""
        before = list(messages or ())
        if messages is None:
            before = self._history()
        if not any(one["role"] in ("system", "developer") for one in before):
            system = next(filter(None, map(self._text, SYSTEM_FIELDS)), "")
            if system:
                before.insert(0, {"role": "system", "content": system})
        return tuple(before)

    def _history(self) -> list[Message]:
        """Earlier turns with their answers: pairs, or messages."""
        value = self.fields.get("history")
        if _holds_nothing(value):
            return []
        self.used.add("history")
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            return self._messages(value, "history")
        found: list[Message] = []
        for place, pair in enumerate(value if isinstance(value, list) else [value]):
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(isinstance(text, str) for text in pair)
            ):
                self._refuse(
                    f"history[{place}]",
                    "is no pair of a user's text and its answer",
                    "write it so, or as a message",
                )
            roles = ("user", "assistant")
            found += [{"role": r, "content": text} for r, text in zip(roles, pair, strict=True)]
        return found

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        """Descriptions of functions, or JSON of them; something else by that name is not used."""
        value = self.fields.get("tools")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return ()
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            return ()
        self.used.add("tools")
        return tuple(value)

    def _limit(self) -> int | None:
        value = self.fields.get("max_new_tokens")
        self.used.add("max_new_tokens")
        if value is None:
            return None
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        if not whole or value < 1:
            self._refuse("max_new_tokens", f"is {value!r}", "give it a whole number from 1 on")
        return int(value)

    def _refuse(self, name: str, what: str, mend: str) -> NoReturn:
        raise ValueError(f"{self.where}: {name} {what}; {mend}")


def _shown(name: str) -> str:
    """The name of a field in a message, which has one line."""
    return name if name.isprintable() else ascii(name)


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return dict(call)


def _holds_nothing(value: Any) -> bool:
    return (
        value is None
        or value == []
        or value == {}
        or (isinstance(value, str) and not value.strip())
    )


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object"
