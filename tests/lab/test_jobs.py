"""The ledger of a sweep, and how sweeps end of whose jobs some end badly."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from specdec.lab.attempt import attempt
from specdec.lab.jobs import Job, Ledger, differing, ending, exit_code, jobs_of, objective, worst
from specdec.lab.sweep_table import show_sweep
from tests.running import QUICK, ROOT, forked

pytestmark = pytest.mark.usefixtures("load_once")

SHORT = ("-m", *QUICK[:1], "prompts.limit=1", "max_new_tokens=4", "baseline=false")
SHORT += ("target.path=zoo:draft",)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with drafters that fail, each in its own way."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("planted.py").write_text(PLANTED)
    tmp_path.joinpath("broken.py").write_text("raise OSError('no such library')\n")
    return tmp_path


PLANTED = """
import faulthandler, os, signal, sys
from specdec.drafters.none import NoDrafter
from specdec.lab.tracking import NoTracker

def fails(what):
    class Fails(NoDrafter):
        def prepare(self, capacity, tree):
            what()
    return Fails

def crash():
    raise RuntimeError("one\\ntwo")

def memory():
    raise MemoryError

def abort():
    faulthandler.disable()  # pytest's
    os.abort()

Crash, Memory, Abort = map(fails, (crash, memory, abort))
Term = fails(lambda: os.kill(os.getpid(), signal.SIGTERM))
Exit = fails(lambda: sys.exit(5))

class Guess(NoDrafter):
    def draft(self, context):
        raise IndexError("nothing there")

class Unreachable(NoTracker):
    def start(self, run):
        raise ConnectionError("no route to host")
