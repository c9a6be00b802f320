"""A tracker that is slow, fails or hangs; and what trackers are told of a run."""

import json
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from specdec.flight import Step
from specdec.lab import tracking
from specdec.lab.settings import settings_of
from specdec.lab.tracked import tracked_comparison, tracked_run
from specdec.lab.tracking import Careful, NoTracker, TrackedRun, replay

STEP = Step(requests=[0], nodes=[1], depths=[1], accepted=[1], tokens=[2], seconds={"draft": 0.1})
RUN = TrackedRun(folder=Path("runs/a b"), id="7", name="x")


class Spy(NoTracker):
    """Notes what it is told, and on which thread."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.threads: set[int] = set()
        self.abandoned = False

    def start(self, run: TrackedRun) -> None:
        self._note("start")

    def step(self, step: Step) -> None:
        self._note("step")

    def finish(self, summary: Any, generations: Any) -> str | None:
        self._note("finish")
        return "here it is"

    def abandon(self) -> None:
        self.abandoned = True

    def _note(self, what: str) -> None:
        self.told.append(what)
        self.threads.add(threading.get_ident())


class Stuck(Spy):
    """Waits at a step until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def step(self, step: Step) -> None:
        self.go.wait()
        super().step(step)

    def abandon(self) -> None:
        super().abandon()
        self.go.set()


class Broken(Spy):
    def step(self, step: Step) -> None:
        super().step(step)
        raise OSError("a\ndisk")


def through(tracker: NoTracker, steps: int) -> tuple[list[str], float]:
    """What the user is told, and seconds of the steps."""
    said: list[str] = []
    careful = Careful(tracker, said.append)
    careful.start(RUN)
    begun = time.perf_counter()
    for _ in range(steps):
        careful.step(STEP)
    took = time.perf_counter() - begun
    careful.finish({}, [])
    return said, took


def test_jobs_are_done_in_order_on_a_thread_of_their_own():
    spy = Spy()
    said, _ = through(spy, 3)
    assert spy.told == ["start", "step", "step", "step", "finish"]
    assert threading.get_ident() not in spy.threads
    assert said == ["here it is"]
    assert not spy.abandoned


def test_a_step_is_shown_before_the_next_one_is_timed():
    spy = Spy()
    careful = Careful(spy, print)
    careful.step(STEP)
    assert spy.told == ["step"]


def test_a_tracker_that_hangs_costs_one_wait_and_one_line(monkeypatch):
    monkeypatch.setattr(tracking, "END", 0.1)
    stuck = Stuck()
    said, took = through(stuck, 200)
    assert took < 2 * tracking.STEP + 0.1
    (line,) = said
    assert line.startswith("Stuck did not end within 0 s; specdec sync 'runs/a b' makes up for it")
    assert stuck.abandoned


def test_steps_that_find_no_room_are_counted(monkeypatch):
    monkeypatch.setattr(tracking, "WAITING", 5)
    stuck = Stuck()
    threading.Timer(0.3, stuck.go.set).start()
    said, _ = through(stuck, 10)
    # One in its hands, five that wait, and four that are lost.
    assert said == [
        "Stuck was too slow for 4 steps; specdec sync 'runs/a b' makes up for it",
        "here it is",
    ]
    assert stuck.told.count("step") == 6


def test_a_fault_is_told_once_and_the_tracker_left_alone():
    broken = Broken()
    said, _ = through(broken, 3)
    (line,) = said
    assert line == (
        "Broken failed, OSError: a disk; the run goes on without it; specdec sync 'runs/a b' "
        "makes up for it"
    )
    assert broken.told == ["start", "step"]
    assert broken.abandoned


def test_without_a_tracker_there_is_no_thread():
    before = threading.active_count()
    said, _ = through(NoTracker(), 3)
    assert threading.active_count() == before
    assert not said


def test_steps_of_an_earlier_process_come_first():
    class Follower(NoTracker):
        def step(self, step: Step) -> None:
            seen.append(step)

    seen: list[Step] = []
    line = {"requests": [3], "nodes": [2], "depths": [2], "accepted": [1], "tokens": [2]}
    replay([{**line, "seconds": {"verify": 0.5}}], Follower())
    assert seen == [Step(**line, seconds={"verify": 0.5})]


# --- what they are told of a run


@cache
def settings(words: str) -> dict[str, Any]:
    """Composing takes half a second."""
    return {**settings_of(words), "resolved": {"acceptance": "greedy"}}


WORDS = "drafter=pld tree=dynamic tree.budget=16 batch_size=4"


def test_choices_stand_beside_settings_and_in_tags(tmp_path):
    run = tracked_run(tmp_path, settings(WORDS), {}, WORDS.split())
    assert (run.config["drafter"], run.config["tree"]) == ("pld", "dynamic")
    assert run.config["tree/budget"] == 16
    assert run.config["batch_size"] == 4
    assert run.config["resolved/acceptance"] == "greedy"
    assert not any(name.startswith("tracker") for name in run.config)
    assert run.tags == ["zoo:target", "pld", "dynamic", "greedy", "T=0", "batch=4"]
    assert (run.name, run.group, run.job_type) == (WORDS, None, "run")


def test_an_experiment_and_a_mark_are_tags_too(tmp_path):
    run = tracked_run(
        tmp_path, settings("experiment=sampled"), {"lossy": True, "synthetic": False}
    )
    assert {"sampled", "LOSSY", "T=1"} <= set(run.tags)
    assert run.config["lossy"] is True
    assert "synthetic" not in run.config
    assert run.name == f"LOSSY small_llama {tmp_path.name}"


def test_a_run_that_continues_is_the_same_one(tmp_path):
    first = tracked_run(tmp_path, settings(WORDS), {}, WORDS.split())
    words = [*WORDS.split(), "resume=true", f"out={tmp_path}", "tracker.every=2"]
    assert tracked_run(tmp_path, settings(WORDS), {}, words) == first
    assert tracked_run(tmp_path, settings(WORDS), {}).name == first.name
    (tmp_path / "tracking.json").unlink()  # another run in a folder that was emptied
    other = tracked_run(tmp_path, settings(WORDS), {}, words)
    assert other.name == first.name
    assert other.id != first.id


@pytest.mark.parametrize("left", ['{"id": 7', "[]", '{"id": 7, "name": "x"}', "{}"])
def test_a_broken_note_is_written_anew(tmp_path, left):
    (tmp_path / "tracking.json").write_text(left)
    run = tracked_run(tmp_path, settings(WORDS), {}, ["drafter=pld"])
    assert json.loads((tmp_path / "tracking.json").read_text())["id"] == run.id
    assert run.name == "drafter=pld"


def test_runs_of_a_sweep_share_its_group_with_their_comparison(tmp_path):
    sweep = tmp_path / "lab/sweep"
    job = sweep / "pld-3f2a"
    job.mkdir(parents=True)
    assert tracked_run(job, settings(WORDS), {}).group is None
    (sweep / "jobs").mkdir()
    run, comparison = tracked_run(job, settings(WORDS), {}), tracked_comparison(sweep)
    assert run.group == comparison.group == "lab-sweep"
    assert comparison.job_type == "comparison"
    assert comparison.id != run.id


def test_long_names_are_cut_to_what_wandb_takes(tmp_path):
    path = "models/" + "x" * 80
    run = tracked_run(tmp_path, settings(f"target=hf target.path={path}"), {}, ["w=" + "y" * 200])
    assert len(run.name) == 128
    assert run.tags[0] == path[-64:]
