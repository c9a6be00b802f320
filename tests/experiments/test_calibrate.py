"""Calibration of the zoo pair on this machine."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec import calibration
from specdec.costs import CostTable
from specdec.experiments.figures import decoding
from specdec.experiments.tools import calibrate
from specdec.models.fingerprint import fingerprint
from specdec.models.load import load_model
from specdec.passes import CHOICES, Passes

TINY = shlex.split(
    "target=zoo:target draft=zoo:draft device=cpu dtype=float32 replays=1 "
    "batches=[2,1] nodes=[1,5] contexts=[16,32] widths=[1,3] draft_contexts=[16]"
)


def test_calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "LOOP_TOKENS", 4)
    monkeypatch.setattr(calibrate, "LEVELS", 2)
    monkeypatch.setattr(calibration, "TEXTS", 1)
    out = tmp_path / "calibrate.json"
    words = [*TINY, f"out={out}"]
    assert calibrate.main([*words, "only=draft"]) == 0
    with pytest.raises(ValueError, match="unfinished"):
        CostTable.load(out)
    before = json.loads(out.read_text())

    timed: list[int] = []

    def fake(steps: Any, device: torch.device, *, replays: int) -> list[tuple[float, float]]:
        ((drafts, _),) = steps
        timed.append(len(drafts))
        return [(0.0, 0.001 * len(timed))]

    monkeypatch.setattr(calibrate, "step_seconds", fake)
    assert calibrate.main([*words, "resume=true"]) == 0
    result = json.loads(out.read_text())
    assert result["draft"] == before["draft"]
    assert timed == [0, 2] * 4  # the target alone was missing; a root needs no draft
    assert result["command"].count("specdec.experiments.tools.calibrate") == 2
    assert {"hardware", "versions", "git"} <= result.keys()
    models = result["about"]["models"]
    assert models["target"] != models["draft"] == fingerprint(load_model("zoo:draft"))
    # One cache after the other, of a batch and a context; all its nodes.
    ms = torch.tensor(result["verify"]["seconds"]) * 1e3
    assert ms.round().tolist() == [[[1, 3], [2, 4]], [[5, 7], [6, 8]]]
    table = CostTable.load(out)
    assert table.verify(1, 5, 32) == pytest.approx(0.004)
    assert table.draft(2, 3, 16) > 0

    assert "8.00 (1.14)" in capsys.readouterr().out
    lines = decoding.calibrate(result).splitlines()
    assert lines[-2:] == ["| 1 | 3.00 (1.00) | 4.00 (1.33) |", "| 2 | 7.00 (1.00) | 8.00 (1.14) |"]

    assert calibrate.main([*words, "resume=true"]) == 0
    assert len(timed) == 8  # nothing was missing
    words.remove("draft_contexts=[16]")
    assert calibrate.main([*words, "draft_contexts=[8,16]", "resume=true"]) == 2
    assert "draft_contexts=" in capsys.readouterr().err


def test_passes_are_those_of_a_step() -> None:
    """The tree has random keys before it, and the draft's level sees its parents."""
    torch.manual_seed(0)
    lm = load_model("zoo:draft")
    passes = Passes(lm, batch=2, context=16, nodes=6)
    cache = passes.cache
    assert cache is not None
    assert cache.lengths.tolist() == [16, 16, 0]
    with torch.inference_mode():
        logits: Any = passes.verify(6)()
        assert logits.shape == (2, 6, lm.vocab_size)
        assert bool(logits.isfinite().all())
        call = passes.draft(3)
        ids, _ = call()
        assert ids.shape == (6, CHOICES)
        seen = call()[1].clone()
        cache.tree_keys[:, :, :, :3].normal_()  # of the first level
        assert not torch.equal(call()[1], seen)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert calibrate.main([]) == 2
    assert "device=cuda: not available here; use auto or cpu\n" in capsys.readouterr().err
