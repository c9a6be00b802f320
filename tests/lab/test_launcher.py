"""Jobs in processes of their own: who gets which GPU, and what becomes of those that die, take too
long or are interrupted. The processes are a few lines that write what a job writes, without
torch."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import MissingConfigException

from specdec.lab import launcher
from specdec.lab.interrupts import SIGNALS, interruptible
from specdec.lab.jobs import SWEEP, Job, Ledger, jobs_of
from specdec.lab.launcher import Processes, Task, gpus_of
from specdec.lab.settings import message_of

WORKER = """
import json, os, pathlib, signal, sys, time
from datetime import datetime

given, token = json.loads(os.environ["SPECDEC_JOB"]), os.environ["SPECDEC_SWEEP"]
out = pathlib.Path([word for word in sys.argv if word.startswith("out=")][-1][4:].strip('"'))
(kind,) = [word[5:] for word in sys.argv if word.startswith("seed=")]
number = given["number"]
job = {"schema": 1, "words": given["words"], "number": number, "state": "running", "reason": None}
job |= {"folder": None, "sweep": token, "host": os.uname().nodename, "pid": os.getpid()}
job |= {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "started": given["started"]}
job |= {"ended": None, "shared": False}

def write(**more):
    job.update(more)
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    (out / f"jobs/{token}-{number}.json").write_text(json.dumps(job))

def now():
    return datetime.now().astimezone().isoformat()

def stop(*_):
    write(state="interrupted", ended=now())
    sys.exit(130)

signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "4" else stop)
if kind == "5":
    os._exit(7)  # before it has said anything
write()
print("printed by", number)
if kind == "2":
    write(state="refused", reason="seed=2: bad", ended=now())
    sys.exit(2)
if kind == "3":
    os.abort()
time.sleep(30 if kind in "46" else 0.1)
(out / str(number)).mkdir()
figures = {"tokens_per_second": 10.0 + number, "drafted_per_step": 2.0, "speedup": 1.5}
figures |= {"mean_accepted_length": {"pooled": 2.0}, "lossless": {"verdict": "passed"}}
(out / str(number) / "summary.json").write_text(json.dumps(figures))
write(state="finished", folder=str(number), ended=now())
"""
FINE, REFUSED, ABORT, STUBBORN, MUTE, LONG = map(str, range(1, 7))
WORDS = ("drafter=ngram", "tracker=none")


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    monkeypatch.setattr(Processes, "program", [sys.executable, "-S", str(path)])
    monkeypatch.setattr(launcher, "PAUSE", 0.01)
    monkeypatch.setattr(launcher, "GRACE", 0.1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(SWEEP, "token")


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals as under a terminal; what a shell runs in the background ignores SIGINT."""
    usual = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = [signal.signal(*pair) for pair in zip(SIGNALS, usual, strict=True)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def processes(
    out: Path, *kinds: str, device: str = "cpu", gpus: int = 1, **settings: Any
) -> Processes:
    """On the CPU, so that as many run at once as are told to, whatever GPUs there are."""
    tasks = [
        Task(number=number, words=[f"seed={kind}"], device=device, gpus=gpus)
        for number, kind in enumerate(kinds)
    ]
    return Processes(Ledger(out, "token"), [f"out={out}"], tasks, **settings)


def states(out: Path) -> list[str]:
    return [job.state for job in jobs_of(out)]


def at_a_time(jobs: list[Job]) -> int:
    """How many of these jobs ran at once."""
    moments = [(str(job.started), 1) for job in jobs] + [(str(job.ended), -1) for job in jobs]
    running = [sum(change for when, change in moments if when <= now) for now, _ in moments]
    return max(running)


def test_each_gpu_has_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    processes(tmp_path / "s", *FINE * 6, device="auto").run()
    jobs = jobs_of(tmp_path / "s")
    assert states(tmp_path / "s") == ["finished"] * 6
    assert {job.gpu for job in jobs} == {"3", "GPU-7"}
    for gpu in ("3", "GPU-7"):
        assert at_a_time([job for job in jobs if job.gpu == gpu]) == 1
    assert at_a_time(jobs) == 2
    assert not any(job.shared for job in jobs)
    log = (tmp_path / "s/logs/token-4.txt").read_text()
    assert log == "printed by 4\n"


def test_a_job_has_as_many_gpus_as_share_its_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    processes(tmp_path / "s", *FINE * 4, device="auto", gpus=2).run()
    jobs = jobs_of(tmp_path / "s")
    assert {job.gpu for job in jobs[:2]} == {"0,1", "2,3"}
    assert at_a_time(jobs) == 2
    assert "started on GPUs 2,3, prints to" in capsys.readouterr().out
    # One that asks for too many is told so by its own process.
    processes(tmp_path / "t", FINE, device="auto", gpus=8).run()
    assert [job.gpu for job in jobs_of(tmp_path / "t")] == ["0,1,2,3,4"]
    processes(tmp_path / "u", FINE, device="auto", gpus=8, devices=[1, 1]).run()
    assert [job.gpu for job in jobs_of(tmp_path / "u")] == ["1"]


@pytest.mark.parametrize(("at_once", "shared"), [(1, False), (2, True)])
def test_jobs_on_the_cpu_run_alone_unless_told_otherwise(tmp_path, monkeypatch, at_once, shared):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    processes(tmp_path / "s", *FINE * 4, at_once=at_once).run()
    jobs = jobs_of(tmp_path / "s")
    assert at_a_time(jobs) == at_once
    assert {job.gpu for job in jobs} == {"0,1"}  # it does not matter to them
    assert {job.shared for job in jobs} == {shared}


def test_jobs_that_die_cost_the_others_nothing(tmp_path, capsys):
    kinds = (ABORT, MUTE, REFUSED, FINE)
    processes(tmp_path / "s", *kinds).run()
    jobs = jobs_of(tmp_path / "s")
    assert states(tmp_path / "s") == ["failed", "failed", "refused", "finished"]
    assert str(jobs[0].reason).startswith("ended by signal 6 (SIGABRT); what it printed is in ")
    assert str(jobs[1].reason).startswith("ended with exit code 7; ")
    assert jobs[1].words == [f"seed={MUTE}"]
    printed = capsys.readouterr().out
    assert "2: seed=2: refused: seed=2: bad\n" in printed
    assert printed.count("started") == 4


def test_no_more_are_started_after_so_many_failures(tmp_path, capsys):
    processes(tmp_path / "s", FINE, ABORT, REFUSED, MUTE, FINE, max_failures=2).run()
    assert states(tmp_path / "s") == ["finished", "failed", "refused", "failed"]
    assert "hydra.launcher.max_failures=2: as many have failed" in capsys.readouterr().out


def test_a_job_that_takes_too_long_has_failed(tmp_path):
    processes(tmp_path / "s", LONG, STUBBORN, FINE, at_once=3, timeout=0.3 / 60).run()
    jobs = jobs_of(tmp_path / "s")
    assert states(tmp_path / "s") == ["failed", "failed", "finished"]
    assert {job.reason for job in jobs[:2]} == {
        "took longer than hydra.launcher.timeout=0.005 minutes"
    }


@pytest.mark.parametrize("twice", [False, True])
def test_an_interruption_ends_what_runs_and_starts_no_more(tmp_path, twice):
    def interrupt() -> None:
        start = time.monotonic()
        while states(tmp_path / "s").count("running") < 2:
            if time.monotonic() - start > 20:
                return  # and no interruption comes, which fails the test
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        if twice:
            time.sleep(0.2)  # STUBBORN ends at a second interruption alone
            os.kill(os.getpid(), signal.SIGINT)

    kinds = (LONG, STUBBORN if twice else LONG, FINE)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt), interruptible():
        processes(tmp_path / "s", *kinds, at_once=2).run()
    thread.join()
    assert states(tmp_path / "s") == ["interrupted", "interrupted"]
    assert jobs_of(tmp_path / "s")[1].reason == ("killed" if twice else None)


