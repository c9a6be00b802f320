"""Benchmark of taps: the pass that is timed, what becomes of its output, and turns."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.experiments.bench import taps as bench
from specdec.experiments.bench.clock import Timing, spoil
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from tests.experiments.benched import ScriptedClock

OPTIONS = bench.Options(nodes=5, context=128, batches=(2,), turns=4)


@pytest.fixture(scope="module")
def lm() -> PagedLM:
    return load_model("zoo:draft")


def test_outputs_of_every_kind_can_be_spoiled_after_a_replay(lm: PagedLM) -> None:
    call = bench.passes(lm, 2, OPTIONS, (1,))
    with torch.no_grad():  # as the benchmarks run
        output = call(0)
        assert output.is_inference(), "else this shows nothing"
        spoil(output)
        assert output.isnan().all()
        assert not call(0).isnan().any()
        for plain in (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)):
            spoil(plain)
            assert plain.isnan().all()
        whole = torch.zeros(3, dtype=torch.int32)
        spoil(whole)
        assert whole.tolist() == [-1] * 3


class Clock(ScriptedClock):
    """Says which side was timed, by the states that the call keeps."""

    sides: list[str]
    broken = False

    def time(self, start: Any, copies: int, *, quick: bool = False) -> Timing:
        timing = super().time(start, copies, quick=quick)
        kept = dict(
            zip(start.args[0].__code__.co_freevars, start.args[0].__closure__, strict=True)
        )
        self.sides.append("with" if kept["wanted"].cell_contents else "without")
        if self.broken:
            spoil(timing.output)
        return timing


@pytest.fixture
def clock(lm: PagedLM, monkeypatch: pytest.MonkeyPatch) -> Clock:
    scripted = Clock(10, 11, 13, 10, 10, 11, 11, 10)
    scripted.sides = []
    monkeypatch.setattr(bench, "Workshop", lambda *words: SimpleNamespace(target=lm))
    monkeypatch.setattr(bench, "GraphClock", lambda **options: scripted)
    return scripted


def test_sides_take_turns_and_begin_in_turn(clock: Clock, tmp_path: Path) -> None:
    result: dict[str, Any] = {}
    saved: list[int] = []
    options = bench.Options(nodes=5, context=128, batches=(2,), turns=4, taps=(1,))
    with torch.no_grad():
        bench.taps(options, result, lambda: saved.append(len(result["batches"])))
    assert clock.sides == ["without", "with", "with", "without"] * 2
    (record,) = result["batches"]
    assert record["us"] == {"without": [10, 10, 10, 10], "with": [11, 13, 11, 11]}
    assert record["ratio"] == pytest.approx(1.1)
    assert saved == [1]


def test_a_replay_that_writes_nothing_is_told(clock: Clock) -> None:
    clock.broken = True
    options = bench.Options(nodes=5, context=128, batches=(2,), taps=(1,))
    with torch.no_grad(), pytest.raises(RuntimeError, match="a replay gives no logits"):
        bench.taps(options, {}, lambda: None)
