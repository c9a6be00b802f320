"""Prompt sets: every layout that is read, every refusal, and the encoding of turns."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specdec.lab.prompts import Prompt, encode, load_prompts

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "data"
ZOO_TARGET = ROOT / "specdec" / "zoo" / "target"

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published prompt sets are not at {PUBLISHED}"
)
needs_zoo = pytest.mark.skipif(
    not ZOO_TARGET.is_dir(), reason=f"the built-in models are not at {ZOO_TARGET}"
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records, or lines as they are, to a JSONL file and return its path."""

    def write_file(*records: object, name: str = "set.jsonl") -> str:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts away from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ZOO_TARGET)


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerBase:
    """The same tokenizer without its chat template."""
    loaded = AutoTokenizer.from_pretrained(ZOO_TARGET)
    loaded.chat_template = None
    return loaded


def load(
    path: str | None = None, *, field: str | None = None, limit: int | None = None, **kwargs: Any
) -> list[Prompt]:
    return load_prompts(path=path, field=field, limit=limit, **kwargs)


def make(*turns: str, conversation: bool = True, system: str | None = None) -> Prompt:
    messages = () if system is None else ({"role": "system", "content": system},)
    return Prompt(
        index=0, id="p", category=None, turns=turns, conversation=conversation, messages=messages
    )


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the message
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_field_names_the_prompt(write: Write) -> None:
    path = write({"question": "q", "body": "raw", "talk": ["a", "b"]})
    assert load(path, field="body")[0].turns == ("raw",)
    assert not load(path, field="question")[0].conversation
    (prompt,) = load(path, field="talk")
    assert (prompt.turns, prompt.conversation) == (("a", "b"), True)


def test_blank_lines_and_mixed_layouts(write: Write) -> None:
    prompts = load(write("", {"text": "a"}, "  ", {"turns": ["b"]}, ""))
    assert [(p.index, p.turns, p.conversation) for p in prompts] == [
        (0, ("a",), False),
        (1, ("b",), True),
    ]


def test_limit(write: Write) -> None:
    path = write({"text": "a"}, {"text": "b"}, "what lies behind the limit is not read")
    assert [prompt.turns[0] for prompt in load(path, limit=2)] == ["a", "b"]
    assert len(load(write({"text": "a"}), limit=5)) == 1


RECORDS: list[dict[str, Any]] = [
    {"question_id": "x", "category": "talk", "turns": ["one", "two"]},
    {"question_id": "y", "category": "talk", "turns": ["three"]},
]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", [".json", ".parquet"])
def test_other_files_agree_with_jsonl(tmp_path: Path, write: Write, kind: str) -> None:
    path = tmp_path / f"set{kind}"
    if kind == ".json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    else:
        datasets.Dataset.from_list(RECORDS).to_parquet(path)
    assert load(str(path)) == load(write(*RECORDS))
    assert load(str(path), limit=1) == load(write(*RECORDS), limit=1)


def saved_splits(folder: Path, names: Sequence[str]) -> str:
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_saved_dataset(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    assert load(str(folder)) == load(write(*RECORDS))
    assert "prompts.split='test'" in refusal(lambda: load(str(folder), split="test"))
    assert "prompts.name='main'" in refusal(lambda: load(str(folder), name="main"))


def test_splits(tmp_path: Path) -> None:
    several = saved_splits(tmp_path / "several", ["train", "test"])
    assert load(several)[0].turns == ("test",)
    assert load(several, split="train")[0].turns == ("train",)
    assert load(saved_splits(tmp_path / "one", ["train"]))[0].turns == ("train",)
    unclear = saved_splits(tmp_path / "unclear", ["train", "validation"])
    for split in (None, "test"):
        message = refusal(partial(load, unclear, split=split))
        assert "prompts.split" in message
        assert "train, validation" in message


@pytest.mark.usefixtures("own_cache")
def test_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert load(str(folder))[0].turns == ("a",)
    assert load(str(folder), split="test")[0].turns == ("a",)
    assert "prompts.split" in refusal(lambda: load(str(folder), split="dev"))


@pytest.mark.usefixtures("own_cache")
def test_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(lambda: load("nobody/no-such-set"))
    assert "prompts.path='nobody/no-such-set'" in message
    assert "no hub can be reached" in message


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit: int) -> None:
    assert f"prompts.limit={limit}" in refusal(lambda: load(limit=limit))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_missing_and_empty_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"set{suffix}"
    assert f"prompts.path={str(path)!r} is not a file" in refusal(lambda: load(str(path)))
    path.touch()
    assert f"prompts.path={str(path)!r} holds no records" in refusal(lambda: load(str(path)))


def test_unreadable_files(tmp_path: Path, write: Write) -> None:
    assert "no kind of file" in refusal(lambda: load(write({"text": "a"}, name="set.txt")))
    broken = tmp_path / "set.parquet"
    broken.write_bytes(b"not parquet")
    assert "check the file" in refusal(lambda: load(str(broken)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 3 is not JSON"),
        ("[1]", "line 3 is a JSON list"),
        ("\udcff", "line 3 is not JSON"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line.encode("utf-8", "surrogateescape"))
    message = refusal(lambda: load(str(path)))
    assert said in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("record", "field", "said"),
    [
        ({"body": "a", "score": 1}, None, "(fields: body, score)"),
        ({"text": "a", "score": 1}, "body", "prompts.field='body'"),
        ({"text": "a", "score": 1}, "body", "use one of: text, score"),
        ({"text": None}, "text", "use one of: none"),
        ({"text": "a", "score": 1}, "score", "prompts.field='score'"),
        ({"text": 1}, None, "is a int that is neither text nor a list"),
        ({"turns": ["a", 1]}, None, "is a list that is neither"),
        ({"messages": [{"role": "user"}]}, None, "is a list that is neither"),
        ({"messages": [{"role": "system", "content": "a"}]}, None, "has no user turns"),
        ({"turns": []}, None, "has no user turns"),
        ({"text": " \n"}, None, "prompt 1 (id '1')"),
        ({"turns": ["a", ""], "id": "x"}, None, "prompt 1 (id 'x')"),
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


def test_settings_of_data_sets_are_refused_for_files(write: Write) -> None:
    for path in (write({"text": "a"}), None):
        assert "prompts.split='x'" in refusal(partial(load, path, split="x"))
        assert "prompts.name='x'" in refusal(partial(load, path, name="x"))


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
