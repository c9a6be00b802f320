"""Fingerprints: short hashes of what settings name, so that nothing is continued with other
models, tables or code under the same names."""

import hashlib
import json
import os
import pkgutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from specdec.models.load import zoo_path
from specdec.models.standin import named_shape
from specdec.tables import DATA

NOT_READ = ("out", "tracker", "choices", "prompts")  # prompts count as they are once loaded
FILES = ("path", "datastore", "rates", "costs")  # settings whose values may be mere names
TABLES = {"rates": "acceptance", "costs": "costs"}  # those that come with the package
WHOLE = 1 << 22  # bytes of a file that is read to its end
PIECE, PIECES = 1 << 16, 64  # of a larger one


def digest(value: Any) -> str:
    """Of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """Of a file, or of the names and contents of all files in a folder, hidden ones left out.

    Of a large file count its size, its beginning, which holds the header of safetensors, and
    pieces spread over the rest: other weights differ everywhere.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    if not path.is_dir():
        _read(path, found)
        return found.hexdigest()[:16]
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            found.update(f"{name}\0{file.stat().st_size}\0".encode())
            _read(file, found)
    return found.hexdigest()[:16]


def _read(path: Path, found: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            found.update(file.read())
            return
        found.update(str(size).encode() + file.read(WHOLE // 4))
        for number in range(1, PIECES + 1):
            file.seek((size - PIECE) * number // PIECES)
            found.update(file.read(PIECE))


def contents_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of files, folders, models, packaged tables and code of one's own that settings
    name, by setting. A model of the hub has its commit, once it is loaded.

    Raises:
        ValueError: one of them cannot be read.
    """
    found = {}
    for name, value in _texts({k: v for k, v in settings.items() if k not in NOT_READ}):
        try:
            mark = _mark(name.rpartition(".")[2], value)
        except OSError as error:
            raise ValueError(f"{name}={value}: cannot be read, {error.strerror}") from None
        if mark is not None:
            found[name] = mark
    return found


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text among settings, with its name."""
    if isinstance(value, str):
        yield name, value
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list):
        pairs = enumerate(value)
    for key, part in pairs:
        yield from _texts(part, f"{name}.{key}" if name else str(key))


def _mark(name: str, value: str) -> str | None:
    """Of what one setting names; None if that is no file."""
    if name == "_target_":
        return _code(value)
    kind, colon, model = value.partition(":")
    if colon and kind in ("zoo", "standin"):  # `zoo` alone names rates
        return fingerprint(zoo_path(model if kind == "zoo" else named_shape(model, name)[1]))
    place = os.path.expanduser(value)
    if (name in FILES or "/" in value or Path(value).suffix) and os.path.exists(place):
        return fingerprint(Path(place))
    if name in TABLES and (table := DATA / TABLES[name] / f"{value}.json").is_file():
        return fingerprint(table)
    if name == "path":
        with suppress(ValueError):  # no name that the hub could have
            cached = try_to_load_from_cache(value, "config.json")
            return Path(cached).parent.name if isinstance(cached, str) else None
    return None


def _code(target: str) -> str | None:
    """Of the file of a class or function that is not of this package."""
    module = getattr(pkgutil.resolve_name(target), "__module__", None) or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None or module.startswith("specdec.") else fingerprint(Path(file))


def fingerprint_of_code(root: Path, *, without: Collection[str] = ()) -> str:
    """Of the names and contents of all files of Python below a folder, those that links lead to
    among them.

    Args:
        without: names of folders in it that do not count.
    """
    found = hashlib.sha256()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in (*without, "__pycache__"))
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]
