"""What counts as the same thing under the same name."""

import shutil
from pathlib import Path

import pytest

from specdec.lab.fingerprints import PIECE, PIECES, WHOLE, contents_of, fingerprint
from tests.running import ROOT


def test_a_file_is_its_contents(tmp_path: Path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "")):
        (tmp_path / name).write_text(text)
    marks = {name: fingerprint(tmp_path / name) for name in "abcd"}
    assert marks["a"] == marks["b"]
    assert len(set(marks.values())) == 3


def test_a_folder_is_the_names_and_contents_of_its_files(tmp_path: Path):
    folder = tmp_path / "a"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/x").write_text("1")
    (folder / "y").write_text("2")
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    (folder / ".cache").write_text("of some tool")
    assert fingerprint(folder) == first
    (folder / "y").rename(folder / "z")
    assert fingerprint(folder) != first
    (folder / "z").rename(folder / "y")
    (folder / "deep/x").write_text("3")
    assert fingerprint(folder) != first


def test_of_a_large_file_beginning_end_and_size_count(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    size = WHOLE + PIECE * PIECES
    marks = set()
    for place in (None, 0, 1000, size // PIECES, size - 1, size):
        file.write_bytes(b"\0" * size)
        with file.open("r+b") as opened:
            if place is not None:
                opened.seek(place)
                opened.write(b"1")
        marks.add(fingerprint(file))
    assert len(marks) == 6


def test_every_file_that_settings_name_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fingerprinted.py").write_text("def guess(tokens):\n    return []\n")
    for folder in ("store", "prompt"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    (tmp_path / "rates.json").write_text("{}")
    settings = {
        "target": {"path": "zoo:target"},
        "drafter": {
            "_target_": "fingerprinted.guess",
            "datastore": "store",
            "reset": "prompt",  # a word, not the folder of that name
            "parts": {
                "a": {"_target_": "specdec.drafters.ngram.NGram", "path": "standin:llama3_8b"}
            },
            "files": ["./rates.json"],
        },
        "tree": {"rates": "rates.json", "costs": "h200_llama3_8b", "budget": 3},
        "prompts": {"path": "rates.json"},
        "out": "store",
        "dtype": "auto",
    }
    costs = next((ROOT / "specdec/data/costs").glob("*.json"))
    settings["tree"]["costs"] = costs.stem
    found = contents_of(settings)
    assert found == {
        "target.path": fingerprint(ROOT / "specdec/zoo/target"),
        "drafter._target_": fingerprint(tmp_path / "fingerprinted.py"),
        "drafter.datastore": fingerprint(tmp_path / "store"),
        "drafter.parts.a.path": fingerprint(ROOT / "specdec/zoo/target"),
        "drafter.files.0": fingerprint(tmp_path / "rates.json"),
        "tree.rates": fingerprint(tmp_path / "rates.json"),
        "tree.costs": fingerprint(costs),
    }


def test_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert contents_of({"target": {"path": "some/model"}}) == {"target.path": commit}
    assert contents_of({"target": {"path": "some/other"}}) == {}
    assert contents_of({"target": {"path": "no model: at all"}}) == {}


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "rates.json").write_text("{}")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    path = f"{tmp_path}/rates.json"
    with pytest.raises(ValueError, match=rf"^tree\.rates={path}: cannot be read, I/O error$"):
        contents_of({"tree": {"rates": path}})