WRONG = {
    "at_once=0": "at_once=0: must be greater than or equal to 1",
    "timeout=0": "timeout=0: must be greater than 0",
    "timeout=soon": "timeout=soon: must be a valid number",
    "max_failures=0": "max_failures=0: must be greater than or equal to 1",
    "devices=0": "devices=0: must be auto or a list of GPUs, as in [0,1]",
    "devices=[]": "devices=[]: must be auto or a list",
    "devices=[99]": "devices=[99]: 99 is none of the GPUs that are visible here: ",
}


@pytest.mark.parametrize("word", WRONG)
def test_settings_of_the_launcher_that_cannot_be_used_are_named(tmp_path, word):
    name, _, value = word.partition("=")
    with pytest.raises(ValueError, match=re.escape(f"hydra.launcher.{WRONG[word]}")):
        processes(tmp_path / "s", FINE, **{name: yaml.safe_load(value)})


def test_a_wrong_setting_is_refused_before_anything_runs(specdec, tmp_path):
    wrong = ("hydra/launcher=processes", "hydra.launcher.devices=[99]")
    code, _, error = specdec("-m", *WORDS, "seed=1,1", *wrong, f"out={tmp_path}/s")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: hydra.launcher.devices=[99]: 99 is none of the GPUs")
    assert not (tmp_path / "s").exists()


MISSING = {
    "proceses": "hydra/launcher=proceses: no such option; the nearest is processes; there are",
    "submitit_slurm": "; pip install 'specdec-lab[slurm]' brings it",
}


@pytest.mark.parametrize("name", MISSING)
def test_launchers_that_are_not_there_are_named(name):
    """As Hydra 1.3 says it."""
    listed = "basic\n\tprocesses\n\tturns"
    said = f"In 'hydra/config': Could not find 'hydra/launcher/{name}'\n\n"
    said += f"Available options in 'hydra/launcher':\n\t{listed}\nConfig search path:\n\tx"
    message = message_of(MissingConfigException(said, name))
    assert MISSING[name] in message
    assert "basic, processes, turns" in message
    assert "\n" not in message


def test_devices_are_some_of_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,MIG-1")
    assert gpus_of("auto") == ["2", "5", "MIG-1"]
    assert gpus_of([5, "MIG-1"]) == ["5", "MIG-1"]
    with pytest.raises(ValueError, match=r"devices=\[0\]: 0 is none of .* here: 2, 5, MIG-1"):
        gpus_of([0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_of("auto") == []


def test_hydra_finds_the_launcher_and_the_table_comes_from_disk(specdec, tmp_path):
    code, printed, error = specdec(
        *("-m", *WORDS, "hydra/launcher=processes", "seed=1,3,2", f"out={tmp_path}/a folder"),
    )
    assert (code, error) == (1, "")
    assert sorted(path.name for path in (tmp_path / "a folder").iterdir()) == [
        *("0", "jobs", "logs", "multirun.yaml"),
    ]
    table, _, rest = printed.partition("refused  ")
    assert "│ seed=1 │" in table
    assert "1.50x" in table
    assert "seed=2: bad" in rest
    assert "ended by signal 6 (SIGABRT)" in rest
    assert specdec("-m", *WORDS, "hydra/launcher=processes", "seed=1", f"out={tmp_path}/b")[0] == 0
