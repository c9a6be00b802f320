"""The command line in tests: settings that make a run short, and what it leaves."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QUICK = ("tracker=none", "prompts.limit=3", "max_new_tokens=10", "dtype=float32")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(folder: Path) -> dict[tuple[int, int], list[int]]:
    return {(g["prompt"], g["turn"]): g["output_ids"] for g in lines(folder / "generations.jsonl")}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found
