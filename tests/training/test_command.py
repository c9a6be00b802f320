"""The command: from words to a head that a run uses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec import train as command
from specdec.lab.settings import settings_of
from specdec.training import run as training
from specdec.training.methods.early_exit import EarlyExit
from specdec.training.trainee import Surroundings
from tests.training.small import texts

SMALL = (
    "length=16 batch=1 corpus.held_out=2 own_text.batch=1 own_text.minutes=0.001 measure.depth=3 "
    "method.steps=2 method.warm_up=2 device=cpu tracker=none"
)


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train", *words.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_a_few_steps_on_the_zoo(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "False")
    out, data = tmp_path / "out", texts(tmp_path)
    code, said, error = train(f"{SMALL} data={data} tokens=80 out={out}")
    assert (code, error) == (0, "")
    assert said.startswith("TOKENIZERS_PARALLELISM=False: a single thread turns texts into tokens")
    result = json.loads((out / "training.json").read_text())
    assert (result["steps"], result["tokens"]) == (5, 80)
    last = result["curve"][-1]
    assert last["own/greedy"] >= 1
    assert len(last["corpus/sampled_by_depth"]) == 3
    using = f"python -m specdec.run drafter=eagle3 drafter.path={out}/head"
    assert f"head in {out}/head; this uses it: {using}\n" in said
    code, _, error = train(f"{SMALL} data={data} tokens=80 out={out}")
    assert code == 2
    said = "holds a training already; resume=true continues it, or choose another"
    assert error == f"error: out={out}: {said}\n"
    code, said, error = train(f"{SMALL} data={data} tokens=80 out={out} resume=true")
    assert (code, error) == (0, "")
    assert "TOKENIZERS" not in said  # the corpus is there
    assert json.loads((out / "training.json").read_text())["steps"] == 5
    code, _, error = train(f"{SMALL} data={data} tokens=96 out={out} resume=true")
    assert code == 2
    assert error.startswith("error: tokens=96: the training in ")


def test_the_exit_that_is_trained_is_a_third_of_the_layers(
    train: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is trained is what was checked against the target, and what a run is told to use."""
    trained = []
    make = EarlyExit.make

    def noting(self: EarlyExit, surroundings: Surroundings) -> Any:
        trained.append(make(self, surroundings))
        return trained[-1]

    monkeypatch.setattr(EarlyExit, "make", noting)
    out, words = tmp_path / "out", SMALL.replace("method.steps=2 ", "")
    words = f"{words} method=early_exit own_text.share=0 data={texts(tmp_path)} tokens=16"
    code, said, error = train(f"{words} out={out}")
    assert (code, error) == (0, "")
    assert [one.layers for one in trained] == [2]  # of 6
    assert f"target.path={out}/head drafter=early_exit drafter.exit_layer=2\n" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "data: must be given; "),
        ("data=nowhere", "data=nowhere: no such file or folder; or python"),
        ("data=python method=eagle4", "method=eagle4: no such option; the nearest is eagle"),
        ("data=python method.step=3", "method.step: no such setting; the nearest is method.steps"),
        (
            "data=python corpus.token=3",
            "corpus.token: no such setting; the nearest is corpus.tokens",
        ),
        ("data=python method.steps=0", "method.steps=0: must be at least 1"),
        ("data=python method.loss=mse", "method.loss=mse: must be one of kl, reverse_kl, tv, "),
        ("data=python method.rate=0", "method.rate=0.0: must be above 0"),
        ("data=python minutes=0", "minutes=0.0: must be above 0"),
        ("data=python minutes=null", "minutes=null: give minutes or tokens, after which it ends"),
        ("data=python length=4", "length=4: must be at least 8 tokens"),
        ("data=python resume=maybe", "resume=maybe: must be true, false or auto"),
        ("data=python corpus.held_out=0", "corpus.held_out=0: must be at least 1"),
        ("data=python own_text.share=2", "own_text.share=2.0: must be from 0 to 1"),
        ("data=python measure.depth=0", "measure.depth=0: must be above 0"),
        ("data=python target=hf target.path=/no/model", "target.path=/no/model: no such folder; "),
        (
            "data=python target.path=zoo:dspark",
            "target.path=zoo:dspark: is a head of kind dspark ",
        ),
        ("data=python --multirun", "--multirun: training has no such option; --help lists them"),
        ("data=python device=tpu", "device=tpu: "),
    ],
)
def test_mistakes_end_in_one_line(
    train: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = train(f"out=made {words}")
    assert code == 2
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_a_training_is_not_put_into_a_run(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    data = texts(tmp_path)
    for mark, what in (("generations.jsonl", "run"), ("plan.json", "record")):
        (tmp_path / mark).touch()
        code, _, error = train(f"data={data} out={tmp_path}")
        said = f"error: out={tmp_path}: holds a {what}; choose another folder\n"
        assert (code, error) == (2, said)
        (tmp_path / mark).unlink()


def test_taps_are_refused_before_texts_are_read(tmp_path: Path) -> None:
    words = f"{SMALL} data={texts(tmp_path)} tokens=64 method.taps=[7] out={tmp_path}/out"
    with pytest.raises(ValueError, match=r"^method\.taps=\[7\]: 7 must be 0 to 6, the layers"):
        training.train(settings_of(words, "train"), tmp_path / "out", None)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_told_the_command_that_continues(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: training.Job, words: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Job, "run", interrupted)
    own = f"--config-dir {tmp_path}"
    words = f"{SMALL} data={texts(tmp_path)}"
    code, said, _ = train(f"{own} {words} resume=true out={tmp_path}/out")
    assert code == 130
    again = f"{own} {words} resume=auto out={tmp_path}/out"
    assert "".join(said.split()) == "".join(
        f"interrupted; this continues: python -m specdec.train {again}".split()
    )


def test_a_full_gpu_ends_in_one_line(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: training.Job, words: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(training.Job, "run", full)
    code, _, error = train(f"{SMALL} data={texts(tmp_path)} out={tmp_path}/out")
    mend = "lower batch, chunk or own_text.batch"
    assert error == f"error: the memory of the GPU is full, 2.00 GiB more were needed; {mend}\n"
    assert code == 1


def test_help_lists_methods_and_settings(train: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = train("--help")
    assert code == 0
    assert said.startswith("python -m specdec.train ")
    assert "method.steps=5" in said
    assert "corpus.held_out=200" in said


@pytest.mark.slow
def test_a_head_learns_within_a_minute(tmp_path: Path) -> None:
    """On text of installed packages. Seed 0 came to a loss of 2.96 and a length of 1.30."""
    from rich.console import Console

    words = (
        "data=python corpus.tokens=300000 corpus.held_out=8 length=128 batch=4 tokens=30720 "
        "own_text.share=0 measure.depth=3 method.steps=2 method.warm_up=20 device=cpu"
    )
    settings = settings_of(f"{words} out={tmp_path}", "train")
    found = training.train(settings, tmp_path, Console(quiet=True))
    losses = [point["loss"] for point in found["curve"] if "loss" in point]
    assert losses[-1] < 4.5
    assert found["best"]["corpus/sampled"] > 1.15
