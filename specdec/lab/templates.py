"""Chat templates: what a model's own template makes of a dialogue, and whether it tells all of it.

A template is a program that came with the model: it may fail in any way, want contents in parts,
or leave out what its model was not trained on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from specdec.lab.prompt_records import Message
from specdec.reasons import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]
# What templates leave out of dialogues of a shape, by tokenizer: found once, not for every text.
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, str | None]]" = WeakKeyDictionary()


def template_hash(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """16 hex digits of the SHA-256 of the chat template, or of all by name; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def templated(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], tools: Tools
) -> str:
    """The text of a dialogue under the chat template, ready for the model's answer.

    Contents go in as texts, and as lists of parts if the template does not take texts.

    Raises:
        ValueError: the template fails, or leaves out a message or the tools; one line.
    """
    reasons = []
    for form in (_plain, _in_parts):
        try:
            text = _rendered(tokenizer, messages, tools, form)
            lost = _left_out(tokenizer, messages, tools, form)
        except Exception as error:  # of jinja, or of anything the template calls
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        if lost is None:
            return text
        reasons.append(f"it leaves out {lost}")
    raise ValueError(reasons[0])


def _plain(content: str) -> Any:
    return content


def _in_parts(content: str) -> Any:
    return [{"type": "text", "text": content}]


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Tools,
    form: Callable[[str], Any],
) -> str:
    formed = [{**message, "content": form(message["content"])} for message in messages]
    text: Any = tokenizer.apply_chat_template(
        formed,
        tools=[dict(tool) for tool in tools] or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    return str(text)


def _left_out(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Tools,
    form: Callable[[str], Any],
) -> str | None:
    """What the template does not tell the model, None if nothing: contents and names are replaced
    by marks, which are looked for. (Contents themselves may be trimmed or escaped.)"""
    marks = {f"mark{i}of": f"message {i} ({m['role']!r})" for i, m in enumerate(messages)}
    marked = [
        _with_calls({**message, "content": mark}, f"call{mark}")
        for mark, message in zip(marks, messages, strict=True)
    ]
    # Some templates tell a call or a text, not both.
    wanted = {
        f"call{mark}" if message.get("tool_calls") else mark: said
        for (mark, said), message in zip(marks.items(), messages, strict=True)
    }
    named = [_named(tool, f"tool{i}of") for i, tool in enumerate(tools)]
    wanted |= {f"tool{i}of": f"tool {i}" for i in range(len(tools))}
    shape = json.dumps(
        [template_hash(tokenizer), form.__name__, marked, named], sort_keys=True, default=repr
    )
    found = _known.setdefault(tokenizer, {})
    if shape not in found:
        found[shape] = _first_missing(_rendered(tokenizer, marked, named, form), wanted, form)
    return found[shape]


def _first_missing(text: str, wanted: Mapping[str, str], form: Callable[[str], Any]) -> str | None:
    """What the first mark stands for that a text does not have."""
    for mark, said in wanted.items():
        content = form(mark)
        raw = not isinstance(content, str) and (
            str(content) in text or json.dumps(content) in text
        )
        if mark not in text or raw:
            return said
    return None


def _with_calls(message: Message, name: str) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_named(c, name) for c in calls]} if calls else message


def _named(described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool, or a call of one, by another name."""
    function = described.get("function")
    if isinstance(function, dict):
        return {**described, "function": {**function, "name": name}}
    return {**described, "name": name}
