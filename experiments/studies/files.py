"""Result files: written whole or not at all, continued where an earlier run stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file at once, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_suffix(".tmp")
    partly.write_text(json.dumps(result, indent=1) + "\n")
    partly.replace(path)


def resume(path: Path, settings: Mapping[str, Any], command: str) -> dict[str, Any] | None:
    """What an earlier run has measured with the same settings; None if there is no file. The
    commands of all runs are kept.

    Raises:
        ValueError: other settings; one line that names the file and the first that differs.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(settings)).items():
        before = result.get("settings", {}).get(name)
        if before != value:
            raise ValueError(f"{path}: {name}={before} there, {value} now; leave --resume out")
    result["command"] = "; ".join(dict.fromkeys([*result["command"].split("; "), command]))
    return result
