"""Which runs may be compared, and what tells them apart."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specdec.compare.read import METHOD, Found, Run, group_of
from specdec.compare.sums import Conversation, Sums
from specdec.lab.values import shown

MARKS = (
    "",
    "REPLAYED",
    "FAILED",
    "LOSSY",
    "SYNTHETIC",
)  # in this order; those of one mark are compared
NO_LAW = ("kernels", "cache", "batch_size")  # of a workload, how it is done
MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Runs that differ in nothing but their seed, or not even in that.

    Args:
        name: what distinguishes it in its group.
    """

    name: str
    runs: Sequence[Run]

    @property
    def mark(self) -> str:
        """The worst of its runs."""
        return max((run.mark for run in self.runs), key=MARKS.index)

    @cached_property
    def texts(self) -> dict[Conversation, Sums]:
        return _joined([run.texts for run in self.runs])

    @cached_property
    def plain(self) -> dict[Conversation, Sums] | None:
        """Of plain decoding; None if a run is without it, or its times are not its own."""
        sides = [run.plain for run in self.runs if run.plain is not None and run.timed]
        return _joined(sides) if len(sides) == len(self.runs) else None

    @property
    def timed(self) -> bool:
        """Whether its tokens per second are those of an undisturbed machine."""
        return all(run.timed and run.steady for run in self.runs)


def _joined(sides: Sequence[Mapping[Conversation, Sums]]) -> dict[Conversation, Sums]:
    """Sums over runs, of conversations that all of them have."""
    found = {}
    for key in set.intersection(*(set(side) for side in sides)):
        found[key] = Sums()
        for side in sides:
            found[key].add(side[key])
    return found


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Runs that did the same work.

    Args:
        own: settings by which it differs from other groups.
        keys: conversations that all runs have finished, in order.
        notes: what to know of them.
    """

    runs: Sequence[Run]
    own: Mapping[str, Any]
    keys: Sequence[Conversation]
    notes: Sequence[str]

    @cached_property
    def methods(self) -> list[Contender]:
        by_method: dict[str, list[Run]] = {}
        for run in self.runs:
            by_method.setdefault(_text(run.method), []).append(run)
        every = list(by_method.values())
        names = _names([runs[0] for runs in every])
        return [Contender(name=name, runs=runs) for name, runs in zip(names, every, strict=True)]


def workloads(found: Found) -> list[Workload]:
    """Runs by what they did.

    Raises:
        ValueError: single runs that were given by name did different things.
    """
    by_work: dict[str, list[Run]] = {}
    for run in found.runs:
        if not run.replayed:
            by_work.setdefault(_text(run.workload), []).append(run)
    _add_replays(by_work, [run for run in found.runs if run.replayed])
    groups = [part for runs in by_work.values() for part in _overlapping(runs)]
    if not found.sweeps:
        _refuse(groups)
    own = differing([runs[0].workload for runs in groups])
    return [_workload(runs, mine, found) for runs, mine in zip(groups, own, strict=True)]


def _add_replays(by_work: dict[str, list[Run]], replays: Sequence[Run]) -> None:
    """To the runs of their workload; where there are none they stand alone."""
    decoded = [(runs, _text(_law(runs[0]))) for runs in by_work.values()]
    for run in replays:
        alike = [runs for runs, law in decoded if law == _text(_law(run))]
        for runs in alike or [by_work.setdefault(_text(run.workload), [])]:
            runs.append(run)


def _law(run: Run) -> dict[str, Any]:
    """Of a workload what the law of its texts depends on."""
    return {k: v for k, v in run.workload.items() if group_of(k) not in NO_LAW}


def _refuse(groups: Sequence[Sequence[Run]]) -> None:
    """Say why single runs cannot be compared."""
    if len(groups) > 1:
        one, other = groups[0][0], groups[1][0]
        differ = differing([one.workload, other.workload])[0]
        alike = NO_LAW if one.replayed or other.replayed else ()  # what keeps no replay apart
        names = [name for name in differ if group_of(name) not in alike]
        said = [f"{key} ({_given(one, key)} and {_given(other, key)})" for key in names]
        what = f"differ in {', '.join(said)}" if said else "have no prompt in common"
        raise ValueError(
            f"{one.name}, {other.name}: {what}, so that they cannot be compared; a sweep's folder "
            f"shows them in groups"
        )
    synthetic = [run.mark == "SYNTHETIC" for run in groups[0]]
    if any(synthetic) and not all(synthetic):
        one = groups[0][synthetic.index(True)]
        raise ValueError(
            f"{one.name}: its acceptance is synthetic, which cannot be compared with runs of "
            f"models; leave it out"
        )


def _given(run: Run, key: str) -> str:
    """A part of a workload in words; of contents, the name of what has them, and their mark."""
    name = key.removeprefix("contents of ")
    if name == key:
        return shown(run.workload.get(key, MISSING))
    return f"{shown(run.value(name))} #{run.contents.get(name, MISSING)[:6]}"


def _overlapping(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of equal settings by the prompts that they have in common."""
    parts: list[tuple[set[Conversation], list[Run]]] = []
    for run in runs:
        for place, (keys, members) in enumerate(parts):
            if common := keys & set(run.texts):
                parts[place] = common, [*members, run]
                break
        else:
            parts.append((set(run.texts), [run]))
    return [members for _, members in parts]


