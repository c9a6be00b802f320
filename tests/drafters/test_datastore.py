"""Datastores: built as a plain sort would, searched as a plain scan would, refused where they are
not what the target needs."""

import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from specdec.drafters.datastore import METADATA, SUFFIXES, TOKENS, Datastore, fingerprint
from specdec.experiments.studies import lookup_speed
from specdec.experiments.tools import build_datastore
from specdec.experiments.tools.build_datastore import build, documents, main
from specdec.models.load import zoo_path

pytest.importorskip("pydivsufsort")

ROOT = Path(__file__).parents[2]
TEXTS = ["def f(x):\n    return x\n", "It was a dark night.", "def f(y):\n    return y\n"]


class Numbers:
    """A tokenizer of texts that are numbers."""

    name_or_path = "numbers"

    def __init__(self, vocabulary: int = 9) -> None:
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {"0": 0, str(self.vocabulary - 1): self.vocabulary - 1}

    def __call__(self, text: str | list[str], **_: Any) -> SimpleNamespace:
        if isinstance(text, str):
            ids: Any = [int(word) for word in text.split() if word.isdigit()]
        else:
            ids = [self(one).input_ids for one in text]
        return SimpleNamespace(input_ids=ids)


def store_of(folder: Path, texts: Sequence[Sequence[int]], vocabulary: int = 9) -> Datastore:
    tokenizer = Numbers(vocabulary)
    build((" ".join(map(str, text)) for text in texts), folder, tokenizer=tokenizer, name="n")
    return Datastore.open(folder, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(zoo_path("target"))


def text_of(store: Datastore) -> list[int]:
    return np.frombuffer(store.tokens, dtype=f">u{store.width}").tolist()


# --- look-up

corpora = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    texts=corpora,
    context=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    vocabulary=st.sampled_from([9, 70_000]),
    min_match=st.integers(1, 3),
    longer=st.integers(0, 4),
    reach=st.integers(1, 4),
)
def test_the_longest_match_and_all_that_follows(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[int]],
    context: list[int],
    vocabulary: int,
    min_match: int,
    longer: int,
    reach: int,
) -> None:
    store = store_of(tmp_path_factory.mktemp("s") / "s", texts, vocabulary)
    flat = text_of(store)
    separator = 256**store.width - 1
    assert flat == [token for text in texts if text for token in [*text, separator]]
    assert store.suffixes.tolist() == sorted(range(len(flat)), key=lambda p: flat[p:])
    assert len(store) == len(flat)

    found = store.find(context, min_match, min_match + longer)
    lengths = [
        n
        for n in range(min_match, min(len(context), min_match + longer) + 1)
        if any(text[i : i + n] == context[-n:] for text in texts for i in range(len(text)))
    ]
    if not lengths:
        assert found is None
        return
    assert found is not None
    assert found.length == max(lengths)
    followed = Counter(
        tuple(text[end : end + reach])
        for text in texts
        for end in range(found.length, len(text) + 1)
        if text[end - found.length : end] == context[-found.length :]
    )
    assert Counter(store.continuations(found, reach, 10**6)) == followed


def test_samples_keep_proportions(tmp_path: Path) -> None:
    texts = [[1, 2, 3]] * 60 + [[1, 2, 4]] * 30 + [[1, 2, 5]] * 10
    store = store_of(tmp_path / "s", texts)
    found = store.find([7, 1, 2], 1, 4)
    assert found is not None
    assert (found.length, found.last - found.first) == (2, 100)
    samples = Counter(store.continuations(found, 1, 10))
    assert samples == {(3,): 6, (4,): 3, (5,): 1}


def test_tokens_that_the_tokenizer_does_not_have_match_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[1, 2, 3]])
    assert store.find([1, 2, 70_000], 1, 4) is None
    assert store.find([8], 1, 4) is None


