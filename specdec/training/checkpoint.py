"""Checkpoints: all that a training must know to go on exactly where it was."""

import os
from pathlib import Path
from typing import Any

import torch

from specdec.reasons import first_line

STATE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a folder at once.

    Raises:
        ValueError: it cannot be written; the one before is kept.
    """
    temporary = folder / f"{STATE}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{folder / STATE}: cannot be written, {error.strerror or error}; the one before it "
            f"is kept, and resume=true continues from there"
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """The checkpoint of a folder.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any class: the file can hold anything
        reason = first_line(error)
        raise ValueError(f"{path}: cannot be continued, {reason}; start anew elsewhere") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path}: is no checkpoint of a training; start anew elsewhere")
    return state
