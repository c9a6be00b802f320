"""What a GPU did and when, from a trace of torch.profiler: kernels by group, busy and idle time.

Kernels may overlap: with programmatic dependent launch one starts before the one before it has
ended, and waits. So there are two times of a group: the sum of its kernels, and its share of the
time the device was busy, where every moment belongs to the kernel that started first.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# By the beginning of a kernel's name, or what it contains; the first that fits.
GROUPS = {
    "weights": r"^(stream|ring|widen)_kernel|gemm|gemv|nvjet|cutlass|cublas|splitk",
    "attention": r"^(attention|merge|_plan|_share)_kernel",
    "layers": r"^(add_norm|rotate|gate|write_tree|quantise)_kernel",
    "rules, top tokens": r"^(_scan|_law|_greedy|judge|race|rest|_prepare|_traverse|_divisor"
    r"|_merge|_uniforms|process|note)_kernel",
    "trees": r"^(tree_structure|_extend|_best|_compact)_kernel",
    "cache": r"^commit_path_kernel",
    "copies": r"^mem(cpy|set)",
}
OTHER = "other torch"
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace


class Piece(NamedTuple):
    """A kernel or a copy: its name, and begin and end in microseconds."""

    name: str
    begin: float
    end: float


def group_of(name: str) -> str:
    """Where a kernel belongs."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return OTHER


def pieces_of(trace: dict[str, Any]) -> list[Piece]:
    """Device work of a trace in Chrome's format, by its begin."""
    found = [
        Piece(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in DEVICE_WORK
    ]
    return sorted(found, key=lambda piece: (piece.begin, piece.end))


def read_profile(profile: Any) -> list[Piece]:
    """Device work that a stopped torch.profiler has seen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return pieces_of(json.loads(path.read_text()))


def own_time(pieces: Iterable[Piece]) -> list[float]:
    """Microseconds of each piece in which no earlier one was running; they add up to the time the
    device was busy."""
    found = []
    covered = float("-inf")
    for piece in pieces:
        found.append(max(0.0, piece.end - max(piece.begin, covered)))
        covered = max(covered, piece.end)
    return found


def breakdown(pieces: Sequence[Piece], steps: int) -> dict[str, Any]:
    """What a step consists of, on the average of some that followed one another.

    Returns:
        wall_ms (first begin to last end), busy_ms (union), sum_ms (of kernels), idle (share of
        the wall), and by group own_ms, sum_ms and launches; the longest kernels by name.

    Raises:
        ValueError: no pieces or no steps.
    """
    if not pieces or steps < 1:
        raise ValueError(f"{len(pieces)} kernels in {steps} steps: nothing was profiled")
    wall = max(piece.end for piece in pieces) - pieces[0].begin
    own = own_time(pieces)
    groups: dict[str, dict[str, float]] = {}
    names: dict[str, dict[str, float]] = {}
    for piece, alone in zip(pieces, own, strict=True):
        for table, key in ((groups, group_of(piece.name)), (names, piece.name)):
            one = table.setdefault(key, {"own_ms": 0.0, "sum_ms": 0.0, "launches": 0.0})
            one["own_ms"] += alone / 1e3 / steps
            one["sum_ms"] += (piece.end - piece.begin) / 1e3 / steps
            one["launches"] += 1 / steps
    order = [*GROUPS, OTHER]
    longest = sorted(names.items(), key=lambda item: -item[1]["own_ms"])[:20]
    return {
        "steps": steps,
        "wall_ms": wall / 1e3 / steps,
        "busy_ms": sum(own) / 1e3 / steps,
        "sum_ms": sum(piece.end - piece.begin for piece in pieces) / 1e3 / steps,
        "idle": 1 - sum(own) / wall if wall else 0.0,
        "groups": {name: groups[name] for name in order if name in groups},
        "longest": [{"name": name[:120], "group": group_of(name), **one} for name, one in longest],
    }