def test_suffixes_of_a_real_text_are_in_order(tmp_path: Path, tokenizer: Any) -> None:
    """Tokens of both bytes, more than a slice of the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_datastore, "SLICE", 1000)
        text = (ROOT / "README.md").read_text()[:9000]
        about = build([text, text[:500]], tmp_path / "s", tokenizer=tokenizer, name="zoo:target")
    store = Datastore.open(tmp_path / "s", tokenizer=tokenizer)
    flat = text_of(store)
    assert flat[:-1].index(65535) == len(tokenizer(text).input_ids)
    assert store.suffixes.tolist() == sorted(range(len(flat)), key=lambda p: flat[p:])
    assert (about["tokens"], about["documents"]) == (len(flat), 2)


def test_the_widths_of_tokens_and_of_positions(tmp_path: Path) -> None:
    for vocabulary, width in ((65_534, 2), (65_535, 4)):
        store = store_of(tmp_path / str(width), [[0, vocabulary - 1]], vocabulary)
        assert store.width == width
        assert store.find([vocabulary - 1], 1, 1) is not None
    build_datastore.sort(tmp_path / "4", 4, 8)
    suffixes = np.fromfile(tmp_path / "4" / SUFFIXES, dtype="<i8")
    assert suffixes.tolist() == [0, 1, 2]


# --- refusals


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    build(TEXTS, tmp_path / "s", tokenizer=tokenizer, name="zoo:target", sources=["a.txt"])
    return tmp_path / "s"


def refused(folder: Path, tokenizer: Any) -> str:
    with pytest.raises(ValueError, match=r"drafter\.datastore=") as error:
        Datastore.open(folder, tokenizer=tokenizer)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_no_folder_and_no_datastore(tmp_path: Path, tokenizer: Any) -> None:
    message = refused(tmp_path / "nothing", tokenizer)
    assert (
        "no such folder; python -m specdec.experiments.tools.build_datastore tokenizer=" in message
    )
    assert "not a datastore" in refused(tmp_path, tokenizer)


@pytest.mark.parametrize("name", [TOKENS, SUFFIXES])
def test_a_truncated_or_missing_file(folder: Path, tokenizer: Any, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2])
    message = refused(folder, tokenizer)
    assert f"{name} has {len(whole) - 2} bytes instead of {len(whole)}" in message
    (folder / name).unlink()
    assert f"{name} has 0 bytes" in refused(folder, tokenizer)


def test_another_format_and_damaged_metadata(folder: Path, tokenizer: Any) -> None:
    about = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(about | {"format": 99}))
    assert "format 99, but 1 is read" in refused(folder, tokenizer)
    for text in ("{", "[]", "{}"):
        (folder / METADATA).write_text(text)
        assert "is damaged" in refused(folder, tokenizer)


def test_another_tokenizer(folder: Path, tokenizer: Any) -> None:
    message = refused(folder, Numbers())
    assert "made with the tokenizer zoo:target" in message
    assert "numbers" in message
    assert "build_datastore tokenizer=numbers out=OTHER_FOLDER a.txt" in message
    Datastore.open(folder, tokenizer=AutoTokenizer.from_pretrained(zoo_path("draft")))


def test_a_tokenizer_that_encodes_differently_is_another(tokenizer: Any) -> None:
    other = AutoTokenizer.from_pretrained(zoo_path("target"))
    assert fingerprint(other) == fingerprint(tokenizer)
    other.backend_tokenizer.pre_tokenizer = None
    assert other.get_vocab() == tokenizer.get_vocab()
    assert fingerprint(other) != fingerprint(tokenizer)


def test_an_interrupted_build_is_no_datastore(tmp_path: Path, tokenizer: Any) -> None:
    def texts() -> Iterator[str]:
        yield "x" * (build_datastore.BATCH + 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(texts(), tmp_path / "s", tokenizer=Numbers(), name="n")
    assert (tmp_path / "s" / TOKENS).exists()
    assert "interrupted" in refused(tmp_path / "s", tokenizer)
    assert len(store_of(tmp_path / "s", [[1]])) == 2  # and does not stand in the way


# --- building


def test_documents_of_files_folders_and_data_sets(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text(lines)
    with lzma.open(tmp_path / "c.jsonl.xz", "wt") as file:
        file.write(lines)
    table = datasets.Dataset.from_dict({"body": TEXTS})
    table.to_parquet(tmp_path / "d.parquet")
    expected = {"a.txt": TEXTS[:1]} | dict.fromkeys(("b.jsonl", "c.jsonl.xz", "d.parquet"), TEXTS)
    for name, texts in expected.items():
        assert list(documents(str(tmp_path / name), field="body")) == texts
    assert list(documents(str(tmp_path), field="body")) == [*TEXTS[:1], *TEXTS, *TEXTS, *TEXTS]


def test_documents_of_a_data_set_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `datasets` library itself, with a folder in the place of the hub."""
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "train.parquet")
    real = datasets.load_dataset
    monkeypatch.setattr(
        build_datastore.datasets,
        "load_dataset",
        lambda path, name, **options: real(str(tmp_path), name, **options),
    )
    assert list(documents("some/set")) == TEXTS
    with pytest.raises(ValueError, match="some/set: cannot be loaded as a data set"):
        list(documents("some/set", split="test"))


