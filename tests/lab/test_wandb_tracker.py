"""What wandb is given: offline runs read back from their files, and settings against variables."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from specdec.lab.tracking import TrackedRun
from specdec.lab.wandb_tracker import WandbTracker
from tests.lab.test_curves import steps
from tests.lab.wandb_files import Offline, read
from tests.running import lines, summary_of

SUMMARY = {"mean_accepted_length": {"pooled": 2.5}, "acceptance_by_depth": [0.5, 0.25]}
RUN = {"id": "0123456789abcdef", "name": "drafter=pld", "config": {"drafter": "pld"}}


def left_in(folder: Path) -> Offline:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read(path)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Neither logged in nor told anything by the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_a_sweep_leaves_offline_runs_that_can_be_compared(specdec, alone, tmp_path):
    words = ("drafter=ngram", "tree.budget=2,4", "tracker.every=2", "tracker.tags=[mine]")
    quick = ("prompts.limit=2", "max_new_tokens=6", "baseline=false", "dtype=float32")
    quick += ("target.path=zoo:draft",)
    code, printed, error = specdec("-m", *words, *quick, f"out={tmp_path}/sweep")
    assert (code, error) == (0, "")
    folders = sorted(path.parent for path in tmp_path.glob("sweep/*/summary.json"))
    assert len(folders) == 2
    found = [left_in(folder) for folder in folders]
    assert sorted(one.config["tree/budget"] for one in found) == [2, 4]
    assert {one.config["drafter"] for one in found} == {"ngram"}
    assert len({one.run.run_id for one in found}) == 2
    for folder, one in zip(folders, found, strict=True):
        summary, last = summary_of(folder), one.summary
        assert one.run.run_group.endswith("-sweep")
        assert one.run.job_type == "run"
        assert {"zoo:draft", "ngram", "chain", "greedy", "T=0", "mine"} <= set(one.run.tags)
        assert "drafter=ngram" in one.run.display_name
        assert last["tokens_per_second"] == summary["tokens_per_second"]
        by_depth = summary["acceptance_by_depth"]
        assert [last[f"acceptance/depth_{d + 1}"] for d in range(len(by_depth))] == by_depth
        points = [point for point in one.points if "tokens" in point]
        assert len(points) == -(-summary["steps"] // 2)
        assert points[-1]["tokens"] == summary["tokens"]
        assert points[-1]["so_far/accepted_length"] == last["acceptance/length"]
        first = lines(folder / "steps.jsonl")[:2]
        assert points[0]["tokens"] == sum(sum(step["tokens"]) for step in first)
        (place,) = folder.glob("wandb/offline-run-*")
        assert printed.count(f"wandb: wandb sync {place} sends it\n") == 1
        tables = {path.name.split("_")[0] for path in place.glob("files/media/table/*.json")}
        assert tables == {"generations"}
        assert list(place.glob("files/media/table/acceptance/by_depth*.json"))
    comparison = left_in(tmp_path / "sweep")
    assert comparison.run.job_type == "comparison"
    assert comparison.run.run_group == found[0].run.run_group
    (table,) = tmp_path.glob("sweep/wandb/offline-run-*/files/media/table/compare/methods*.json")
    assert len(json.loads(table.read_text())["data"]) == 2


def test_the_ways_a_process_ends_stay_as_they_are(alone, tmp_path):
    wandb.teardown(0)  # its process is started anew
    before = sys.exit, sys.excepthook
    tracker = WandbTracker()
    tracker.start(TrackedRun(folder=tmp_path, **RUN))
    assert (sys.exit, sys.excepthook) == before
    tracker.finish(SUMMARY, [])


def test_curves_have_their_axes_and_their_summaries(alone, tmp_path):
    tracker = WandbTracker(every=2)
    tracker.start(TrackedRun(folder=tmp_path, **RUN))
    for step in steps(4):
        tracker.step(step)
    said = tracker.finish(SUMMARY, [])
    found = left_in(tmp_path)
    assert said == f"wandb: wandb sync {next(tmp_path.glob('wandb/offline-run-*'))} sends it"
    axes = {name: metric.step_metric for name, metric in found.metrics.items() if "*" in name}
    assert axes == {"step/*": "steps", "time/*": "steps", "so_far/*": "tokens"}
    assert found.metrics["step/*"].summary.mean
    assert found.run.run_id == RUN["id"]


def test_a_comparison_is_a_run_of_its_own(alone, tmp_path):
    for name, text in (("report.html", "<h1>both</h1>"), ("report.csv", "a\n"), ("x.json", "{}")):
        (tmp_path / name).write_text(text)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    run = TrackedRun(folder=tmp_path, job_type="comparison", group="lab-s", **RUN)
    table = (("method", "accepted_length"), (("ngram", 2.5), ("pld", None)))
    WandbTracker().compare(run, {"methods": table}, files)
    found = left_in(tmp_path)
    assert (found.run.job_type, found.run.run_group) == ("comparison", "lab-s")
    (point,) = [point for point in found.points if "compare/methods/_type" in point]
    assert point["compare/methods/_type"] == "table-file"
    assert point["compare/report/_type"] == "html-file"
    (html,) = tmp_path.glob("wandb/offline-run-*/files/media/html/compare/*.html")
    assert html.read_text() == "<h1>both</h1>"
    (report,) = [one for one in found.artifacts if one.type == "report"]
    assert {entry.path for entry in report.manifest.contents} == {path.name for path in files}


# --- settings, variables, and what would be taken otherwise

OURS = {"group": "sweep", "tags": ["pld"], **RUN}
VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_RUN_GROUP": "many",
    "WANDB_NAME": "called",
    "WANDB_JOB_TYPE": "try",
    "WANDB_TAGS": "a,b",
    "WANDB_DIR": "elsewhere",
    "WANDB_MODE": "offline",
    "WANDB_RUN_ID": "chosen",
    "WANDB_RESUME": "must",
}


class Run:
    """Of a module of wandb that does nothing."""

    def __init__(self, *, resumed: bool = False, **summary: Any) -> None:
        self.resumed, self.summary, self.logged = resumed, summary, list[dict]()

    def define_metric(self, name: str, **_: Any) -> None:
        pass

    def log(self, point: dict[str, Any]) -> None:
        self.logged.append(point)


def given(patch: pytest.MonkeyPatch, tracker: WandbTracker, **of_run: Any) -> dict[str, Any]:
    """What wandb.init is called with."""
    found: dict[str, Any] = {}

    def init(**options: Any) -> Run:
        found.update(options)
        return Run()

    patch.setattr(wandb, "init", init)
    tracker.start(TrackedRun(folder=Path("o"), **{**OURS, **of_run}))
    names = "project entity group name job_type tags dir mode id resume"
    return {name: found[name] for name in names.split()}


def test_without_either_a_run_is_called_by_its_words(alone):
    assert given(alone, WandbTracker()) == {
        "project": "specdec",
        "entity": None,
        "group": "sweep",
        "name": "drafter=pld",
        "job_type": "run",
        "tags": ["pld"],
        "dir": "o",
        "mode": "offline",
        "id": RUN["id"],
        "resume": "allow",
    }


def test_variables_go_before_what_would_be_taken(alone):
    for name, value in VARIABLES.items():
        alone.setenv(name, value)
    expected = {
        "project": "theirs",
        "entity": "team",
        "group": "many",
        "name": "called",
        "job_type": "try",
        "tags": ["pld", "a", "b"],
        "dir": "elsewhere",
        "mode": "offline",
        "id": RUN["id"],  # runs of a sweep would all be one
        "resume": "must",
    }
    assert given(alone, WandbTracker()) == expected
    assert given(alone, WandbTracker(), group=None)["id"] == "chosen"


def test_settings_go_before_both(alone):
    for name, value in VARIABLES.items():
        alone.setenv(name, value)
    own = {"project": "p", "entity": "e", "group": "g", "name": "n", "mode": "disabled"}
    found = given(alone, WandbTracker(**own, tags=["mine"]))
    assert {name: found[name] for name in own} == own
    assert found["tags"] == ["pld", "mine"]


def test_a_run_that_is_resumed_is_told_what_it_lacks(alone):
    run = Run(resumed=True, steps=4)
    alone.setattr(wandb, "init", lambda **_: run)
    tracker = WandbTracker(every=2)
    tracker.start(TrackedRun(folder=Path("o"), **OURS))
    for step in steps(8):
        tracker.step(step)
    assert [point["steps"] for point in run.logged] == [6, 8]


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": "a/b"},
        {"entity": ""},
        {"name": ""},
        {"group": "g" * 129},
        {"tags": ["t" * 65]},
        {"tags": [""]},
        {"mode": "loud"},
        {"every": 0},
    ],
)
def test_what_wandb_would_refuse_later_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^tracker.{name}="):
        WandbTracker(**wrong)
