"""Runs of targets in float8: they are lossless of that target, say what it is, and are not taken
for runs of the same target in another type."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import QUICK, SMALL_TARGET, lines, summary_of

Specdec = Callable[..., tuple[int, str, str]]
PAIR = ("target.quantize=fp8", "drafter.quantize=fp8", "cache.dtype=fp8_e4m3")


@pytest.mark.parametrize(
    "words",
    [
        (*PAIR, SMALL_TARGET, "tree=static", "tree.widths=[2,2]"),
        pytest.param(
            ("target.quantize=fp8", "drafter=early_exit", "sampling=sample"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("target.quantize=fp8", "drafter=eagle3", "drafter.quantize=fp8", "tree=dynamic"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pair and pages", "early_exit", "eagle3"],
)
def test_a_run_is_lossless_of_the_quantised_target(
    words: tuple[str, ...], specdec: Specdec, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, out, _ = specdec(*QUICK, *words, f"out={folder}")
    assert code == 0
    summary = summary_of(folder)
    assert summary["quantised"] == "fp8"
    assert "fp8 target" in out
    assert summary["lossless"]["verdict"] == "passed"
    assert summary["mean_accepted_length"]["pooled"] > 1.2
    identity = json.loads((folder / "identity.json").read_text())
    assert identity["parts"]["settings"]["target.quantize"] == "fp8"


def test_texts_of_the_quantised_target_are_not_the_other_ones(
    specdec: Specdec, tmp_path: Path
) -> None:
    """What is read again by another target than the one that decoded it fails."""
    folder = tmp_path / "run"
    words = ("drafter=none", "tree.budget=0", "max_new_tokens=24", "baseline=false", SMALL_TARGET)
    assert specdec(*QUICK, *words, "target.quantize=fp8", f"out={folder}")[0] == 0
    assert summary_of(folder)["lossless"]["verdict"] == "passed"
    from specdec.lab.lossless import verdict
    from specdec.lab.witness import Witness
    from specdec.models.load import load_model
    from specdec.sampling import SamplingParams

    texts = lines(folder / "generations.jsonl")
    found = {
        quantize: verdict(
            texts,
            Witness(load_model("zoo:draft", quantize=quantize)),
            SamplingParams(temperature=0.0, seed=0),
        )["verdict"]
        for quantize in ("none", "fp8")
    }
    assert found == {"none": "failed", "fp8": "passed"}


def test_an_unknown_way_is_refused(specdec: Specdec, tmp_path: Path) -> None:
    code, _, err = specdec(*QUICK, "target.quantize=fp4", f"out={tmp_path / 'run'}")
    assert code == 2
    assert err == "error: target.quantize=fp4: must be 'none' or 'fp8'\n"
