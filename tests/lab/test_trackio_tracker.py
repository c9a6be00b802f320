"""What trackio is given, read back from its own store on this machine."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.tracking import TrackedRun
from specdec.lab.trackio_tracker import TrackioTracker
from tests.lab.test_curves import steps

SUMMARY = {"steps": 8, "mean_accepted_length": {"pooled": 2.5}, "acceptance_by_depth": [0.5, 0.25]}
TEXT = {"prompt": 0, "turn": 0, "category": None, "tokens": 9, "accepted_length": 2.5}
TEXT |= {"finish_reason": "stop", "text": "and so on"}


@pytest.fixture
def project(tmp_path: Path) -> str:
    """Of a name of its own: all tests share trackio's folder (conftest.py)."""
    pytest.importorskip("trackio")
    return tmp_path.name


def rows(project: str, table: str, *columns: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], f"{project}.db")) as file:
        return file.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY id").fetchall()


def shown(project: str) -> list[tuple[str, int, dict[str, Any]]]:
    """Run, step and metrics of each point."""
    found = rows(project, "metrics", "run_name", "step", "metrics")
    return [(name, step, json.loads(metrics)) for name, step, metrics in found]


def run_of(folder: Path, **more: Any) -> TrackedRun:
    config = {"drafter": "pld", "tree/budget": 4}
    known = {"id": "0123456789abcdef", "name": "drafter=pld", "group": "lab-s", "tags": ["pld"]}
    return TrackedRun(folder=folder, **{**known, "config": config, **more})


def follow(folder: Path, count: int, tracker: TrackioTracker) -> str | None:
    tracker.start(run_of(folder))
    for step in steps(count):
        tracker.step(step)
    return tracker.finish({**SUMMARY, "steps": count}, [TEXT])


def test_a_run_has_config_curves_figures_and_texts(project, tmp_path, capsys):
    said = follow(tmp_path, 8, TrackioTracker(project=project, every=2, tags=["mine"]))
    assert said == f"trackio: trackio show --project {project} shows it"
    assert capsys.readouterr().out == ""
    (config,) = (json.loads(one) for (one,) in rows(project, "configs", "config"))
    assert (config["drafter"], config["tree/budget"]) == ("pld", 4)
    assert config["tags"] == ["pld", "mine"]
    assert config["_Group"] == "lab-s"
    *points, (name, step, last) = shown(project)
    assert name == "drafter=pld 012345"
    assert [step for _, step, _ in points] == [2, 4, 6, 8]
    assert all(point["steps"] == step for _, step, point in points)
    assert (step, last["acceptance/depth_2"], last["acceptance/length"]) == (8, 0.25, 2.5)
    (text,) = last["generations"]["_value"]
    assert text == TEXT


def test_a_run_that_continues_is_one_run(project, tmp_path):
    follow(tmp_path, 4, TrackioTracker(project=project, every=2))
    follow(tmp_path, 8, TrackioTracker(project=project, every=2))
    assert len({name for name, _, _ in shown(project)}) == 1
    points = [step for _, step, point in shown(project) if "step/batch" in point]
    assert points == [2, 4, 6, 8]


def test_a_comparison_has_tables_report_and_files(project, tmp_path):
    for name, text in (("report.html", "<h1>both</h1>"), ("report.csv", "a\n")):
        (tmp_path / name).write_text(text)
    table = (("method", "accepted_length"), (("ngram", 2.5), ("pld", None)))
    run = run_of(tmp_path, name="comparison of lab-s", job_type="comparison")
    files = [tmp_path / "report.html", tmp_path / "report.csv"]
    TrackioTracker(project=project).compare(run, {"methods": table}, files)
    ((name, _, point),) = shown(project)
    assert name == "comparison of lab-s 012345"
    assert point["compare/methods"]["_value"][0] == {"method": "ngram", "accepted_length": 2.5}
    assert point["compare/report"]["_type"] == "trackio.html"
    media, blobs = (Path(os.environ["TRACKIO_DIR"], one) for one in ("media", "artifacts"))
    (report,) = (media / project).rglob("*.html")
    assert report.read_text() == "<h1>both</h1>"
    kept = {path.read_bytes() for path in blobs.rglob("*") if path.is_file()}
    assert {file.read_bytes() for file in files} <= kept


@pytest.mark.parametrize("wrong", [{"project": ""}, {"name": ""}, {"group": ""}, {"every": 0}])
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^tracker.{name}="):
        TrackioTracker(**wrong)


def test_without_the_package_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr("specdec.lab.trackio_tracker.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^tracker=trackio: .*pip install 'specdec-lab\[trackio\]'"
    ):
        TrackioTracker()
