"""Prompts in tokens: raw texts, chat templates of every kind, later turns; the built-in set."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specdec.lab.prompts import Prompt, ask, encode, prompt_hash
from specdec.lab.templates import template_hash
from tests.lab.asking import Write, load, refusal

ZOO_TARGET = Path(__file__).parents[2] / "specdec" / "zoo" / "target"

needs_zoo = pytest.mark.skipif(
    not ZOO_TARGET.is_dir(), reason=f"the built-in models are not at {ZOO_TARGET}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ZOO_TARGET)


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerBase:
    """The same tokenizer without its chat template."""
    loaded = AutoTokenizer.from_pretrained(ZOO_TARGET)
    loaded.chat_template = None
    return loaded


def make(*turns: str, conversation: bool = True, system: str | None = None, **said: Any) -> Prompt:
    if system is not None:
        said["messages"] = ({"role": "system", "content": system},)
    return Prompt(index=0, id="p", category=None, turns=turns, conversation=conversation, **said)


@needs_zoo
def test_raw_text_is_tokenized_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n    return"
    expected = tokenizer(text).input_ids
    for chat in ("auto", "never"):
        ids = encode(tokenizer, make(text, conversation=False), chat=chat)
        assert ids == expected
        assert all(type(token) is int for token in ids)


@needs_zoo
def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    def templated(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids

    user = {"role": "user", "content": "Hello"}
    system = {"role": "system", "content": "Be brief."}
    for chat in ("auto", "always"):
        ids = encode(tokenizer, make("Hello"), chat=chat)
        assert ids == templated([user])
        assert all(type(token) is int for token in ids)
        ids = encode(tokenizer, make("Hello", system="Be brief."), chat=chat)
        assert ids == templated([system, user])
    raw = make("Hello", conversation=False)
    assert encode(tokenizer, raw, chat="always") == templated([user])


@needs_zoo
@pytest.mark.parametrize("chat", ["auto", "always", "never"])
def test_later_turns_follow_the_answers(tokenizer: PreTrainedTokenizerBase, chat: str) -> None:
    prompt = make("First question.", "Second question.", system="Be brief.")
    first = tokenizer.decode(encode(tokenizer, prompt, chat=chat))
    assert "Second question." not in first
    second = tokenizer.decode(encode(tokenizer, prompt, chat=chat, answers=["The first answer."]))
    parts = ["Be brief.", "First question.", "The first answer.", "Second question."]
    places = [second.index(part) for part in parts]
    assert all(before < after for before, after in pairwise(places))
    if chat == "never":
        assert second == "\n\n".join(parts)


@needs_zoo
def test_tokenizer_without_template(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(plain_tokenizer, make("Hello"), chat="auto")
    assert ids == plain_tokenizer("Hello").input_ids
    message = refusal(lambda: encode(plain_tokenizer, make("Hello"), chat="always"))
    assert "prompts.chat='always'" in message


@needs_zoo
def test_encoding_refusals(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = make("Hello")
    message = refusal(lambda: encode(plain_tokenizer, prompt, chat="sometimes"))
    assert "prompts.chat='sometimes'" in message
    message = refusal(lambda: encode(plain_tokenizer, prompt, chat="auto", answers=["a"]))
    assert "has 1 turns" in message
    message = refusal(lambda: encode(plain_tokenizer, make(""), chat="auto"))
    assert "encodes to no tokens" in message
    plain_tokenizer.chat_template = "{{ raise_exception('no system role\\nhere') }}"
    message = refusal(lambda: encode(plain_tokenizer, prompt, chat="auto"))
    assert "no system role" in message


# What templates do with contents that are lists of parts, on their own or beside texts.
IN_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% endfor %}<answer>"
)
IN_TEXTS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<answer>"
FIRST_PART = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m.content[0].text }}\n{% endfor %}<answer>"
)
STRICT_PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('parts') }}"
)
STRICT_PARTS += "{% endif %}{% endfor %}" + IN_PARTS
ESCAPED = IN_TEXTS.replace("m['content']", "m['content'] | trim | escape")
SAID = "<system>Be brief.\n<user>Is 1 < 2?\n<assistant>Yes.\n<user>And user\n<answer>"


@needs_zoo
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (IN_TEXTS, SAID),
        (IN_PARTS, SAID),
        (FIRST_PART, SAID),
        (STRICT_PARTS, SAID),
        (ESCAPED, SAID.replace("1 < 2", "1 &lt; 2")),
    ],
)
def test_templates_of_texts_and_of_parts(
    plain_tokenizer: PreTrainedTokenizerBase, template: str, expected: str
) -> None:
    plain_tokenizer.chat_template = template
    prompt = make("Is 1 < 2?", "And user", system="Be brief.")
    ids = encode(plain_tokenizer, prompt, chat="auto", answers=["Yes."])
    assert plain_tokenizer.decode(ids) == expected


@needs_zoo
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[9].content.x.y }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ range(999999999) | list }}", "OverflowError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ raise_exception('no system role\nhere') }}", "no system role"),
        ("a constant", "it leaves out message 0 ('system')"),
        ("{{ messages[-1]['content'] }}", "it leaves out message 0 ('system')"),
        (IN_TEXTS.replace("messages", "messages[:2]"), "it leaves out message 2 ('assistant')"),
        (
            "{{ messages[0].content }}{{ messages[1].content }}{{ messages[2].content }}",
            "message 3",
        ),
        # A content that is no text must not be told as Python writes it.
        (
            IN_TEXTS.replace("m['content']", "m['content'] if m['content'] is not string"),
            "message 0",
        ),
    ],
)
def test_templates_that_fail_or_leave_out_something(
    plain_tokenizer: PreTrainedTokenizerBase, template: str, reason: str
) -> None:
    plain_tokenizer.chat_template = template
    prompt = make("Is 1 < 2?", "And user", system="Be brief.")
    message = refusal(lambda: encode(plain_tokenizer, prompt, chat="auto", answers=["Yes."]))
    assert message.startswith(f"prompts.chat='auto': the chat template of {str(ZOO_TARGET)!r}")
    assert "prompt 'p'" in message
    assert reason in message
    assert message.endswith("use never")
    # And never is the mend.
    joined = encode(plain_tokenizer, prompt, chat="never", answers=["Yes."])
    assert plain_tokenizer.decode(joined) == "Be brief.\n\nIs 1 < 2?\n\nYes.\n\nAnd user"


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
FOUND = {"role": "tool", "content": "sunny"}
TOOLS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
CALLS += "{{ m.content }} {% endfor %}"


@needs_zoo
def test_tools_are_told_by_a_template_that_can(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    tools = ({"type": "function", "function": {"name": "look"}},)
    asked = make("Weather?", tools=tools, after=(CALLING, FOUND))
    plain_tokenizer.chat_template = TOOLS + CALLS
    ids = encode(plain_tokenizer, asked, chat="auto")
    assert plain_tokenizer.decode(ids) == "look Weather? look sunny "
    for template, said in {
        CALLS: "it leaves out tool 0",
        TOOLS + "{% for m in messages %}{{ m.content }}{% endfor %}": "message 1 ('assistant')",
    }.items():
        plain_tokenizer.chat_template = template
        message = refusal(lambda: encode(plain_tokenizer, asked, chat="auto"))
        assert said in message
        assert message.endswith("use another model, or remove the prompt")
    message = refusal(lambda: encode(plain_tokenizer, asked, chat="never"))
    assert "prompt 'p' has tools" in message


@needs_zoo
def test_what_a_template_leaves_out_is_asked_once_for_dialogues_of_a_shape(
    plain_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    original = type(plain_tokenizer).apply_chat_template

    def counted(self: Any, messages: Any, **options: Any) -> Any:
        rendered.append(messages[-1]["content"])
        return original(self, messages, **options)

    monkeypatch.setattr(type(plain_tokenizer), "apply_chat_template", counted)
    plain_tokenizer.chat_template = IN_TEXTS
    for text in ("a", "b", "c"):
        encode(plain_tokenizer, make(text), chat="auto")
    assert rendered == ["a", "mark0of", "b", "c"]
    encode(plain_tokenizer, make("a", system="x"), chat="auto")
    assert rendered[4:] == ["a", "mark1of"]
    # Another template is another question.
    plain_tokenizer.chat_template = "{{ messages[0].content }}"
    assert "message 1" in refusal(
        lambda: encode(plain_tokenizer, make("a", system="x"), chat="auto")
    )


@needs_zoo
def test_hashes(tokenizer: PreTrainedTokenizerBase) -> None:
    # By `printf %s '[1,22,3]' | sha256sum` and the like.
    assert prompt_hash([1, 22, 3]) == "fe994f1d9f359140"
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = "a {{ b }}"
        assert template_hash(tokenizer) == "efe80ad491deb091"
        tokenizer.chat_template = {"default": "a", "tools": "b"}
        both = template_hash(tokenizer)
        tokenizer.chat_template = {"tools": "b", "default": "a"}
        assert template_hash(tokenizer) == both != template_hash_of(tokenizer, "a")
        assert template_hash_of(tokenizer, None) is None
    finally:
        tokenizer.chat_template = own


def template_hash_of(tokenizer: PreTrainedTokenizerBase, template: Any) -> str | None:
    tokenizer.chat_template = template
    return template_hash(tokenizer)


@needs_zoo
def test_prompts_of_several_sets_are_numbered_through(
    tokenizer: PreTrainedTokenizerBase, write: Write
) -> None:
    def written(name: str, categories: str) -> str:
        records = [
            {"turns": [f"{kind}{i}"], "category": kind} for i, kind in enumerate(categories)
        ]
        return write(*records, name=name)

    paths = {
        "mt_bench": written("mt.jsonl", "aabbab"),
        "spec_bench": written("spec.jsonl", "bccdcccc"),
        "other": written("other.jsonl", "eeeeeeee"),
    }

    def names(**asked: Any) -> list[str]:
        found = [one for group in ask(tokenizer, paths, **asked).values() for one in group]
        assert [one.id for one in found] == list(range(len(found)))
        return [one.name for one in found]

    m, s, o = paths
    assert names(limit=2) == [f"{name}/{i}" for name in (m, s, o) for i in (0, 1)]
    spread = {m: (0, 3), s: (0, 4), o: (0, 4)}
    assert names(limit=2, take="spread") == [f"{k}/{i}" for k, v in spread.items() for i in v]
    # An eighth of the limit of each category of MT-Bench; of Spec-Bench those that it has not.
    assert names(limit=3, take="by_category") == [
        *("a/0", "b/2", "c/1", "c/2", "d/3", "c/4"),
        *("other/0", "other/1", "other/2"),
    ]


def test_built_in_set() -> None:
    prompts = load()
    assert len(prompts) >= 32
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert {prompt.category for prompt in prompts} == {
        "code",
        "dialogue",
        "prose",
        "arithmetic",
        "documentation",
    }
    assert all(turn.strip() for prompt in prompts for turn in prompt.turns)
    assert sum(len(prompt.turns) == 2 for prompt in prompts) == 2
    assert {p.category for p in prompts if p.conversation} == {"dialogue", "arithmetic"}


@needs_zoo
def test_built_in_set_fits_the_built_in_models(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load()
    encoded = [encode(tokenizer, prompt, chat="auto") for prompt in prompts]
    assert all(0 < len(ids) < 400 for ids in encoded)
    # Some begin alike, so that a cache that shares prefixes has pages to share.
    heads = Counter(tuple(ids[:64]) for ids in encoded if len(ids) >= 64)
    assert max(heads.values()) >= 3
    # The tokenizer joins a line break to the indentation after it, so code that stops at a bare
    # line break is a text the models saw only as the end of a file.
    assert not any(
        prompt.turns[0][-1].isspace() for prompt in prompts if prompt.category == "code"
    )
