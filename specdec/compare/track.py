"""The comparison of a sweep as a run of its own in the tracker of the sweep."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.compare.comparing import compare
from specdec.compare.figures import Comparison, Entry, Estimate, Group
from specdec.compare.files import write_all
from specdec.lab.curves import Table
from specdec.lab.lines import tell
from specdec.lab.setup import tracker_of
from specdec.lab.tracked import SUMMARY, read_run, tracked_comparison
from specdec.lab.tracking import Careful, NoTracker, Tracker


def answer(folder: Path, console: Console) -> None:
    """What the runs of a sweep that has ended say together: three sentences for each workload;
    with a tracker also the files of the comparison, and a run of its own there.

    What goes wrong is told in one line: the runs are there, whatever becomes of this.
    """
    again = shlex.join(["specdec", "compare", str(folder)])
    try:
        comparison, settings = compare([folder]), tracked_settings(folder)
        for group in comparison.groups:
            tell(
                console,
                " ".join(
                    [f"{group.name}:" * (len(comparison.groups) > 1), *group.verdict]
                ).strip(),
            )
        if settings is None or type(tracker_of(settings)) is NoTracker:
            tell(console, f"{again} writes their report")
            return
        files = write_all(comparison, folder)
        tell(console, f"report in {files[0]}")
        track_comparison(settings, folder, comparison, files, partial(tell, console))
    except ValueError as error:
        tell(console, f"no comparison: {' '.join(str(error).split())}; {again} tries again")


def tracked_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the first run in the folder of a sweep; None if it has none."""
    for path in sorted(folder.glob(f"*/{SUMMARY}")):
        config, _ = read_run(path.parent)
        return config
    return None


def track_comparison(
    settings: Mapping[str, Any],
    folder: Path,
    comparison: Comparison,
    files: Sequence[Path],
    tell: Callable[[str], None],
) -> None:
    """Show it beside the runs, in their group. What fails is told in one line.

    Args:
        settings: of any run of the sweep; its tracker counts.
        folder: of the sweep.
        files: report (HTML), CSV and JSON.
        tell: what to do with lines for the user.

    Raises:
        ValueError: the settings of the tracker cannot be used.
    """
    show_in(Careful(tracker_of(settings), tell), folder, comparison, files)


def show_in(
    tracker: Tracker, folder: Path, comparison: Comparison, files: Sequence[Path]
) -> str | None:
    """Tables of methods and of differences, the report, and all files as an artifact; returns
    where."""
    tables = {"methods": methods(comparison), "differences": differences(comparison)}
    return tracker.compare(tracked_comparison(folder), tables, files)


def methods(comparison: Comparison) -> Table:
    """A row for each method, in the order of the report."""
    rows = [dict(_method(group, entry)) for group in comparison.groups for entry in group.entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def _method(group: Group, entry: Entry) -> Iterator[tuple[str, Any]]:
    yield from {"group": group.name, "method": entry.name, "mark": entry.mark}.items()
    yield from ((name, entry.labels.get(name)) for name in ("drafter", "tree", "acceptance"))
    yield from {
        "seeds": len(entry.seeds),
        "conversations": entry.conversations,
        "tokens": entry.tokens,
        "batch_size": entry.batch_size,
    }.items()
    for name in ("accepted_length", "per_request", "unrepetitive", "speedup"):
        yield from _estimate(name, getattr(entry, name))
    for name in ("tokens_per_second", "tokens_per_pass", "nodes_per_step", "energy", "repetitive"):
        yield name, getattr(entry, name)
    yield "lossless", ", ".join(dict.fromkeys(str(one["verdict"]) for one in entry.lossless))
    for depth, rate in enumerate(entry.acceptance_by_depth, start=1):
        yield f"acceptance/depth_{depth}", rate


def differences(comparison: Comparison) -> Table:
    """A row for each pair and quantity."""
    of_one = ("first", "second", "quantity", "p", "p_holm", "equivalent")
    rows = [
        [group.name, *(getattr(one, name) for name in of_one)]
        + [getattr(one.ratio, name) for name in ("value", "low", "high")]
        for group in comparison.groups
        for one in group.differences
    ]
    return ("group", *of_one, "ratio", "low", "high"), rows


def _estimate(name: str, estimate: Estimate | None) -> Iterator[tuple[str, float | None]]:
    yield name, estimate.value if estimate else None
    yield f"{name}_low", estimate.low if estimate else None
    yield f"{name}_high", estimate.high if estimate else None