def _workload(runs: Sequence[Run], own: Mapping[str, Any], found: Found) -> Workload:
    """Of these runs, on the conversations that all have finished; those with none of them are left
    out."""
    texts: Counter[Conversation] = Counter()  # the most that any run has of each
    for run in runs:
        texts |= Counter({key: sums.texts for key, sums in run.texts.items()})
    whole = [{key for key, sums in run.texts.items() if sums.texts == texts[key]} for run in runs]
    first = max((run.texts for run in runs), key=len)
    common = set.intersection(*whole)
    keys = [key for key in first if key in common]
    if not keys and len(runs) > 1:
        poorest = min(range(len(runs)), key=lambda place: len(whole[place]))
        found.left_out[runs[poorest].name] = "no conversation that the others have is finished"
        return _workload([*runs[:poorest], *runs[poorest + 1 :]], own, found)
    notes = []
    if len(keys) < len(texts):
        least = min(range(len(runs)), key=lambda place: len(whole[place]))
        notes.append(
            f"{len(keys)} of {len(texts)} conversations are compared, which all runs have "
            f"finished ({runs[least].name} has {len(whole[least])})"
        )
    unverified = [run.name for run in runs if run.unverified]
    if unverified:
        notes.append(
            f"unverified, for without identity.json it is not known whether their code was the "
            f"same: {several(unverified)}"
        )
    return Workload(runs=runs, own=own, keys=keys, notes=notes)


def differing(every: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of several settings, for each those in which they are not all equal."""
    names = list(dict.fromkeys(name for one in every for name in one))
    differ = [k for k in names if len({_text(one.get(k, MISSING)) for one in every}) > 1]
    return [{name: one.get(name, MISSING) for name in differ} for one in every]


def _names(runs: Sequence[Run]) -> list[str]:
    """Methods by what distinguishes them: drafter, tree, rule, then settings in which those of
    the same drafter, tree or rule differ."""
    labels = [labels_of(run) for run in runs]
    shown_labels = ["drafter"]
    shown_labels += [
        name
        for name in ("tree", "acceptance", "children")
        if len({label[name] for label in labels}) > 1 or (len(runs) == 1 and name == "tree")
    ]
    # Of a setting, in methods of an option; a replay does not know all that a run does.
    values: dict[tuple[bool, str, str, str], set[str]] = {}
    for group in METHOD:
        known = {name for run in runs for name in run.method if group_of(name) == group}
        for name in known - {group}:
            for run, label in zip(runs, labels, strict=True):
                key = run.replayed, group, label[group], name
                values.setdefault(key, set()).add(_text(run.method.get(name, MISSING)))
    names, mixed = [], len({run.replayed for run in runs}) > 1
    for place, run in enumerate(runs):
        label = labels[place]
        words = [label[name] for name in shown_labels]
        words += [
            f"{name}={shown(value)}"
            for group in METHOD
            for name, value in run.method.items()
            if group_of(name) == group
            and name != group
            and not name.endswith("_target_")
            and not (name == "tree.children" and value == label["children"] in words)  # said
            and len(values[run.replayed, group, label[group], name]) > 1
        ]
        names.append(" ".join([*words, "replayed"] if run.replayed and mixed else words))
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{name} #{_hash(run.method)}" if name in twice else name
        for name, run in zip(names, runs, strict=True)
    ]


def labels_of(run: Run) -> dict[str, str]:
    """Drafter, tree, children and acceptance of a run."""
    names = ("drafter", "tree", "acceptance")
    chosen = {name: run.summary.get(name) or run.choices.get(name, "") for name in names}
    resolved = run.summary.get("children") or run.settings.get("tree.children") or ""
    return {**chosen, "children": str(resolved)}


def several(names: Sequence[str], most: int = 3) -> str:
    """Names, the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:6]


def settings_that_differ(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """By setting, its value of each run."""
    every = [run for run in runs if not run.replayed]
    rows = differing([{**run.settings, "code": run.code} for run in every])
    return {
        name: {run.name: row[name] for run, row in zip(every, rows, strict=True)}
        for name in (rows[0] if rows else ())
    }
