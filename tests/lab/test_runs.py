"""What a run leaves on disk, and what of it is kept when it is resumed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from specdec.lab.runs import SCHEMA, RunFolder
from tests.lab.made import generation, step
from tests.running import ROOT


def test_sources_of_finished_prompts_survive_a_resume(tmp_path: Path):
    folder = RunFolder(tmp_path, config={}, resume=False)
    folder.begin()
    shared = {**step([7, 8], [1, 1], [1, 0], [2, 1]), "sources": [{"a": [1, 1]}, {"a": [1, 0]}]}
    bare = {**step([8], [1], [0], [1]), "sources": []}
    for record in (shared, bare):
        folder.main.steps.append(record)
    folder.main.generations.append({**generation(0, [5], 1), "request": 8})
    folder.close()

    folder = RunFolder(tmp_path, config={}, resume=True)
    folder.write_error(ValueError("of the run before"))
    folder.begin()
    kept, other = folder.main.steps.records
    assert (kept["requests"], kept["sources"]) == ([8], [{"a": [1, 0]}])
    assert other == bare
    assert not (tmp_path / "error.txt").exists()
    folder.close()


KILLED = """
import os, signal

def die(tokens):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_settings_of_a_run_that_was_killed_are_there(tmp_path: Path):
    (tmp_path / "killed_drafter.py").write_text(KILLED)
    command = [
        *(sys.executable, "-m", "specdec.run", "drafter=user", "baseline=false", "tracker=none"),
        *("drafter._target_=killed_drafter.die", "prompts.limit=1", f"out={tmp_path}/o"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    config = yaml.safe_load((tmp_path / "o/config.yaml").read_text())
    assert (config["schema"], config["choices"]["drafter"]) == (SCHEMA, "user")
    assert config["drafter"]["_target_"] == "killed_drafter.die"
    assert not (tmp_path / "o/summary.json").exists()
