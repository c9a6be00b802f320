"""Records of prompt sets: every layout that is read, and every refusal."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.prompt_records import TEXT_FIELDS
from tests.lab.asking import Write, load, refusal

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "data"

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published prompt sets are not at {PUBLISHED}"
)


@needs_published
@pytest.mark.parametrize(
    ("file", "count", "first_id", "category", "conversation", "beginning"),
    [
        ("spec_bench", 480, "81", "writing", True, "Compose an engaging travel blog"),
        ("mt_bench", 80, "81", "writing", True, "Compose an engaging travel blog"),
        ("humaneval", 164, "HumanEval/0", None, False, "from typing import List"),
        ("gsm8k_test", 1319, "0", None, True, "Janet\u2019s ducks lay 16 eggs"),
    ],
)
def test_published_files(
    file: str,
    count: int,
    first_id: str,
    category: str | None,
    conversation: bool,
    beginning: str,
) -> None:
    prompts = load(str(PUBLISHED / f"{file}.jsonl"))
    assert len(prompts) == count
    assert [prompt.index for prompt in prompts] == list(range(count))
    assert len({prompt.id for prompt in prompts}) == count
    assert {prompt.conversation for prompt in prompts} == {conversation}
    assert (prompts[0].id, prompts[0].category) == (first_id, category)
    assert prompts[0].turns[0].startswith(beginning)
    assert all(prompt.messages == () for prompt in prompts)


@needs_published
def test_published_turns_and_categories() -> None:
    spec_bench = load(str(PUBLISHED / "spec_bench.jsonl"))
    assert Counter(len(prompt.turns) for prompt in spec_bench) == {1: 400, 2: 80}
    assert Counter(prompt.category for prompt in spec_bench)["translation"] == 80
    mt_bench = load(str(PUBLISHED / "mt_bench.jsonl"))
    assert all(len(prompt.turns) == 2 for prompt in mt_bench)
    # Raw text is left as it is, down to the last line break.
    assert load(str(PUBLISHED / "humaneval.jsonl"), limit=1)[0].turns[0].endswith('"""\n')


