"""Files and data sets of prompts: every kind that is read, and every refusal."""

import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.lab.asking import Write, load, refusal


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


GOOD = '{"text": "Hi"}'
HI, BYE = {"text": "Hi"}, {"text": "Bye"}
USER = {"role": "user", "content": "Hi"}
READ: dict[str, tuple[str, bytes, list[str]]] = {
    "mark": (".jsonl", b"\xef\xbb\xbf" + GOOD.encode(), ["Hi"]),
    "CRLF": (".jsonl", f"{GOOD}\r\n{GOOD}\r\n".encode(), ["Hi", "Hi"]),
    "CR": (".jsonl", f"{GOOD}\r{GOOD}\r".encode(), ["Hi", "Hi"]),
    "UTF-16": (".jsonl", f"{GOOD}\n{GOOD}\n".encode("utf-16"), ["Hi", "Hi"]),
    "UTF-16, other end": (".jsonl", f"\ufeff{GOOD}".encode("utf-16-be"), ["Hi"]),
    "separator of lines": (".jsonl", '{"text": "a\u2028b\x85"}'.encode(), ["a\u2028b\x85"]),
    "NaN": (".jsonl", b'{"text": "Hi", "score": NaN}', ["Hi"]),
    "NUL": (".jsonl", b'{"text": "a\\u0000b"}', ["a\0b"]),
    "upper case": (".JSONL", GOOD.encode(), ["Hi"]),
    "texts": (".json", json.dumps(["Hi", "Bye"]).encode(), ["Hi", "Bye"]),
    "wrapped": (".json", json.dumps({"version": 1, "data": [HI, BYE]}).encode(), ["Hi", "Bye"]),
    "mark and mixed": (
        ".JSON",
        b"\xef\xbb\xbf" + json.dumps([HI, {"turns": ["a"]}]).encode(),
        ["Hi", "a"],
    ),
    "spread": (".json", json.dumps([HI], indent=1).encode("utf-16"), ["Hi"]),
    "another name": (".ndjson", f"{GOOD}\n".encode(), ["Hi"]),
    "packed lines": (
        ".jsonl.gz",
        gzip.compress(f"{GOOD}\r\n{GOOD}".encode("utf-16")),
        ["Hi", "Hi"],
    ),
    "packed list": (".JSON.GZ", gzip.compress(b'["Hi"]'), ["Hi"]),
    "lines": (".json", f"{GOOD}\n{GOOD}\n".encode(), ["Hi", "Hi"]),
    "one record": (".json", GOOD.encode(), ["Hi"]),
    "one dialogue": (".json", json.dumps({"messages": [USER]}).encode(), ["Hi"]),
    "one with tools": (
        ".json",
        json.dumps({"prompt": "Hi", "tools": [{"name": "f"}]}).encode(),
        ["Hi"],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_files_as_they_come(tmp_path: Path, case: str) -> None:
    suffix, content, texts = READ[case]
    path = tmp_path / f"set{suffix}"
    path.write_bytes(content)
    assert [prompt.turns[0] for prompt in load(str(path))] == texts


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "array": (".jsonl", f"[{GOOD}]".encode(), "line 1 is a JSON list"),
    "spread": (".jsonl", json.dumps(HI, indent=1).encode(), "line 1 is not JSON"),
    "only spaces": (".jsonl", b"\n \n", "holds no records"),
    "only spaces, a list": (".json", b"\n \n", "holds no records"),
    "nothing in it": (".json", b"[]", "holds no records"),
    "half a file": (".json", b'[{"text": "Hi"', "is not JSON"),
    "half of UTF-16": (".jsonl", GOOD.encode("utf-16")[:-1], "is not in the encoding"),
    "latin-1": (".json", b'["caf\xe9"]', "is not UTF-8 (byte 0xe9 at character 6)"),
    "deep": (".json", b"[" * 10**5, "is not JSON"),
    "numbers": (".json", b"[1]", "record 1 is a JSON int"),
    "a number": (".json", b"1", "is a JSON int"),
    "columns": (".json", b'{"text": ["Hi", "Bye"]}', "is one object of columns"),
    "columns by number": (".json", b'{"text": {"0": "Hi"}}', "is one object of columns"),
    "a sheet": (".xlsx", b"PK\x03\x04", "no kind of file that can be read; use one of .jsonl"),
    "a packed column store": (".parquet.gz", b"PAR1", "all but the last also as .gz"),
    "packed all the same": (".jsonl", b"\x1f\x8b\x08\x00", "let its name end in .gz"),
    "packed twice": (
        ".jsonl.gz",
        gzip.compress(gzip.compress(b"{}")),
        "let its name end in .gz once",
    ),
    "not packed": (".jsonl.gz", GOOD.encode(), "Not a gzipped file"),
    "begun to be packed": (".jsonl.gz", b"\x1f\x8b", "cut off or damaged behind its beginning"),
    "packed latin-1": (".json.gz", gzip.compress(b'["caf\xe9"]'), "is not UTF-8 (byte 0xe9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    suffix, content, said = REFUSED[case]
    path = tmp_path / f"set{suffix}"
    path.write_bytes(content)
    message = refusal(lambda: load(str(path)))
    assert message.startswith(f"prompts.path={str(path)!r}")
    assert said in message


@pytest.mark.parametrize("path", ["", " ", "x" * 5000, "~nobody-of-that-name/x", "/dev/null"])
def test_paths_where_nothing_can_be(path: str) -> None:
    assert refusal(lambda: load(path)).startswith(f"prompts.path={path!r} is ")


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
    assert "no kind of file" in refusal(lambda: load(write({"text": "a"}, name="set.md")))
    broken = tmp_path / "set.parquet"
    broken.write_bytes(b"not parquet")
    assert "check the file" in refusal(lambda: load(str(broken)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 3 is not JSON"),
        ("[1]", "line 3 is a JSON list"),
        ("\udcff", "line 3 is not UTF-8 (byte 0xff at character 1)"),
        ('{"text": "caf\udce9"}', "line 3 is not UTF-8 (byte 0xe9 at character 14)"),
        ('{"text": "a"},', "line 3 is not JSON that can be read"),
        ('{"text": "a", "x": ' + "[" * 10**5, "line 3 is not JSON that can be read"),
        ('{"text": "a", "x": ' + "9" * 5000 + "}", "line 3 is not JSON that can be read"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line.encode("utf-8", "surrogateescape"))
    message = refusal(lambda: load(str(path)))
    assert said in message
    assert str(path) in message


def test_settings_of_data_sets_are_refused_for_files(write: Write) -> None:
    for path in (write({"text": "a"}), None):
        assert "prompts.split='x'" in refusal(partial(load, path, split="x"))
        assert "prompts.name='x'" in refusal(partial(load, path, name="x"))
