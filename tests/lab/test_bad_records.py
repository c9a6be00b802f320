"""Records of prompt sets that cannot be used: each is refused by its place and its field."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.lab.asking import Write, load, refusal


@pytest.mark.parametrize(
    ("record", "field", "said"),
    [
        ({"body": "a", "score": 1}, None, "(fields: body, score)"),
        ({"text": "a", "score": 1}, "body", "prompts.field='body'"),
        ({"text": "a", "score": 1}, "body", "use one of: text, score"),
        ({"text": None}, "text", "use one of: none"),
        ({"text": "a", "score": 1}, "score", "prompts.field='score'"),
        ({"text": 1}, None, "text is a number, neither text nor a list"),
        ({"turns": ["a", 1]}, None, "turns[1] is a number"),
        ({"turns": ["a", None]}, None, "turns[1] is null"),
        ({"turns": [["a"]]}, None, "turns[0] is a list"),
        ({"turns": "['a']"}, None, "turns looks like JSON and is none"),
        ({"text": ["a", "b"]}, None, "text is a list of texts that does not say who speaks"),
        ({"conversation": ["a", "b"]}, None, "does not say who speaks"),
        ({"messages": [{"role": "user"}]}, None, "messages[0].content is null"),
        ({"messages": [{"content": "a"}]}, None, "messages[0] does not say who speaks"),
        ({"messages": [{"role": "user", "content": 1}]}, None, "messages[0].content is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            None,
            "messages[0].content[0] is no text ('image_url')",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]},
            None,
            "messages[0].content[0] is no text ('image')",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "f()"},
                ]
            },
            None,
            "conversations[1] is no call of a function; write an object",
        ),
        (
            {
                "turns": [
                    "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
                ]
            },
            None,
            "turns is SPEED-Bench's placeholder, not the text; prepare the set",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            None,
            "has no user turns",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "tool_calls": 1}]},
            None,
            "messages[1].tool_calls is no list of calls",
        ),
        ({"question": "a", "history": [["b"]]}, None, "history[0] is no pair"),
        ({"question": "a", "history": "b"}, None, "history[0] is no pair"),
        ({"text": "a\ud800"}, None, "half a surrogate pair ('\\ud800')"),
        ({"question": "a", "system": "\udfff"}, None, "half a surrogate pair"),
        ({"text": "a", "id": "\ud83d"}, None, "half a surrogate pair"),
        ({"messages": [{"role": "system", "content": "a"}]}, None, "has no user turns"),
        ({"bo\ndy": "a"}, None, "(fields: 'bo\\ndy')"),
        ({"turns": []}, None, "has no user turns"),
        ({"text": " \n"}, None, "line 2 (id '1')"),
        ({"turns": ["a", ""], "id": "x"}, None, "line 2 (id 'x')"),
        ({"text": ""}, None, "is blank"),
    ],
)
def test_bad_records(
    write: Write, record: Mapping[str, Any], field: str | None, said: str
) -> None:
    good = {"text": "a"} if field is None else {field: "a"}
    message = refusal(lambda: load(write(good, record), field=field))
    assert said in message
    assert "prompts.path" in message
