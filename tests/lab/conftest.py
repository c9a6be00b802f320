"""Files of prompts."""

import json
from pathlib import Path

import datasets
import pytest

from tests.lab.asking import Write


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
