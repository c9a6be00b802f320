"""Runs of several processes: what is refused before any is started, what a run leaves, and how it
ends when one of them does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.lab.setup import Source
from specdec.lab.together import ANSWER, FOLDER, _watch, check_together
from specdec.models.placement import Placement
from specdec.ranks import Ranks
from tests.models.tiny import save, tiny
from tests.ranks import together
from tests.running import ROOT, outputs, summary_of

Command = Callable[..., tuple[int, str, str]]
WORDS = ("target=hf", "tracker=none", "prompts.limit=2", "max_new_tokens=12", "device=cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save(tiny("llama", eos_token_id=None), folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("target.path=zoo:target", "target.tp=2"),
            "1 key-value head of target.path=zoo:target cannot be",
        ),
        (("target.tp=3",), "2 key-value heads of target.path=.* cannot be split; .*: 2$"),
        (("target.tp=0",), "^error: target.tp=0: must be at least 1$"),
        (("target.tp_wait=0",), "^error: target.tp_wait=0: must be at least 1 second$"),
        (("target.tp=2", "record.energy=true"), "record.energy=true: measures one GPU"),
        (("target.tp=2", "tree=cost_aware", "tree.rates=zoo_ngram"), "tree.costs=auto: passes"),
        (("target.tp=2", "drafter=compose", "drafter.mode=bandit"), "drafter.mode=bandit: goes"),
    ],
)
def test_what_is_refused_before_anything_is_started(
    specdec: Command, model: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    found = (*WORDS, f"target.path={model}", "drafter=ngram", f"out={tmp_path / 'o'}", *words)
    code, out, err = specdec(*found)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(said, err.strip()), err
    assert not (tmp_path / "o").exists()


def check(path: str, size: int, device: str = "cuda") -> str:
    settings: dict[str, Any] = {"record": {}, "tree": {}, "drafter": {}, "target": {}}
    with pytest.raises(ValueError, match=r"target\.tp") as refused:
        check_together(settings, size, path, Placement(device=torch.device(device)))
    return str(refused.value)


def test_more_ranks_than_gpus_and_packages(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check(str(model), 2) == "target.tp=2: takes 2 GPUs, and 1 is visible here; lower it"
    assert "use device=cuda, and CUDA_VISIBLE_DEVICES" in check(str(model), 2, "cuda:1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "accelerate to load a model in parts; pip install 'specdec-lab[tp]'" in check(
        str(model), 2
    )
    assert Source(path="x").tp == 1


def watched(folder: Path, ranks: Ranks) -> None:
    os.environ[FOLDER] = str(folder)
    ranks.since = time.monotonic() - 2 * ranks.wait
    _watch(ranks, os.getppid())


def test_a_step_that_never_ends_ends_all_in_one_line(tmp_path: Path) -> None:
    assert together(tmp_path, partial(watched, tmp_path), wait=5.0) == [1, 0]
    assert json.loads((tmp_path / ANSWER).read_text())["error"] == (
        "target.tp=2: no step has ended for 10 s; raise target.tp_wait if one may take longer"
    )


def test_jobs_in_turns_are_one_process(specdec: Command, model: Path, tmp_path: Path) -> None:
    words = (*WORDS, f"target.path={model}", f"out={tmp_path / 'o'}", "drafter=ngram,none", "-m")
    code, _, err = specdec(*words, "hydra/launcher=turns", "target.tp=2")
    assert code == 2
    assert "target.tp=2: is done by python -m specdec.run, each run in processes of" in err


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "specdec.run", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(run: subprocess.Popen[str]) -> list[int]:
    """Processes of its ranks, in order."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            told = (place / "environ").read_bytes().split(b"\0")
            parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        rank = next((one[5:] for one in told if one.startswith(b"RANK=")), None)
        if rank is not None and int(parent) == run.pid:
            found[int(rank)] = int(place.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_a_run_of_two_processes_is_that_of_one(model: Path, tmp_path: Path, quantize: str) -> None:
    words = (*WORDS, f"target.path={model}", "drafter=ngram", "batch_size=2")
    words = (*words, f"target.quantize={quantize}")
    for name, more in (("one", ()), ("two", ("target.tp=2",))):
        run = start(tmp_path, *words, *more, f"out={tmp_path / name}")
        out, err = run.communicate(timeout=120)
        assert (run.returncode, err) == (0, ""), err
        assert out.count("lossless: passed") == 1
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
    again = start(tmp_path, *words, "target.tp=2", "resume=true", f"out={tmp_path / 'two'}")
    assert "done already" in again.communicate(timeout=120)[0]
    assert not list(Path("/tmp").glob("specdec-ranks-*/rank1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "sent", "code", "said"),
    [
        (None, signal.SIGINT, 130, ""),
        (None, signal.SIGTERM, 130, ""),
        (1, signal.SIGKILL, 1, "rank 1: its process .* ended without a word"),
        (0, signal.SIGKILL, 1, "rank 0 ended by signal 9"),
    ],
)
def test_what_ends_one_process_ends_all(
    model: Path, tmp_path: Path, rank: int | None, sent: int, code: int, said: str
) -> None:
    words = (*WORDS, f"target.path={model}", "drafter=ngram", "target.tp=2")
    long = ("max_new_tokens=90", "prompts.limit=null", "ignore_eos=true")
    run = start(tmp_path, *words, *long, f"out={tmp_path / 'o'}")
    begun = time.monotonic()
    done = tmp_path / "o/baseline/generations.jsonl"
    while not (done.exists() and done.stat().st_size):
        assert run.poll() is None
        assert time.monotonic() - begun < 90
        time.sleep(0.1)
    processes = ranks_of(run)
    assert len(processes) == 2
    os.kill(run.pid if rank is None else processes[rank], sent)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    assert re.search(said, err), err
    assert len(err.splitlines()) == bool(said), err
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    if rank != 0:
        assert summary_of(tmp_path / "o")["interrupted"]
