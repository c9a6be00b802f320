"""The comparison of a sweep, as its tracker is told of it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from specdec.compare.track import answer, differences, methods, track_comparison
from specdec.lab.curves import Table
from specdec.lab.tracked import tracked_comparison
from specdec.lab.tracking import NoTracker, TrackedRun
from tests.compare.folders import run, texts
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
    ((it, tables, given),) = told
    assert (it.job_type, it.group, it.folder) == ("comparison", "lab-s", tmp_path / "lab/s")
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


# --- at the end of a sweep


def sweep(folder: Path, kind: str) -> Path:
    """Two runs that are told to a tracker of this kind."""
    plain = texts([1.0] * 8)
    for name, length in (("ngram", 3.0), ("pld", 2.0)):
        mean = {"pooled": length, "per_request": length}
        place = run(
            folder / name,
            texts([length] * 8),
            plain=plain,
            drafter=name,
            mean_accepted_length=mean,
        )
        config = {"choices": {"drafter": name}, "resolved": {}, "tracker": {"_target_": kind}}
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def answered(folder: Path) -> list[str]:
    said = io.StringIO()
    answer(folder, Console(file=said))
    return said.getvalue().splitlines()


def test_a_sweep_ends_with_its_sentences_and_a_run_in_its_tracker(tmp_path):
    told.clear()
    *sentences, report, where = answered(sweep(tmp_path, f"{__name__}.Spy"))
    assert sentences[0].startswith("Of 2 methods ngram ")
    assert report == f"report in {tmp_path / 'report.html'}"
    assert where == "here it is"
    ((_, tables, files),) = told
    columns, rows = tables["methods"]
    assert [row[list(columns).index("drafter")] for row in rows] == ["ngram", "pld"]
    assert [file.exists() for file in files] == [True] * 3


def test_without_a_tracker_a_sweep_ends_with_sentences_and_the_command(tmp_path):
    none = "specdec.lab.tracking.NoTracker"
    said, command = answered(sweep(tmp_path, none))
    assert said.startswith("Of 2 methods ngram is the fastest: ")
    assert command == f"specdec compare {tmp_path} writes their report"
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_compared_costs_a_line(tmp_path):
    (sweep(tmp_path, f"{__name__}.Spy") / "pld/steps.jsonl").write_text("{}\n")
    (line,) = answered(tmp_path)
    assert line.startswith("no comparison: ")
    assert line.endswith(f"; specdec compare {tmp_path} tries again")


# --- tables


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
