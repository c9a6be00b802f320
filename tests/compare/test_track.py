"""The comparison of a sweep, as its tracker is told of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.compare.track import differences, methods, track_comparison
from specdec.lab.curves import Table
from specdec.lab.tracked import tracked_comparison
from specdec.lab.tracking import NoTracker, TrackedRun
from tests.compare.made import comparison, small

told: list[tuple[TrackedRun, Mapping[str, Table], Sequence[Path]]] = []


class Spy(NoTracker):
    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None:
        told.append((run, tables, files))
        return "here it is"


class Broken(NoTracker):
    def compare(self, *_: Any) -> str | None:
        raise OSError("no network")


def settings(kind: type) -> dict[str, Any]:
    return {"tracker": {"_target_": f"{__name__}.{kind.__name__}"}}


def test_tables_and_files_go_to_the_group_of_the_sweep(tmp_path):
    whole, files, said = comparison(), [tmp_path / "compare.html"], list[str]()
    told.clear()
    track_comparison(settings(Spy), tmp_path / "lab/s", whole, files, said.append)
    ((run, tables, given),) = told
    assert (run.job_type, run.group, run.folder) == ("comparison", "lab-s", tmp_path / "lab/s")
    assert tables == {"methods": methods(whole), "differences": differences(whole)}
    assert given == files
    assert said == ["here it is"]


def test_it_is_the_same_run_when_the_sweep_goes_on(tmp_path):
    assert tracked_comparison(tmp_path) == tracked_comparison(tmp_path)


def test_what_fails_is_told(tmp_path):
    said: list[str] = []
    track_comparison(settings(Broken), tmp_path, comparison(), [], said.append)
    (line,) = said
    assert line.startswith("Broken failed, OSError: no network")


def test_a_tracker_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^tracker\._target_="):
        track_comparison({"tracker": {"_target_": "json"}}, tmp_path, comparison(), [], print)


def test_a_method_is_a_row_with_its_intervals_and_depths():
    group = small()
    group = replace(group, entries=[replace(group.entries[0], speedup=None), *group.entries[1:]])
    columns, rows = methods(comparison([group]))
    first, second, *_ = (dict(zip(columns, row, strict=True)) for row in rows)
    entry = group.entries[0]
    assert len(rows) == len(group.entries)
    assert (first["group"], first["method"]) == (group.name, entry.name)
    assert first["accepted_length"] == entry.accepted_length.value
    assert first["accepted_length_low"] == entry.accepted_length.low
    assert first["speedup"] is first["speedup_high"] is None
    assert second["speedup"] == group.entries[1].speedup.value
    for depth, rate in enumerate(entry.acceptance_by_depth, start=1):
        assert first[f"acceptance/depth_{depth}"] == rate


def test_a_method_without_that_depth_has_nothing_there():
    group = small()
    short = replace(group.entries[0], acceptance_by_depth=[])
    columns, rows = methods(comparison([replace(group, entries=[short, *group.entries[1:]])]))
    assert rows[0][list(columns).index("acceptance/depth_1")] is None


def test_a_difference_is_a_row():
    whole = comparison()
    columns, rows = differences(whole)
    every = [(group, one) for group in whole.groups for one in group.differences]
    assert len(rows) == len(every)
    group, one = every[0]
    found = dict(zip(columns, rows[0], strict=True))
    assert (found["group"], found["first"], found["second"]) == (group.name, one.first, one.second)
    assert (found["ratio"], found["low"]) == (one.ratio.value, one.ratio.low)
    assert found["p_holm"] == one.p_holm
