"""Whether times of several runs may be compared, and how they were measured."""

from collections.abc import Sequence

from specdec.compare.grouping import Workload, several
from specdec.compare.read import Run
from specdec.compare.sums import total
from specdec.lab.statistics import PACE


def clock_of(work: Workload) -> tuple[bool, str]:
    """Whether figures have times at all, and what to say of them."""
    decoded = [run for run in work.runs if not run.replayed]
    if not decoded:
        return False, "replayed: nothing was decoded; predictions are of a cost table"
    machines = {run.machine for run in decoded} - {None}
    if len(machines) > 1:
        return False, f"lengths only: runs on different machines or versions ({_apart(machines)})"
    if not machines:
        return False, "lengths only: the runs were killed before they noted their machine"
    return True, ""


def _apart(machines: set[str | None]) -> str:
    """What differs, of texts with parts between commas."""
    parts = [str(machine).split(", ") for machine in sorted(map(str, machines))]
    common = set.intersection(*map(set, parts))
    return "; ".join(", ".join(one for one in part if one not in common) for part in parts)


def pace_of(work: Workload) -> tuple[bool, str]:
    """Whether tokens per second of runs may be compared with each other, and why or why not."""
    timed = [run for run in work.runs if run.timed and run.steady]
    said = _left_out(work.runs)
    if len(timed) < 2:
        one = "a single run" if timed else "no run"
        return False, "; ".join([f"{one} has times of an undisturbed machine", *said])
    if all(run.summary.get("in_turns") for run in timed):
        return True, "; ".join(["in turns", *said])
    anchors = [run.summary.get("anchor") or {} for run in timed]
    shared = {run.plain_name for run in timed}
    if all(anchors) and len(shared) == 1:
        off = max(_off(anchor) for anchor in anchors)
        return True, "; ".join([f"one process each, anchor within {off:.1%}", *said])
    paces = [pace for run in timed if (pace := _plain_pace(run, work)) is not None]
    if len(paces) < len(timed):
        return True, "; ".join(
            ["one process each, without plain decoding to tell the pace", *said]
        )
    off = max(paces) / min(paces) - 1.0
    if off > PACE:
        why = f"speeds are not compared: plain decoding of these runs differs by {off:.0%}"
        return False, "; ".join([why, *said])
    return True, "; ".join([f"one process each, plain decoding within {off:.1%}", *said])


def _left_out(runs: Sequence[Run]) -> list[str]:
    """Runs whose times are not used, and why."""
    reasons = {
        "shared their device": [run.name for run in runs if run.shared],
        "kept another pace": [run.name for run in runs if run.timed and not run.steady],
    }
    return [f"not of runs that {why}: {several(own)}" for why, own in reasons.items() if own]


def _off(anchor: dict[str, object]) -> float:
    """By how much an anchor is off its reference."""
    seconds = [float(one) for key in ("seconds", "reference") for one in anchor.get(key) or ()]  # type: ignore[attr-defined]
    return max(seconds) / min(seconds) - 1.0 if seconds and min(seconds) > 0.0 else 0.0


def _plain_pace(run: Run, work: Workload) -> float | None:
    """Seconds of a step of plain decoding."""
    if run.plain is None or not all(key in run.plain for key in work.keys):
        return None
    whole = total(run.plain[key] for key in work.keys)
    return whole.seconds / whole.passes if whole.passes else None
