"""Measured tables: JSON files of the user's, by name those that come with the package, and those
that were measured here and are kept."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from specdec.reasons import first_line

DATA = Path(__file__).parent / "data"
T = TypeVar("T")


def load_table(
    path: str | Path,
    parse: Callable[[Any], T],
    *,
    mend: str,
    packaged: str | None = None,
    setting: str | None = None,
) -> T:
    """What `parse` makes of the JSON in a file.

    Args:
        path: the file; or, without "/" and ".json", the name of one in `specdec/data/<packaged>`.
        parse: may raise KeyError, TypeError or ValueError about what it is given.
        mend: how to get such a file, for error messages.
        packaged: folder of the tables that have names; None if there are none.
        setting: the option that gave `path`, for error messages.

    Raises:
        ValueError: no such file or name, or nothing that `parse` can use; one line that begins
            with the setting and `path`.
    """
    start = f"{setting}={path}" if setting else str(path)
    try:
        return parse(json.loads(_located(str(path), packaged).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{start}: no such file; {mend}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{start}: is not JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{start}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise ValueError(f"{start}: is no such table, it has no {error}; {mend}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{start}: {first_line(error)}") from None


def _located(path: str, packaged: str | None) -> Path:
    if packaged is None or "/" in path or ".json" in path:
        return Path(path)
    found = DATA / packaged / f"{path}.json"
    if not found.is_file():
        known = ", ".join(sorted(file.stem for file in found.parent.glob("*.json")))
        raise ValueError(f"no such table; known are {known}, a file is ./{path} or ends in .json")
    return found


def kept_tables(kind: str) -> Path:
    """Folder of tables measured on this machine: in SPECDEC_CACHE, else in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPECDEC_CACHE") or Path(home) / "specdec") / kind


def keep_table(path: Path, table: Mapping[str, Any]) -> bool:
    """Write a table whole or not at all, whoever else writes it; False if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(table, indent=1) + "\n")
        Path(file.name).replace(path)
    except OSError:
        return False
    return True
