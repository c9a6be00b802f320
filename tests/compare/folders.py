"""Run folders made by hand, as docs/outputs.md has them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.compare.figures import Comparison, Entry, Group
from specdec.lab.jobs import Job, Ledger

LENGTHS = [2.0, 2.4, 3.0, 1.5, 2.0, 4.0, 3.0, 2.0]
SLOWER = [1.5, 2.0, 2.0, 1.2, 1.5, 2.4, 2.0, 1.5]
Record = dict[str, Any]
MACHINE = {"hardware": {"device": "cpu", "cpu": "a CPU", "threads": 2}, "versions": {"torch": "2"}}


def texts(
    lengths: Sequence[float],
    *,
    tokens: int = 12,
    category: str = "math",
    turns: int = 1,
    first: int = 0,
    millis: float = 10.0,
) -> tuple[list[Record], list[Record]]:
    """Generations and steps of conversations one at a time, each with its accepted length, a step
    taking `millis`; prompts are numbered from `first`."""
    generations, steps = [], []
    for place, length in enumerate(lengths, start=first):
        for turn in range(turns):
            request, left = place * 1000 + turn, tokens
            new: list[int] = []
            while left:
                new.append(min(left, round(length * (len(new) + 1)) - (tokens - left)))
                left -= new[-1]
            prompt = [7, place, turn]
            mark = hashlib.sha256(json.dumps(prompt, separators=(",", ":")).encode())
            generations.append(
                {
                    "request": request,
                    "prompt": place,
                    "sample": 0,
                    "turn": turn,
                    "id": str(place),
                    "category": category,
                    "prompt_ids": prompt,
                    "prompt_hash": mark.hexdigest()[:16],
                    "text": "",
                    "output_ids": [100 + place + i * i for i in range(tokens)],
                    "finish_reason": "length",
                    "tokens": tokens,
                    "steps": len(new),
                    "drafted": 4 * len(new),
                    "accepted_lengths": new,
                }
            )
            steps += [
                {
                    "requests": [request],
                    "nodes": [4],
                    "depths": [4],
                    "accepted": [n - 1],
                    "tokens": [n],
                    "seconds": {"draft": 2e-4 * millis, "verify": 8e-4 * millis},
                }
                for n in new
            ]
    return generations, steps


def write(folder: Path, side: tuple[Sequence[Record], Sequence[Record]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in zip(("generations", "steps"), side, strict=True):
        lines = "".join(json.dumps(one) + "\n" for one in records)
        (folder / f"{name}.jsonl").write_text(lines)


def run(
    folder: Path,
    side: tuple[Sequence[Record], Sequence[Record]],
    *,
    plain: tuple[Sequence[Record], Sequence[Record]] | None = None,
    drafter: str = "ngram",
    tree: str = "chain",
    budget: int = 4,
    seed: int = 0,
    code: str = "c0de",
    settings: Record | None = None,
    **summary: Any,
) -> Path:
    """A finished run; `summary` adds to its summary.json, None takes away."""
    write(folder, side)
    if plain is not None:
        write(folder / "baseline", plain)
    every = {
        "target.path": "zoo:target",
        "sampling.temperature": 0.0,
        "batch_size": 1,
        "max_new_tokens": 12,
        "seed": seed,
        "prompts.samples": 1,
        "prompts.turns": None,
        "drafter._target_": drafter,
        "tree._target_": tree,
        "tree.budget": budget,
        **(settings or {}),
    }
    parts = {"settings": every, "contents": {"target.path": "f00d"}, "code": code}
    identity = {"schema": 1, "method": "", "baseline": "", "workload": "", "parts": parts}
    (folder / "identity.json").write_text(json.dumps(identity))
    found: Record = {
        "schema": 1,
        "drafter": drafter,
        "tree": tree,
        "children": "top_k",
        "acceptance": "greedy",
        "synthetic": False,
        "lossy": False,
        "lossless": {"verdict": "passed", "reason": "equal"},
        "git": None,
        **MACHINE,
    }
    found |= summary
    kept = {name: value for name, value in found.items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(kept))
    return folder


def job(sweep: Path, number: int, words: str, state: str, **more: Any) -> None:
    """What a sweep's ledger has of a job."""
    times = {"started": f"2026-01-01T00:{number:02}:00", "ended": f"2026-01-01T00:{number:02}:30"}
    Ledger(sweep, "t").write(
        Job(words=words.split(), number=number, state=state, sweep="t", **times | more)
    )


def only(comparison: Comparison) -> Group:
    (group,) = comparison.groups
    return group


def entries(group: Group) -> dict[str, Entry]:
    return {one.name: one for one in group.entries}


def columns(side: tuple[list[Record], list[Record]]) -> tuple[list[int], list[int], list[float]]:
    """Tokens, steps and seconds by prompt, counted from the records."""
    generations, steps = side
    names = [one["request"] for one in generations]
    seconds = [
        sum(sum(s["seconds"].values()) for s in steps if s["requests"] == [name]) for name in names
    ]
    return [g["tokens"] for g in generations], [g["steps"] for g in generations], seconds
