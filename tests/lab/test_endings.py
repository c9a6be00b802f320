"""How runs end: by signals, refusals and failing trackers; and with which words they go on."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from specdec.decode import Decoder
from specdec.lab import experiment, running
from specdec.lab.interrupts import SIGNALS, interruptible
from specdec.lab.progress import Live
from specdec.lab.runs import of_requests
from specdec.lab.tracking import NoTracker
from specdec.models import load
from specdec.models.load import zoo_path
from tests.running import QUICK, ROOT, jobs_by, lines, outputs, summary_of

pytestmark = pytest.mark.usefixtures("load_once")

SHORT = (*QUICK[:1], "prompts.limit=2", "max_new_tokens=4", "drafter=ngram", "baseline=false")
SHORT += ("target.path=zoo:draft",)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which the search path does not hold yet."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals as under a terminal; what a shell runs in the background ignores SIGINT."""
    usual = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = [signal.signal(*pair) for pair in zip(SIGNALS, usual, strict=True)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_a_text_is_on_the_disk_with_all_its_steps(specdec, tmp_path, monkeypatch):
    """Else a run that is killed would decode it again."""
    out, finished, seen = tmp_path / "o", Live.finished, []
    files = ("generations.jsonl", "steps.jsonl", "trees.jsonl")

    def noted(live: Live, tokens: int) -> None:
        finished(live, tokens)
        seen.append([lines(out / file) for file in files])

    monkeypatch.setattr(Live, "finished", noted)
    assert specdec(*SHORT, "record.trees=2", f"out={out}")[0] == 0
    assert [len(texts) for texts, _, _ in seen] == [1, 2]
    for texts, steps, trees in seen:
        done = {one["request"] for one in texts}
        assert steps == of_requests(lines(out / "steps.jsonl"), done)
        assert trees == [one for one in lines(out / "trees.jsonl") if one["request"] in done]
        assert trees


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal in that step."""
    steps = iter(range(1, 10**6))

    def kill(self: NoTracker, _: Any) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(NoTracker, "step", kill)


def continued(printed: str) -> list[str]:
    """The words of the command that an interruption printed."""
    (line,) = (line for line in printed.splitlines() if "this continues: " in line)
    python, dash, module, *words = shlex.split(line.partition("this continues: ")[2])
    assert (python, dash, module) == ("python", "-m", "specdec.run")
    return words


def test_the_command_of_an_interruption_continues_it(specdec, own_folder, monkeypatch):
    words = (*SHORT, "tree=static", "tree.widths=[2, 1]", "seed=7")
    assert specdec(*words, "out=whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, signal.SIGTERM)
        code, printed, error = specdec(*words, 'out="it\'s, a folder"')
    assert (code, error) == (130, "")
    cut = own_folder / "it's, a folder"
    assert 0 < len(lines(cut / "generations.jsonl")) < 2
    assert summary_of(cut)["interrupted"]
    again = continued(printed)
    assert specdec(*again)[0] == 0
    assert outputs(cut) == outputs(own_folder / "whole")
    assert not (cut / "lock").exists()


def test_a_run_that_is_interrupted_while_it_loads_leaves_nothing(specdec, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, printed, error = specdec(*SHORT, f"out={tmp_path}/a/b")
    assert (code, error) == (130, "")
    assert "0 finished texts" in printed
    assert "continues" not in printed
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_at_any_moment_goes_on(tmp_path, number):
    command = [sys.executable, "-m", "specdec.run", "tracker=none", "prompts.limit=4"]
    command += ["max_new_tokens=32", "sampling=sample", "batch_size=2"]

    def begin(*words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *words], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def end(process: subprocess.Popen[str]) -> tuple[int, str]:
        _, error = process.communicate(timeout=300)
        return process.returncode, error

    assert end(begin(f"out={tmp_path}/whole")) == (0, "")
    random.seed(number)
    cut, killed = tmp_path / "cut", 0
    for _ in range(2):
        resume = ["resume=true"] * (cut / "config.yaml").exists()
        process = begin(f"out={cut}", *resume)
        while not (cut / "lock").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 3.0))
        if process.poll() is None:
            process.send_signal(number)
        code, error = end(process)
        assert (code, error) in {(0, ""), (-number, ""), (130, "")}  # or while it imports
        killed += code != 0
    assert killed
    resume = ["resume=true"] * (cut / "config.yaml").exists()
    assert end(begin(f"out={cut}", *resume)) == (0, "")
    assert outputs(cut) == outputs(tmp_path / "whole")
    assert outputs(cut / "baseline") == outputs(tmp_path / "whole/baseline")


GUESS = "def guess(tokens):\n    return [tokens[-{n}:]]\n"


def test_a_run_goes_on_with_the_same_files_alone(specdec, own_folder, monkeypatch):
    files = {"prompts.jsonl": '{"text": "It was"}\n{"text": "def f("}\n', "guessing.py": GUESS}
    for name, text in files.items():
        (own_folder / name).write_text(text.replace("{n}", "2"))
    words = (*SHORT, "drafter=user", "drafter._target_=guessing.guess", "out=o")
    words += ("prompts.path=prompts.jsonl",)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, signal.SIGINT)
        assert specdec(*words)[0] == 130
    config = yaml.safe_load((own_folder / "o/config.yaml").read_text())
    assert (config["dtype"], config["acceptance"]["_target_"]) == ("auto", None)
    resolved = config["resolved"]
    assert (resolved["dtype"], resolved["acceptance"]) == ("float32", "greedy")
    template = AutoTokenizer.from_pretrained(zoo_path("target")).chat_template
    assert resolved["chat_template"] == sha256(template.encode()).hexdigest()[:16]
    identity = json.loads((own_folder / "o/identity.json").read_text())
    contents = identity["parts"]["contents"]
    assert set(contents) == {"prompts", "target.path", "drafter._target_"}
    for name, setting in (("prompts.jsonl", "prompts"), ("guessing.py", "drafter._target_")):
        before = (own_folder / name).read_text()
        (own_folder / name).write_text(before.replace("It", "This").replace("2", "3"))
        code, _, error = specdec(*words, "resume=true")
        assert (code, error.count("\n")) == (2, 1)
        assert f"/o: contents of {setting} differs from the run there; " in error
        (own_folder / name).write_text(before)
    monkeypatch.setattr("specdec.models.placement.choose_dtype", lambda *_: torch.float64)
    assert "/o: dtype differs from the run there" in specdec(*words, "resume=true")[2]
    monkeypatch.undo()
    monkeypatch.chdir(own_folder)
    assert specdec(*words, "resume=true")[0] == 0


REFUSED = {
    "tree.budget=-1,-2": "tree.budget=-1: must be",
    "out=file": "/file: cannot be used, File exists; choose another place",
    "out=": "out=: must be a folder",
    "out=null": "out=None: must be a folder",
    "target.path=/nowhere": "no such folder",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused_runs_and_sweeps_leave_nothing(specdec, own_folder, word):
    (own_folder / "file").touch()
    (own_folder / "there").mkdir()
    for sweep in (True, False):
        out = "out=new/a" if "," in word else "out=there"
        words = (*SHORT, out, word if sweep else word.partition(",")[0])
        code, _, error = specdec(*["-m"] * sweep, *words)
        assert code == 2
        assert REFUSED[word] in error
        assert error.count("\n") == (2 if sweep and "," in word else 1)
        assert left(own_folder) == ["file", "there"]


def test_a_sweep_is_not_put_into_a_run(specdec, own_folder):
    (own_folder / "there").mkdir()
    (own_folder / "there/summary.json").touch()
    code, _, error = specdec("-m", *SHORT, "out=there")
    assert (code, error.count("\n")) == (2, 1)
    assert error.endswith("/there: holds a run; choose another folder\n")
    assert left(own_folder) == ["there", "there/summary.json"]


def test_a_sweep_goes_on_where_it_was_interrupted(specdec, own_folder, monkeypatch):
    words = ("-m", *SHORT, "seed=1,2,3")
    code, _, error = specdec(*words, "out=s", "resume=true")
    assert (code, left(own_folder)) == (2, [])
    assert "resume=true: there is no sweep to continue in out=" in error
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13, signal.SIGINT)  # in the second run of three
        code, printed, _ = specdec(*words, "out=s")
    assert code == 130
    assert sorted(jobs_by(own_folder / "s", "seed")) == [1, 2]
    assert specdec(*continued(printed))[0] == 0
    found = jobs_by(own_folder / "s", "seed")
    assert sorted(found) == [1, 2, 3]
    assert all(len(outputs(job)) == 2 for job in found.values())


def test_a_sweep_keeps_what_was_finished(specdec, tmp_path):
    code, _, error = specdec("-m", *SHORT, "seed=1,x,2", f"out={tmp_path}/s", "prompts.limit=1")
    assert code == 2
    assert error.startswith("error: seed=x: ")
    assert sorted(jobs_by(tmp_path / "s", "seed")) == [1, 2]


class Failing(NoTracker):
    """A tracker of the user's."""

    def finish(self, summary: Any, generations: Any) -> None:
        raise OSError(28, "No space\nleft")


def test_a_tracker_that_fails_costs_one_line(specdec, tmp_path):
    tracker = f"tracker._target_={__name__}.Failing"
    code, printed, error = specdec(*SHORT, tracker, f"out={tmp_path}/o", "prompts.limit=1")
    assert (code, error) == (0, "")
    said = "Failing failed, OSError: [Errno 28] No space left; the run goes on without it; "
    said += f"specdec sync {tmp_path}/o makes up for it\n"
    assert printed.count(said) == 1
    assert summary_of(tmp_path / "o")["tokens"] == 4


class Told(NoTracker):
    """Keeps what it is told at the end."""

    told: ClassVar[list[Any]] = []

    def finish(self, summary: Any, generations: Any) -> None:
        self.told.append((summary, generations))


def test_a_check_for_which_no_memory_is_left_costs_the_check_alone(specdec, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(experiment, "verdict", full)
    tracker = f"tracker._target_={__name__}.Told"
    assert specdec(*SHORT, tracker, f"out={tmp_path}/o", "prompts.limit=1")[0] == 0
    reason = "no memory is left for passes over the texts"
    assert summary_of(tmp_path / "o")["lossless"] == {"verdict": "not checked", "reason": reason}
    ((summary, generations),) = Told.told
    assert summary["lossless"]["reason"] == reason
    assert [g["output_ids"] for g in generations] == list(outputs(tmp_path / "o").values())


FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139 GiB."


@pytest.mark.parametrize("call", ["_step", "_draft"])  # the drafter is not to blame either
@pytest.mark.parametrize("most", [2, 12])  # in the warm-up, and later
def test_a_full_gpu_ends_in_one_line(specdec, tmp_path, monkeypatch, call, most):
    method, calls = getattr(Decoder, call), []

    def full(self: Decoder, *given: Any) -> Any:
        calls.append(call)
        if len(calls) > most:
            raise torch.OutOfMemoryError(FULL)
        return method(self, *given)

    monkeypatch.setattr(Decoder, call, full)
    out = tmp_path / "o"
    code, _, errors = specdec(*SHORT, "batch_size=1", "prompts.limit=4", f"out={out}")
    assert code == 1
    left = "no text is finished"
    if most == 12:
        finished = summary_of(out)["prompts"]
        assert 0 < finished < 4
        left = f"{finished} finished texts are in {out}"
    assert errors.splitlines() == [
        "error: the memory of the GPU is full, 2.50 GiB more were needed; lower batch_size=1, "
        f"max_new_tokens=4 or trees of up to 2 nodes; {left}"
    ]


def test_a_gpu_that_is_full_before_the_first_text_ends_in_one_line(specdec, monkeypatch):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(running, "experiment_of", full)
    code, _, errors = specdec(*SHORT)
    assert code == 1
    assert errors.splitlines() == [
        "error: the memory of the GPU is full, 2.50 GiB more were needed; choose smaller models, "
        "dtype=bfloat16 or target.quantize=fp8"
    ]


def test_signals_are_as_before_once_a_run_has_ended():
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in SIGNALS]

    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    before = handlers()
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            assert handlers() == [signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN]  # at once
        assert handlers() == before
    finally:
        signal.signal(signal.SIGHUP, ignored)
