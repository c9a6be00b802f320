"""Files that are whole or not there, and JSON that any reader takes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.files import read_object, replace_file, to_json


def refused(constant: str) -> Any:
    """What a strict reader makes of the constants of Python's JSON that are no JSON."""
    raise AssertionError(constant)


@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_no_number_is_null_however_deep(indent: int | None) -> None:
    value = {"a": [1, (math.nan, {"b": -math.inf})], "c": math.inf, "é": 0.5, "on": True}
    text = to_json(value, indent)
    expected = {"a": [1, [None, {"b": None}]], "c": None, "é": 0.5, "on": True}
    assert json.loads(text, parse_constant=refused) == expected
    assert "é" in text
    assert ("\n" in text) == (indent is not None)
    assert json.loads(to_json(expected, indent)) == expected
    assert "é" in to_json({"é": 1})


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.json"
    replace_file(path, '{"a": "é"}')
    assert (read_object(path), list(tmp_path.iterdir())) == ({"a": "é"}, [path])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"f\.json: cannot be written, No space left on device; "):
        replace_file(path, "{}")
    assert (read_object(path), list(tmp_path.iterdir())) == ({"a": "é"}, [path])
    with pytest.raises(ValueError, match="cannot be written, No such file or directory; "):
        replace_file(tmp_path / "none" / "f.json", "{}")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match="cannot be written, Permission denied; "):
        replace_file(path, "{}")


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 100_000, b"\xff\xfe{".decode("latin-1")])
def test_nothing_is_read_of_what_holds_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.json"
    assert read_object(path) is None
    path.write_text(text, encoding="latin-1")
    assert read_object(path) is None