@pytest.mark.parametrize(
    ("record", "turns", "conversation"),
    [
        ({"turns": ["a", "b"]}, ("a", "b"), True),
        ({"prompt": ["a", "b"], "prompt_id": 3}, ("a", "b"), True),
        ({"prompt": "def f():\n", "task_id": "T/1"}, ("def f():\n",), False),
        ({"prompt": "def f():\n", "entry_point": "f"}, ("def f():\n",), False),
        ({"question": "How many?", "answer": "4"}, ("How many?",), True),
        ({"prompt": "a"}, ("a",), True),
        ({"question": "a"}, ("a",), True),
        ({"instruction": "a"}, ("a",), True),
        ({"instruction": "a", "input": "b", "output": "c"}, ("a\n\nb",), True),
        ({"instruction": "a", "input": "", "output": "c"}, ("a",), True),
        ({"text": " a"}, (" a",), False),
        ({"turns": None, "text": "a"}, ("a",), False),
    ],
)
def test_layouts(
    write: Write, record: Mapping[str, Any], turns: tuple[str, ...], conversation: bool
) -> None:
    (prompt,) = load(write(record))
    assert (prompt.turns, prompt.conversation, prompt.messages) == (turns, conversation, ())


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def shared(*texts: str) -> list[dict[str, Any]]:
    """As ShareGPT has them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}}
CALLED = {**CALL, "function": {"name": "w", "arguments": {"a": 1}}}
ASKED = {"type": "function", "function": CALLED["function"]}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "1"}
WEATHER = [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
TOLD = [user("Weather?"), answer("", tool_calls=[CALLED]), RESULT]
MMLU = {"question": "1+1?", "choices": ["1", "2"], "answer": 1}
# Name of a layout: (record, what is said before and with the first turn, later turns, unused.)
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str], list[str]]] = {
    "ShareGPT": (
        {"id": "x", "conversations": shared("Hi", "Hello", "Bye")},
        [user("Hi"), answer("Hello"), user("Bye")],
        [],
        [],
    ),
    "ShareGPT with its answer": (
        {"conversations": shared("Hi", "Hello"), "system": "Be brief"},
        [system("Be brief"), user("Hi")],
        [],
        ["the last answer of conversations"],
    ),
    "WildChat": (
        {"conversation": [user("Hi"), answer("Hello")], "model": "m"},
        [user("Hi")],
        [],
        ["model", "the last answer of conversation"],
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, "Ho"]}]},
        [user("Hi\nHo")],
        [],
        [],
    ),
    "function call": (
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "sunny"},
            ],
            "tools": "[]",
        },
        [user("Weather?"), answer("", tool_calls=[ASKED]), {"role": "tool", "content": "sunny"}],
        [],
        [],
    ),
    "call of a function": (
        {
            "messages": [
                user("Weather?"),
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "w", "content": "sunny"},
            ],
        },
        [
            user("Weather?"),
            answer("", tool_calls=[ASKED]),
            {"role": "tool", "name": "w", "content": "sunny"},
        ],
        [],
        [],
    ),
    "SPEED-Bench": (
        {
            "question_id": "a" * 32,
            "category": "rag",
            "sub_category": None,
            "src_id": "1",
            "multiturn": True,
            "turns": ["Hi", "Bye"],
        },
        [user("Hi")],
        ["Bye"],
        ["src_id", "multiturn"],
    ),
    "SPEED-Bench as messages": (
        {"question_id": "a" * 32, "category": "rag", "messages": [user("Hi"), user("Bye")]},
        [user("Hi")],
        ["Bye"],
        [],
    ),
    "tool call": ({"messages": [*WEATHER, user("Thanks")]}, [*TOLD, user("Thanks")], [], []),
    "tool result": ({"messages": WEATHER}, TOLD, [], []),
    "OpenOrca": (
        {"system_prompt": "In French.", "question": "Hi", "response": "x"},
        [system("In French."), user("Hi")],
        [],
        ["response"],
    ),
    "Alpaca": (
        {"system": "In French.", "instruction": "Hi", "input": "", "output": "x"},
        [system("In French."), user("Hi")],
        [],
        ["output"],
    ),
    "two systems": (
        {"system": "A", "messages": [system("B"), user("Hi")]},
        [system("B"), user("Hi")],
        [],
        ["system"],
    ),
    "turns with a system": (
        {"system": "A", "turns": ["Hi", "Bye"]},
        [system("A"), user("Hi")],
        ["Bye"],
        [],
    ),
    "LLaMA-Factory": (
        {"instruction": "And then?", "input": "", "history": [["Hi", "Hello"]]},
        [user("Hi"), answer("Hello"), user("And then?")],
        [],
        [],
    ),
    "history of messages": (
        {"question": "And then?", "history": [user("Hi"), answer("Hello")], "system": "A"},
        [system("A"), user("Hi"), answer("Hello"), user("And then?")],
        [],
        [],
    ),
    "empty history": ({"question": "Hi", "history": [], "tools": "[]"}, [user("Hi")], [], []),
    "messages as JSON": ({"messages": json.dumps([user("Hi")])}, [user("Hi")], [], []),
    "turns as JSON": ({"turns": json.dumps(["Hi", "Bye"])}, [user("Hi")], ["Bye"], []),
    "system in the middle": (
        {"messages": [user("Hi"), system("Be brief"), user("Bye")]},
        [user("Hi"), system("Be brief"), user("Bye")],
        [],
        [],
    ),
    "system at the end": (
        {"messages": [user("Hi"), system("Be brief")]},
        [user("Hi"), system("Be brief")],
        [],
        [],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief"}, user("Hi")], "system": "A"},
        [{"role": "developer", "content": "Be brief"}, user("Hi")],
        [],
        ["system"],
    ),
    "prompt and completion": (
        {"prompt": [user("Hi")], "completion": [answer("x")]},
        [user("Hi")],
        [],
        ["completion"],
    ),
    "MMLU": (MMLU, [user("1+1?\nA. 1\nB. 2")], [], ["answer"]),
    "ARC": (
        {"question": "1+1?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}},
        [user("1+1?\n1. 1\n2. 2")],
        [],
        [],
    ),
    "MedQA": (
        {"question": "1+1?", "options": {"A": "1", "B": "2"}},
        [user("1+1?\nA. 1\nB. 2")],
        [],
        [],
    ),
    "choices of another kind": (
        {"question": "1+1?", "choices": [1, 2], "context": {"a": 1}},
        [user("1+1?")],
        [],
        ["choices", "context"],
    ),
    "SQuAD": (
        {"title": "t", "context": "The sky is blue.", "question": "Colour?"},
        [user("The sky is blue.\n\nColour?")],
        [],
        ["title"],
    ),
    "Dolly": (
        {"instruction": "Summarise", "context": "Text", "response": "x", "category": "c"},
        [user("Text\n\nSummarise")],
        [],
        ["response"],
    ),
    "UltraChat": (
        {"prompt": "Hi", "messages": [user("Hi"), answer("Hello"), user("Bye"), answer("x")]},
        [user("Hi"), answer("Hello"), user("Bye")],
        [],
        ["prompt", "the last answer of messages"],
    ),
    "MBPP": (
        {"task_id": 2, "prompt": "Write f.", "code": "x", "test_list": []},
        [user("Write f.")],
        [],
        ["code"],
    ),
    "HumanEval": (
        {"task_id": "H/0", "prompt": "def f():", "test": "x", "system": "A"},
        [user("def f():")],
        [],
        ["test", "system"],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_stands_beside_the_prompt_is_used_or_named(write: Write, case: str) -> None:
    record, said, later, unused = LAYOUTS[case]
    (prompt,) = load(write(record))
    first = {"role": "user", "content": prompt.turns[0]}
    assert [*prompt.messages, first, *prompt.after] == said
    assert list(prompt.turns[1:]) == later
    assert list(prompt.unused) == unused
    assert prompt.conversation == (case != "HumanEval")


@pytest.mark.parametrize("packed", [False, True])
def test_tools_of_a_record(write: Write, packed: bool) -> None:
    tools = [{"type": "function", "function": {"name": "w"}}]
    value = json.dumps(tools) if packed else tools
    (prompt,) = load(write({"messages": [user("Weather?")], "tools": value}))
    assert prompt.tools == tuple(tools)
    assert prompt.unused == ()
    (prompt,) = load(write({"question": "Weather?", "tools": "a hammer"}))
    assert prompt.tools == ()
    assert prompt.unused == ("tools",)


def test_fields_that_may_hold_the_prompt_in_their_order(write: Write) -> None:
    record: dict[str, Any] = {name: f"in {name}" for name in reversed(TEXT_FIELDS)}
    order = []
    while record:
        (prompt,) = load(write(record))
        order.append(prompt.turns[0].removeprefix("in "))
        del record[order[-1]]
    assert (
        tuple(order)
        == TEXT_FIELDS
        == (
            "turns",
            "messages",
            "conversations",
            "conversation",
            "prompt",
            "question",
            "instruction",
            "text",
        )
    )
    (prompt,) = load(write({"messages": [user("b")], "prompt": ["a"]}))
    assert prompt.turns == ("a",)


@pytest.mark.parametrize(
    ("roles", "history", "turns"),
    [
        ("u", "", "0"),
        ("su", "s", "1"),
        ("suu", "s", "12"),
        ("suau", "sua", "3"),
        ("sua", "s", "1"),
    ],
)
@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_messages(write: Write, field: str, roles: str, history: str, turns: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    (prompt,) = load(write({field: messages}))
    assert prompt.messages == tuple(messages[: len(history)])
    assert prompt.turns == tuple(turns)
    assert prompt.conversation


@pytest.mark.parametrize(
    ("record", "name", "category"),
    [
        ({"question_id": 7, "id": "x", "category": "c"}, "7", "c"),
        ({"id": "x", "category": 2}, "x", "2"),
        ({}, "0", None),
    ],
)
def test_id_and_category(
    write: Write, record: Mapping[str, Any], name: str, category: str | None
) -> None:
    (prompt,) = load(write({**record, "text": "a"}))
    assert (prompt.id, prompt.category) == (name, category)


def test_of_several_names_of_a_record_the_first_that_is_known_counts(write: Write) -> None:
    names = ["question_id", "task_id", "prompt_id", "id"]
    for place, name in enumerate(names):
        (prompt,) = load(write({"text": "a", **{one: one for one in reversed(names[place:])}}))
        assert prompt.id == name


def test_field_names_the_prompt(write: Write) -> None:
    path = write({"question": "q", "body": "raw", "talk": ["a", "b"]})
    assert load(path, field="body")[0].turns == ("raw",)
    assert not load(path, field="question")[0].conversation
    (prompt,) = load(path, field="talk")
    assert (prompt.turns, prompt.conversation) == (("a", "b"), True)


def test_a_record_may_limit_its_own_output(write: Write) -> None:
    limited = {"text": "a", "max_new_tokens": 7}, {"turns": ["b"], "max_new_tokens": 8.0}
    prompts = load(write(*limited, {"text": "c"}))
    assert [prompt.max_new_tokens for prompt in prompts] == [7, 8, None]
    assert not any(prompt.unused for prompt in prompts)


@pytest.mark.parametrize("value", [0, -1, 2.5, "7", True, [7]])
def test_a_limit_that_is_none_is_refused(write: Write, value: Any) -> None:
    path = write({"text": "a", "max_new_tokens": value})
    assert "max_new_tokens is" in refusal(lambda: load(path))


def test_a_run_names_the_fields_it_does_not_use(
    write: Write, specdec: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = write({"question": "a", "answer": "b"}, {"text": "a", "score": 1, "answer": "b"})
    settings = f"prompts=file prompts.path={path} target=hf target.path=./none tracker=none"
    code, out, _ = specdec(*settings.split(), f"out={tmp_path}/out")
    assert code == 2  # there is no such model
    assert "fields of the prompts that are not used: answer, score\n" in out
