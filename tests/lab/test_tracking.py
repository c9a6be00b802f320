"""The figures of an offline wandb run, read back from its file."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from specdec.decode import Step
from specdec.lab.tracking import Careful, WandbTracker

ROOT = Path(__file__).parents[2]
BLOCK = 32768  # the file is a log in LevelDB's format, after a header of seven bytes


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    position, pending = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def items(entries: Any) -> dict[str, Any]:
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


def test_an_offline_run_holds_config_points_summary_table_and_chart(tmp_path):
    environment = {
        **os.environ,
        "WANDB_MODE": "",
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "n"),
    }
    environment.pop("WANDB_API_KEY", None)
    del environment["WANDB_MODE"]
    command = [
        *(sys.executable, "-m", "specdec.run", "-m", "drafter=ngram", "tracker.every=2"),
        *("prompts.limit=2", "max_new_tokens=6", "baseline=false", f"out={tmp_path}/sweep"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "sweep/0"
    summary = json.loads((folder / "summary.json").read_text())
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")

    config: dict[str, Any] = {}
    last: dict[str, Any] = {}
    points = []
    group = None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config, group = items(record.run.config.update), record.run.run_group
        elif kind == "history":
            points.append(items(record.history.item))
        elif kind == "summary":
            last.update(items(record.summary.update))

    assert config["drafter"]["_target_"] == "specdec.drafters.ngram.NGram"
    assert group
    assert group.endswith("sweep")
    logged = [point for point in points if "step/accepted_length" in point]
    assert len(logged) == -(-summary["steps"] // 2)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    expected = sum(sum(step["tokens"]) for step in steps[:2]) / 2
    assert logged[0]["step/accepted_length"] == expected
    assert last["tokens_per_second"] == summary["tokens_per_second"]
    assert last["mean_accepted_length/pooled"] == summary["mean_accepted_length"]["pooled"]
    assert "table-file" in {point.get("generations/_type") for point in points}
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/generations*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [0, 1]
    assert list(folder.glob("wandb/offline-run-*/files/media/table/acceptance_by_depth*.json"))


KILL = """
import os, signal, subprocess, sys
from pathlib import Path
from specdec.flight import Step
from specdec.lab.tracking import Careful, WandbTracker

tracker = Careful(WandbTracker(every=1), print)
tracker.start(config={}, folder=Path(sys.argv[1]), group=None, name="x")
command = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
    if "wandb" in line:
        os.kill(int(line.split()[0]), signal.SIGKILL)
        print("killed")
one = {name: [1] for name in ("requests", "nodes", "depths", "accepted", "tokens")}
for _ in range(100):
    tracker.step(Step(**one, seconds={"verify": 0.1}))
tracker.finish({}, [])
"""


@pytest.mark.slow
def test_a_run_outlives_the_process_of_wandb(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", KILL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    killed, said = done.stdout.splitlines()
    assert killed == "killed"
    assert said.startswith("WandbTracker failed, ")
    assert said.endswith("; the run goes on without it")


def test_a_folder_that_wandb_cannot_use_costs_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").touch()
    told: list[str] = []
    tracker = Careful(WandbTracker(every=1), told.append)
    tracker.start(config={}, folder=tmp_path, group=None, name="x")
    names = ("requests", "nodes", "depths", "accepted", "tokens")
    tracker.step(Step(**{one: [1] for one in names}, seconds={"verify": 0.5}))
    tracker.finish({}, [])
    (line,) = told
    assert line.startswith("WandbTracker failed, NotADirectoryError")


def test_a_step_that_ran_for_nobody_is_no_point_of_its_own_kind() -> None:
    class Run:
        def log(self, point: dict[str, float], step: int) -> None:
            logged.append(point)

    logged: list[dict[str, float]] = []
    tracker = WandbTracker(every=1)
    tracker._run = Run()
    names = ("requests", "nodes", "depths", "accepted", "tokens")
    nothing: dict[str, list[int]] = {name: [] for name in names}
    tracker.step(Step(**nothing, seconds={"verify": 0.5}))
    assert logged == [{"step/batch": 0.0, "time/verify_ms": 500.0}]
