"""From folders to a comparison."""

import shlex
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from specdec.compare.figures import Comparison, Entry, Estimate, Group
from specdec.compare.grouping import Workload, settings_that_differ, several, workloads
from specdec.compare.measure import best_first, chosen, differences, entry
from specdec.compare.read import METHOD, Found, Run, find
from specdec.compare.times import clock_of, pace_of
from specdec.compare.trees import trees_of
from specdec.compare.verdict import verdict
from specdec.compare.words import words_of
from specdec.lab.values import shown

MOST = 3  # remarks of a kind


def compare(folders: Sequence[Path]) -> Comparison:
    """What runs say together.

    Args:
        folders: of runs and of sweeps.

    Raises:
        ValueError: a folder holds no run, a file is broken, or single runs cannot be compared.
    """
    found = find(folders)
    groups = [_group(work) for work in workloads(found)]
    return Comparison(
        groups=groups,
        differing=settings_that_differ(found.runs),
        left_out=found.left_out,
        environment=_environment(found.runs),
        commands=_commands(found),
    )


def _group(work: Workload) -> Group:
    times, said = clock_of(work)
    pace, how = pace_of(work) if times else (False, said)
    methods, keys = work.methods, work.keys
    entries = best_first([entry(one, keys, times=times) for one in methods], pace=pace)
    found = differences(methods, keys, pace=pace)
    notes = [*work.notes, *_orders(entries), *_clocks(entries), *_replays(work, entries)]
    return Group(
        name=_title(work),
        workload=_described(work),
        times=how,
        entries=entries,
        differences=found,
        chosen=chosen(methods, keys, times=times, pace=pace),
        verdict=verdict(methods, keys, entries, found, pace=pace),
        trees=[tree for one in methods for tree in trees_of(one)],
        notes=notes,
    )


def _described(work: Workload) -> dict[str, Any]:
    """What was done, the most important first."""
    first = work.runs[0]
    settings = first.settings
    sets = [run.choices.get("prompts") for run in work.runs]
    names = ", ".join(sorted({name for name in sets if name}))
    found: dict[str, Any] = {
        "target": first.value("target.path") or "",
        "temperature": settings.get("sampling.temperature", 0.0),
        "prompts": f"{names + ': ' if names else ''}{len(work.keys)} conversations",
        "max_new_tokens": settings.get("max_new_tokens"),
        "batch_size": settings.get("batch_size", 1),
    }
    return found | {name: shown(value) for name, value in work.own.items() if name not in found}


def _title(work: Workload) -> str:
    """The target, the temperature, the batch, and what else this group differs in."""
    described = _described(work)
    parts = [
        str(described["target"]),
        f"T={float(described['temperature']):g}",
        f"batch {described['batch_size']}",
    ]
    named = {"target.path", "sampling.temperature", "batch_size"}
    parts += [
        f"{name}={shown(value)}"
        for name, value in work.own.items()
        if name not in named and not name.startswith("contents of ")
    ]
    return " · ".join(parts)


# What to know


def _orders(entries: Sequence[Entry]) -> list[str]:
    """Pairs of methods whose order depends on how accepted lengths are averaged."""
    known = [(one, one.accepted_length.value, one.per_request) for one in entries]
    flips = [
        f"{one.name} has the longer accepted length pooled ({pooled:.2f} and {less:.2f}), "
        f"{other.name} the longer one by request ({own.value:.2f} and {theirs.value:.2f})"
        for (one, pooled, own), (other, less, theirs) in permutations(known, 2)
        if own and theirs and pooled > less and own.value < theirs.value
    ]
    more = [f"so with {len(flips) - MOST} other pairs"] if len(flips) > MOST else []
    return [*flips[:MOST], *more]


def _clocks(entries: Sequence[Entry]) -> list[str]:
    """Methods whose repeats differ by more than their conversations let one know."""
    return [
        f"unstable clock: repeats of {one.name} differ by {one.repeats:.1%}, more than half the "
        f"interval of its speedup; the machine decides there, not the prompts"
        for one in entries
        if one.repeats is not None and one.speedup and one.repeats > _half(one.speedup)
    ]


def _replays(work: Workload, entries: Sequence[Entry]) -> list[str]:
    """What is to be known of methods that were not decoded."""
    told = [run for run in work.runs if run.replayed]
    if not told:
        return []
    said = [
        f"{len(told)} methods are REPLAYED: expected of the texts of {several(_records(told))}, "
        f"not decoded; their steps and nodes are expectations, their speeds predictions"
    ]
    quick = [one for one in entries if one.expected_speed]
    if quick:
        best = max(quick, key=lambda one: one.expected_speed or 0.0)
        costs = ", ".join(dict.fromkeys(str(run.summary["costs"]) for run in told))
        said.append(
            f"by the costs of {costs} {best.name} is the fastest of the replayed, with "
            f"{best.expected_speed:.1f} tokens/s"
        )
    for run in {str(run.folder): run for run in told}.values():
        if found := run.summary["oracle"]:
            short = ", ".join(f"{name} {share:.1%}" for name, share in found["regret"].items())
            said.append(
                f"oracle: the best choice among them at every place of the text has "
                f"{found['tokens_per_second']:.1f} tokens/s; the best of each policy falls short "
                f"of it by {short}"
            )
    return said


def _records(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(run.summary["record"]) for run in runs))


def _half(one: Estimate) -> float:
    """Half its interval, relative to its value."""
    if one.low is None or one.high is None:
        return float("inf")
    return (one.high - one.low) / (2.0 * one.value)


# What the runs are


def _environment(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Versions, hardware and git of the runs, equal ones once."""
    names = ("versions", "hardware", "git")
    same: list[tuple[dict[str, Any], list[str]]] = []
    for run in runs:
        own = {name: run.summary[name] for name in names if run.summary.get(name)}
        if run.replayed:
            continue
        for other, folders in same:
            if own == other:
                folders.append(run.name)
                break
        else:
            same.append((own, [run.name]))
    if len(same) == 1:
        return {"all runs": same[0][0]}
    return {several(folders): own for own, folders in same if own}


def _commands(found: Found) -> list[str]:
    """Those that make the runs and the replays again, each once."""
    told = {str(run.folder): run for run in reversed(found.runs) if run.replayed}
    runs = [run for run in found.runs if not run.replayed]
    return list(dict.fromkeys(line for run in (*runs, *told.values()) for line in _lines(run)))


def _lines(run: Run) -> list[str]:
    words = run.words or words_of(run)
    if not run.replayed:
        return [shlex.join(["python", "-m", "specdec.run", *words])]
    kept = [word for word in words if word.split("=")[0].split(".")[0] not in METHOD[1:]]
    recorded = shlex.join(["specdec", "record", *kept, f"out={run.summary['record']}"])
    return [recorded, run.summary["command"]]