def test_the_command_builds_what_a_drafter_opens(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    words = ["tokenizer=zoo:target", f"out={tmp_path / 's'}", "limit=2"]
    assert main([*sources, *words]) == 0
    assert "drafter.datastore=" in capsys.readouterr().out
    about = json.loads((tmp_path / "s" / METADATA).read_text())
    ids = [tokenizer(text).input_ids for text in (TEXTS[0], *TEXTS[:2])]
    assert about["documents"] == 3
    assert about["tokens"] == sum(map(len, ids)) + 3
    assert about["sources"] == sources
    store = Datastore.open(tmp_path / "s", tokenizer=tokenizer)
    found = store.find(ids[2][:3], 1, 9)
    assert found is not None
    assert next(store.continuations(found, 2, 1)) == tuple(ids[2][3:5])


def test_tokens_end_where_they_are_told_to(tmp_path: Path) -> None:
    about = build(["1 2 3", "4 5 6"], tmp_path / "s", tokenizer=Numbers(), name="n", max_tokens=7)
    assert about["tokens"] == 7
    store = Datastore.open(tmp_path / "s", tokenizer=Numbers())
    assert text_of(store) == [1, 2, 3, 65535, 4, 5, 65535]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("nothing.txt out=s tokenizer=zoo:target", "nothing.txt: no such file"),
        (
            "binary.txt ./none out=s tokenizer=zoo:target",
            "./none: no such file",
        ),  # looked at first
        ("a.txt out=s tokenizer=zoo:lion", "tokenizer=zoo:lion: no such built-in model"),
        ("a.txt out=s tokenizer=./none", "tokenizer=./none: cannot be loaded"),
        ("a.txt out=made tokenizer=zoo:target", "out=made: holds a datastore"),
        ("bad.jsonl out=s tokenizer=zoo:target", "bad.jsonl: line 2 is not JSON"),
        ("b.jsonl out=s tokenizer=zoo:target field=x", "no text in field=x"),
        ("blank.txt out=s tokenizer=zoo:target", "blank.txt: no tokens in there"),
        ("binary.txt out=s tokenizer=zoo:target", "binary.txt: not a text in UTF-8"),
        ("hole out=s tokenizer=zoo:target", "hole: a folder without files"),
        (
            "a.txt out=s tokenizer=zoo:target limit=0",
            "limit=0: must be greater than or equal",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("blank.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("b.jsonl").write_text('{"text": "a"}\n')
    Path("bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    Path("hole").mkdir()
    Path("made").mkdir()
    Path("made", METADATA).write_text("{}")
    assert main(arguments.split()) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("error: ") == 1
    assert not Path("s", METADATA).exists()


def test_without_pydivsufsort_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(ValueError, match=r"pip install 'specdec-lab\[datastore\]'"):
        build(TEXTS, tmp_path / "s", tokenizer=Numbers(), name="n")
    assert not (tmp_path / "s").exists()


def test_lookup_speed_measures_every_source(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{t} {i % 7}. " * 30}) for i in range(60) for t in TEXTS]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = tmp_path / "l.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup_speed, "HELD_OUT", 7)
        patch.setattr(lookup_speed, "HISTORY", (5, 64))
        patch.setattr(lookup_speed, "WARM_UP", 10)
        patch.setattr(lookup_speed, "OWN_TEXTS", (256,))
        words = ["tokens=40000", "queries=100", f"out={out}"]
        assert lookup_speed.main([str(tmp_path / "t.jsonl"), *words]) == 0
    found = json.loads(out.read_text())
    assert found["datastore"]["tokens"] == 40_000
    assert found["datastore"]["rounds"] > 1
    assert str(tmp_path) not in found["command"]
    assert len(found["lookup_us"]) == 6
    for parts in found["lookup_us"].values():
        assert parts["match"]["steps"] + parts["no_match"]["steps"] > 0
        assert parts["match"]["median"] > 0
