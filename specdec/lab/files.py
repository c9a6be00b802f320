"""Files that are whole or not there, and JSON that any reader takes."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Files by which a folder is known as that of something.
MARKS = {
    "a run": ("summary.json", "generations.jsonl"),
    "a sweep": ("multirun.yaml",),
    "a record": ("plan.json", "record.json"),
    "a training": ("state.pt", "training.json"),
}


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


def replace_file(path: Path, text: str) -> None:
    """Write the file whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # the name must not be on the disk before the text
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what the system says of a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written, {error.strerror or error}; what was written before is "
            f"kept, and resume=true continues once it can be"
        ) from error


def check_folder(out: Path, own: str) -> None:
    """Raise ValueError for a folder of something else, whose files would be mixed with those of
    what is made.

    Args:
        own: what that is, as in `MARKS`.
    """
    for what, names in MARKS.items():
        if what != own and any((out / name).exists() for name in names):
            raise ValueError(f"out={out}: holds {what}; choose another folder")


def make_folder(out: Path) -> None:
    """Make a folder of results, where there is none.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: cannot be made, {error.strerror}; choose another") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; nothing of one that is not there, or not whole."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
