"""What trackers are shown of a training."""

import os
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.tracked import tracked_training
from specdec.lab.tracking import NoTracker, TrackedRun
from specdec.lab.trackio_tracker import TrackioTracker
from specdec.lab.wandb_tracker import WandbTracker
from specdec.training import run as training
from specdec.training.course import Progress
from tests.lab.test_trackio_tracker import shown
from tests.lab.test_wandb_tracker import left_in

SETTINGS = {
    "choices": {"method": "eagle3", "target": "zoo", "tracker": "none"},
    "target": {"path": "zoo:target"},
    "method": {"steps": 5},
    "seed": 3,
}
POINTS = [{"steps": 10, "tokens": 640, "loss": 4.5}, {"steps": 20, "tokens": 1280, "loss": 4.0}]
FIGURES = {"steps": 20, "best/score": 2.5}


def run_in(folder: Path) -> TrackedRun:
    return tracked_training(folder, SETTINGS, ["method.steps=5", f"out={folder}"])


def test_a_training_is_called_by_its_words(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert run.name == "train method.steps=5"
    assert run.job_type == "training"
    assert run.tags == ["training", "eagle3", "zoo:target"]
    assert (run.config["method/steps"], run.config["method"]) == (5, "eagle3")
    assert run_in(tmp_path).id == run.id  # as it continues


def test_wandb_has_the_curve_and_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    tracker = WandbTracker(mode="offline")
    tracker.start(run_in(tmp_path))
    for point in POINTS:
        tracker.point(point)
    said = tracker.close(FIGURES)
    assert said is not None
    found = left_in(tmp_path)
    assert found.run.job_type == "training"
    points = [{key: point[key] for key in POINTS[0]} for point in found.points]
    assert points == POINTS
    assert found.metrics["*"].step_metric == "steps"
    assert found.summary["best/score"] == 2.5


def test_trackio_has_each_point_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    for points in (POINTS[:1], POINTS):  # it went on from the beginning of the second
        tracker = TrackioTracker(project=f"training-{tmp_path.name}")
        tracker.start(run_in(tmp_path))
        for point in points:
            tracker.point(point)
    tracker.close(FIGURES)
    found = shown(f"training-{tmp_path.name}")
    assert [(step, point.get("loss")) for _, step, point in found] == [
        (10, 4.5),
        (20, 4.0),
        (20, None),
    ]
    assert found[-1][2]["best/score"] == 2.5


def test_lists_stay_in_the_folder() -> None:
    class Spy(NoTracker):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def point(self, point: Any) -> None:
            self.seen.append(point)

    class Silent:
        def point(self, point: Any) -> None:
            pass

    spy = Spy()
    training._shown(Silent(), spy, {"steps": 1, "a": [1.0], "b": 2.0})  # type: ignore[arg-type]
    assert spy.seen == [{"steps": 1, "b": 2.0}]
    progress = Progress(steps=4, tokens=8, seconds=2.0, best={"score": 2.5, "own/by_depth": [1.0]})
    assert training._figures(progress) == {
        "steps": 4,
        "tokens": 8,
        "seconds": 2.0,
        "tokens_per_second": 4.0,
        "best/score": 2.5,
    }
