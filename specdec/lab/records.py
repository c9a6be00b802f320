"""Records on disk: lines of JSON that are complete or not there, files that are whole or not
there."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from specdec.flight import Step

Record = dict[str, Any]


def step_record(step: Step) -> Record:
    """As a line of steps.jsonl; without sources, if there are none to tell apart."""
    record = asdict(step)
    return record if any(step.sources) else {k: v for k, v in record.items() if k != "sources"}


def to_json(value: Any, indent: int | None = None) -> str:
    """As JSON that any reader takes: NaN and infinities, which JSON does not have, are null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RecordFile:
    """A JSON-lines file that is appended to, each line complete on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = _read_lines(path) if path.exists() else []
        self._file: TextIO | None = None

    def append(self, record: Record, *, flush: bool = True) -> None:
        """Add a line; without `flush` it may reach the disk later."""
        self.records.append(record)
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(to_json(record) + "\n")
        if flush:
            self._file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def rewrite(self, records: list[Record]) -> None:
        """Replace the contents."""
        self.close()
        self.records = records
        lines = [to_json(record) + "\n" for record in records]
        replace_file(self.path, "".join(lines))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_lines(path: Path) -> list[Record]:
    """The complete lines of the file; a last line cut off by a crash is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def replace_file(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
