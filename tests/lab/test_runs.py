"""What a run leaves on disk, and what of it is kept when it is resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from specdec.lab.lock import Lock
from specdec.lab.metrics import summarise
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
    folder.main.generations.append(
        {**generation(0, [5, 6], 2), "request": 8, "accepted_lengths": [1, 1]}
    )
    folder.close()

    folder = RunFolder(tmp_path, config={}, resume=True)
    folder.write_error(ValueError("of the run before"))
    folder.begin()
    kept, other = folder.main.steps.records
    assert (kept["requests"], kept["sources"]) == ([8], [{"a": [1, 0]}])
    assert other == bare
    assert kept["seconds"] == {verb: t / 2 for verb, t in shared["seconds"].items()}
    assert not (tmp_path / "error.txt").exists()
    folder.close()


def test_time_of_a_shared_step_is_not_counted_twice(tmp_path: Path):
    """Four sequences share 6 steps of a second; a text of one of them is finished. What is decoded
    again takes what it takes: 3 sequences, 6 steps of a second."""
    folder = RunFolder(tmp_path, config={}, resume=False)
    folder.begin()
    four = step([5, 6, 7, 8], [0] * 4, [0] * 4, [1] * 4)
    for _ in range(6):
        folder.main.steps.append(four)
    done = {**generation(0, [5] * 6, 6), "request": 5, "accepted_lengths": [1] * 6}
    folder.main.generations.append(done)
    folder.close()

    folder = RunFolder(tmp_path, config={}, resume=True)
    folder.begin()
    found = [summarise([], folder.main.steps.records)]
    for _ in range(6):
        folder.main.steps.append(step([6, 7, 8], [0] * 3, [0] * 3, [1] * 3))
    found.append(summarise([], folder.main.steps.records))
    folder.close()
    assert [one["seconds"] for one in found] == [6 / 4, 6 / 4 + 6]
    assert found[0]["time"]["verify"] == 0.5 * 6 / 4


def test_a_folder_has_one_run_at_a_time(tmp_path: Path):
    with RunFolder(tmp_path / "o", config={}, resume=False) as folder:
        folder.begin()
        owner = json.loads((tmp_path / "o/lock").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        said = rf"^out={tmp_path}/o: process {os.getpid()} on {owner['host']} works there since 2"
        for resume in (False, True):
            with pytest.raises(ValueError, match=said):
                RunFolder(tmp_path / "o", config={}, resume=resume)
        assert (tmp_path / "o/lock").exists()
    assert not (tmp_path / "o/lock").exists()
    RunFolder(tmp_path / "o", config={}, resume=True).close()


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from specdec.lab.lock import Lock
held = Lock(Path(sys.argv[1]), "out")
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_process_that_is_dead_is_free(tmp_path: Path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), str(ROOT)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ValueError, match=f"^out=x: process {holder.pid} on "):
        Lock(tmp_path / "lock", "out=x")
    holder.kill()
    holder.wait()
    assert str(holder.pid) in (tmp_path / "lock").read_text()
    Lock(tmp_path / "lock", "out=x").release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("left", ["", "{", "[1]", '{"pid": 1, "ho'])
def test_a_lock_that_a_full_disk_cut_off_is_free(tmp_path: Path, left: str):
    (tmp_path / "lock").write_text(left)
    Lock(tmp_path / "lock", "out=x").release()


def test_the_lock_of_another_host_is_left_to_the_user(tmp_path: Path):
    """Locks may not be seen across hosts, and nothing else tells whether its owner lives."""
    (tmp_path / "lock").write_text('{"pid": 7, "host": "elsewhere", "time": "2026-01-01"}\n')
    said = rf"process 7 on elsewhere may work there .* delete {tmp_path}/lock if that run is dead$"
    with pytest.raises(ValueError, match=said):
        Lock(tmp_path / "lock", "out=x")
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize(("pid", "free"), [(os.getppid(), False), (2**22 + 1, True)])
def test_without_locks_of_the_system_the_owner_is_asked_for(tmp_path, monkeypatch, pid, free):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks")))
    owner = {"pid": pid, "host": socket.gethostname(), "time": "2026-01-01"}
    (tmp_path / "lock").write_text(json.dumps(owner))
    if free:
        Lock(tmp_path / "lock", "out=x").release()
    else:
        with pytest.raises(ValueError, match=f"process {pid} on .* works there"):
            Lock(tmp_path / "lock", "out=x")


@pytest.mark.parametrize("name", ["file", "file/x", "/proc/self/x", "x" * 300, "a/" * 3000])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"^out=[^\n]*: cannot be used, .+; choose another place$"
    ):
        RunFolder(tmp_path / name, config={}, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("mark", "what"),
    [("multirun.yaml", "sweep"), ("plan.json", "record"), ("training.json", "training")],
)
def test_a_run_is_not_put_beside_something_else(tmp_path: Path, mark: str, what: str):
    (tmp_path / mark).touch()
    for resume in (False, "auto"):
        with pytest.raises(ValueError, match=rf"^out={tmp_path}: holds a {what}; choose another"):
            RunFolder(tmp_path, config={}, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [mark]


def test_nothing_to_resume_is_said(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new/a"):
        with pytest.raises(
            ValueError, match=r"^resume=true: there is nothing to continue in out="
        ):
            RunFolder(tmp_path / name, config={}, resume=True)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


KILLED = """
import os, signal

def die(tokens):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
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