"""


def entries(folder: Path) -> dict[int, dict[str, Any]]:
    """As the files have them."""
    found = [json.loads(path.read_text()) for path in (folder / "jobs").glob("*.json")]
    return {one["number"]: one for one in found}


def drafters(*names: str) -> str:
    own = {"fine": "specdec.drafters.none.NoDrafter"}
    return "drafter._target_=" + ",".join(own.get(name, name) for name in names)


def test_what_is_planted_in_a_sweep_costs_the_other_jobs_nothing(specdec, own_folder):
    kinds = ("fine", "broken.X", "planted.Crash", "planted.Memory", "planted.Exit")
    kinds += ("planted.Guess", "fine")
    words = ("drafter=user", drafters(*kinds), "tracker._target_=planted.Unreachable")
    code, printed, error = specdec(*SHORT, *words, "out=s")
    assert code == 1
    jobs = entries(own_folder / "s")
    assert [jobs[number]["state"] for number in range(7)] == [
        *("finished", "refused", *["failed"] * 4, "done already"),
    ]
    reasons = [jobs[number]["reason"] or "" for number in range(7)]
    assert "broken.X: cannot be imported, OSError: no such library" in reasons[1]
    crashed = own_folder / "s" / jobs[2]["folder"]
    place = f"the traceback is in {crashed}/error.txt"
    assert reasons[2] == f"RuntimeError: one two (planted.py:13); {place}"
    assert reasons[3].startswith("MemoryError (planted.py:16); ")
    assert reasons[4].startswith("SystemExit: 5 (planted.py:")
    assert "failed on prompt code-01: IndexError: nothing there" in reasons[5]
    assert "raise RuntimeError" in (crashed / "error.txt").read_text()
    assert [job["folder"] for job in jobs.values()].count(None) == 1  # of what is refused
    assert error.count("\n") == 5
    assert printed.count("ConnectionError: no route to host") == 5  # others track nothing
    table, refused, failed = (" ".join(part.split()) for part in sections(printed))
    assert (table.count("│ 1.00 │"), table.count("│ 0.00 │")) == (2, 1)
    assert ("OSError" in refused, "RuntimeError" in refused) == (True, False)
    assert "planted.Crash" in failed


def sections(printed: str) -> list[str]:
    """Of the tables of a sweep: what finished, was refused and failed."""
    table, _, rest = f"\n{printed}".partition("\nsweep ")[2].partition("\nrefused ")
    refused, _, failed = rest.partition("\nfailed ")
    return [table, refused, failed]


def test_a_process_that_dies_is_known_by_the_ledger(own_folder):
    words = ("drafter=user", drafters("fine", "planted.Abort", "fine"), "out=s")
    assert forked(own_folder, "specdec.run", *SHORT, *words).returncode == -signal.SIGABRT
    assert [job["state"] for job in entries(own_folder / "s").values()].count("running") == 1
    jobs = jobs_of(own_folder / "s")
    assert [job.state for job in jobs] == ["finished", "failed"]
    assert jobs[1].reason == f"its process {jobs[1].pid} ended without a word"
    assert forked(own_folder, "specdec.run", *SHORT, *words).returncode == -signal.SIGABRT
    assert len(jobs_of(own_folder / "s")) > 2  # each sweep has its own


def test_a_signal_ends_a_sweep_and_the_table_says_what_is_missing(own_folder):
    words = ("drafter=user", drafters("fine", "planted.Term", "fine"), "out=s")
    ended = forked(own_folder, "specdec.run", *SHORT, *words)
    assert ended.returncode == 130
    assert [job.state for job in jobs_of(own_folder / "s")] == ["finished", "interrupted"]
    interrupted, _, never = ended.stdout.partition("interrupted   ")[2].partition("not started")
    assert "planted.Term" in interrupted
    assert "NoDrafter" in never
    assert ended.stdout.count("this continues: ") == 1


def test_jobs_of_a_sweep_have_one_folder(specdec, tmp_path):
    code, _, error = specdec(*SHORT, "drafter=ngram", f"out={tmp_path}/a,{tmp_path}/b")
    assert (code, error.count("\n")) == (2, 1)
    assert error.endswith("/b: the jobs of a sweep share a folder; give one\n")
    assert not list(tmp_path.iterdir())


EXPENSIVE = ("fine", "broken.X", "planted.Crash", "planted.Memory", "planted.Abort")
UNREACHABLE = {
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": "0" * 40,
    "WANDB_MODE": "online",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signalled"), [("processes", False), ("submitit_local", True)]
)
def test_sweeps_of_processes_outlive_what_is_planted(own_folder, launcher, signalled):
    kinds = [*EXPENSIVE, *["planted.Term"] * signalled]
    command = [sys.executable, "-m", "specdec.run", *SHORT, "drafter=user", drafters(*kinds)]
    command += [f"hydra/launcher={launcher}", "out=s", "tracker=wandb", "tracker.mode=online"]
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **UNREACHABLE, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (130 if signalled else 1)
    jobs = entries(own_folder / "s")
    states = ["finished", "refused", *["failed"] * 3, *["interrupted"] * signalled]
    assert [jobs[number]["state"] for number in range(len(kinds))] == states
    aborted = {"processes": "ended by signal 6 (SIGABRT)", "submitit_local": "ended without"}
    assert aborted[launcher] in jobs[4]["reason"]
    table, refused, failed = sections(ended.stdout)
    assert "NoDrafter" in table
    assert "broken.X" in refused
    for name in ("Crash", "Memory", "Abort"):
        assert f"planted.{name}" in failed


# --- the ledger


def job(number: int = 0, **more: Any) -> Job:
    return Job(**{"words": [f"seed={number}"], "number": number, "sweep": "t", **more})


def test_a_file_holds_what_is_documented(tmp_path):
    Ledger(tmp_path, "t").write(job(3, reason="why", gpu="GPU-1"))
    (path,) = (tmp_path / "jobs").iterdir()
    found = json.loads(path.read_text())
    assert found.pop("started").startswith("20")
    assert found == {
        "schema": 1,
        "words": ["seed=3"],
        "number": 3,
        "state": "running",
        "reason": "why",
        "folder": None,
        "sweep": "t",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "gpu": "GPU-1",
        "ended": None,
        "shared": False,
    }
    (tmp_path / "jobs/t-4.json").write_text('{"schema": 1}')
    (tmp_path / "jobs/t-5.json").write_text("{")
    assert [one.number for one in jobs_of(tmp_path)] == [3]


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_dead_process_has_failed_where_that_can_be_known(tmp_path, host):
    child = subprocess.Popen(["true"])
    child.wait()
    name = socket.gethostname() if host == "here" else "elsewhere"
    Ledger(tmp_path, "t").write(job(pid=child.pid, host=name))
    assert jobs_of(tmp_path)[0].state == ("failed" if host == "here" else "running")
    alive = job(1, pid=os.getppid(), host=name)
    Ledger(tmp_path, "t").write(alive)
    assert jobs_of(tmp_path)[1].state == "running"


def test_jobs_share_a_device_if_they_run_there_at_the_same_time(tmp_path):
    """Of all pairs of four intervals on two devices, by their definition; two processes."""
    times = [(0, 2), (1, 3), (2, 4), (5, None)]

    def moment(second: int | None) -> str | None:
        return None if second is None else f"2026-01-01T00:00:0{second}.000+00:00"

    for number, (mine, theirs) in enumerate(product(product(times, "ab"), repeat=2)):
        folder = tmp_path / str(number)
        for place, ((begun, end), gpu) in enumerate((mine, theirs)):
            state = "running" if end is None else "finished"
            pair = {"started": moment(begun), "ended": moment(end), "gpu": gpu}
            Ledger(folder, "t").write(
                job(place, state=state, pid=(os.getppid(), 1)[place], **pair)
            )
        spans = [set(range(b, 10 if e is None else e)) for (b, e), _ in (mine, theirs)]
        expected = mine[1] == theirs[1] and bool(spans[0] & spans[1])
        assert [one.shared for one in jobs_of(folder)] == [expected] * 2


CODES = {
    "finished": 0,
    "done already": 0,
    "refused": 2,
    "failed": 1,
    "interrupted": 130,
}


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_a_sweep_ends_with_the_worst_of_its_jobs(verdict):
    passed, failed = ({"lossless": {"verdict": one}} for one in ("passed", verdict))
    for pair in product(CODES, repeat=2):
        codes = {CODES[state] for state in pair} | {3 if verdict == "failed" else 0}
        expected = next(code for code in (130, 1, 3, 2, 0) if code in codes)
        assert exit_code([job(state=state) for state in pair], [passed, failed]) == expected
    assert exit_code([job()], [None]) == 1  # it runs, whoever knows where
    assert worst([]) == 0
    assert [worst([3, 2, 0]), worst([3, 1, 2]), worst([1, 130, 3])] == [3, 1, 130]


def test_words_that_differ_name_a_job():
    assert differing([["a=1", "b=1"], ["a=1", "b=2"]]) == ["b=1", "b=2"]
    assert differing([["a=1", "b=1"]]) == ["a=1 b=1"]
    assert differing([]) == []


def test_how_processes_end_is_said_in_words():
    assert ending(3) == "ended with exit code 3"
    assert ending(-9) == "ended by signal 9 (SIGKILL), as it does where memory runs out"
    assert ending(-200) == "ended by signal 200"


def test_what_sweepers_maximise():
    assert objective({"speedup": 1.5, "tokens_per_second": 9.0}) == 1.5
    assert objective({"speedup": None, "tokens_per_second": 9.0}) == 9.0
    assert objective(None) is None


def test_a_failed_job_leaves_no_memory(tmp_path):
    """As that of a model, which its traceback holds."""
    freed = []

    class Big:
        def __del__(self) -> None:
            freed.append(True)

    def work(began: Any) -> dict[str, Any]:
        big = Big()
        big.itself = big  # type: ignore[attr-defined]
        raise torch.OutOfMemoryError("full")

    failed = job()
    assert attempt(Ledger(tmp_path, "t"), failed, work) is None
    assert freed
    assert failed.state == "failed"
    assert "full" in (tmp_path / "jobs/t-0.error.txt").read_text()


def test_a_full_disk_hides_no_interruption(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, "t")

    def work(began: Any) -> dict[str, Any]:
        def full(job: Job) -> None:
            raise ValueError("cannot be written")

        monkeypatch.setattr(ledger, "write", full)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(ledger, job(), work)


def test_names_in_the_table_are_no_markup(capsys):
    jobs = [job(n, words=[f"drafter=[red]{n}"], state="refused", reason="[bold]") for n in (1, 2)]
    show_sweep(jobs, [None, None], Console(width=100))
    printed = capsys.readouterr().out
    assert "[red]1" in printed
    assert "[bold]" in printed
    assert "sweep" not in printed
