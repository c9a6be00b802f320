"""The real wandb, its process killed or frozen, its server gone, out of reach, or met again: the
run goes on, in time, and ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.tracking import BEGIN, STEP
from tests.lab.wandb_files import read
from tests.running import ROOT

pytestmark = pytest.mark.slow
KEY = {"WANDB_API_KEY": "a" * 40}
NOWHERE = {**KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
OFFLINE = {"WANDB_MODE": "offline"}
SLACK, EXIT = 1.0, 10.0  # seconds; for the steps themselves, and from the end to that of Python


def through(folder: Path, event: str, variables: dict[str, str]) -> dict[str, Any]:
    """What came of it, once the process has ended by itself."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "tests.lab.wandb_run", str(folder), event]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert time.time() - found["at"] < EXIT
    assert found["took"]["start"] < BEGIN + SLACK
    assert found["took"]["steps"] < STEP + SLACK
    assert len(found["said"]) == 1
    return found


@pytest.mark.parametrize(
    ("event", "variables", "said"),
    [
        ("kill", OFFLINE, "WandbTracker failed, "),
        ("freeze", OFFLINE, "WandbTracker did not end within 7 s; "),
        ("vanish", KEY, "WandbTracker "),
    ],
)
def test_a_run_outlives_wandb(tmp_path, event, variables, said):
    (line,) = through(tmp_path, event, variables)["said"]
    assert line.startswith(said)
    assert line.endswith(f"; specdec sync {tmp_path} makes up for it")


def test_a_server_out_of_reach_makes_the_run_an_offline_one(tmp_path):
    (line,) = through(tmp_path, "nothing", NOWHERE)["said"]
    (place,) = tmp_path.glob("wandb/offline-run-*")
    assert line == f"wandb: wandb sync {place} sends it"
    (path,) = place.glob("*.wandb")
    points = [point["steps"] for point in read(path).points if "steps" in point]
    assert points == [*range(1, 101)]


def test_a_run_that_the_server_knows_goes_on_where_it_ended(tmp_path):
    # The server has no artifacts, of which tables are made, so that its end is a fault.
    assert through(tmp_path, "again", KEY)["points"] == [*range(41, 101)]
