"""The benchmark of long contexts, at sizes of a CPU."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.experiments.bench import long, run
from specdec.flight import Step
from specdec.lab.command import parse
from specdec.lab.workshop import Workshop

TINY = "target=zoo:target device=cpu dtype=float32 context=96 batch=2 levels=[2] nodes=[1,4]"
WORDS = [*TINY.split(), "tokens=12", "rounds=1", "window=32", "beside=8", "chunk=8"]


def test_every_part_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specdec.cached_model.AT_ONCE", 16)
    monkeypatch.setattr(long, "SHORT", 4)
    out = tmp_path / "long.json"
    assert run.main(["long", *WORDS, "rate=1.0", f"out={out}"]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["verify 1", "verify 4", "draft 1", "none", "own_cache 2", "beside"]
    assert (cases["none"]["accepted_length"], cases["own_cache 2"]["accepted_length"]) == (1, 3)
    own, none = (cases[name]["tokens_per_second"] for name in ("own_cache 2", "none"))
    assert cases["own_cache 2"]["over_none"] == pytest.approx(own / none)
    assert cases["beside"]["steps"] >= 96 // 8 - 4
    assert "own_cache 2" in capsys.readouterr().out


def test_contexts_are_filled_without_a_pass() -> None:
    options = parse(long.Options, WORDS)
    shop = Workshop("target.path=zoo:target", "device=cpu dtype=float32")
    filled = long.filled_of(options, shop, 12)
    held = filled.hold([one.tokens for one in long.prompts_of(options, shop)])
    assert held == 2 * (95 // 16 * 16)
    filled.cache.check()
    used = filled.cache.keys.flatten(2).abs().sum(-1).bool()[0]  # pages with something in them
    assert int(used.sum()) == held // 16


def test_only_steps_of_all_sequences_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins let one end before the other; what it is to decode alone is not asked."""
    counted: list[int] = []
    measure = long.of_steps

    def noted(steps: Sequence[Step]) -> dict[str, Any]:
        counted.append(len(steps))
        return measure(steps)

    monkeypatch.setattr(long, "of_steps", noted)
    options = replace(parse(long.Options, WORDS), rate=0.5, context=32, tokens=24)
    cases: dict[str, Any] = {}
    long.loop(options, Workshop("target.path=zoo:target", "device=cpu dtype=float32"), cases)
    own = cases["own_cache 2"]
    assert counted == [24, own["steps"]]
    assert own["steps"] * own["accepted_length"] * 2 < 2 * 24


def test_rows_beside_a_prompt_have_positions_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cached_model.AT_ONCE", 16)
    monkeypatch.setattr(long, "SHORT", 4)
    shop = Workshop(
        "target.path=zoo:target",
        "device=cpu dtype=float32 cache.prefill_beside=8 cache.prefill_chunk=8",
    )
    shop.target.max_context = 160
    cases: dict[str, Any] = {}
    long.beside(replace(parse(long.Options, WORDS), context=120), shop, cases)
    assert cases["beside"]["context"] == 160 - (120 // 8 + 64)
    assert cases["beside"]["steps"] >= 81 // 8 - 4


def test_contexts_that_would_wait_for_one_another_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specdec.cached_model.pages_of", lambda *_: 10)  # a sequence and a half
    shop = Workshop("target.path=zoo:target", "device=cpu dtype=float32")
    with pytest.raises(ValueError, match=r"context=96: 2 of them exceed the memory; lower batch"):
        long.filled_of(parse(long.Options, WORDS), shop, 12)


def test_contexts_beyond_the_target_are_refused() -> None:
    options = parse(long.Options, [word.replace("=96", "=4090") for word in WORDS])
    shop = Workshop("target.path=zoo:target", "device=cpu dtype=float32")
    with pytest.raises(ValueError, match=r"context=4090: with 12 new tokens it exceeds the 4096"):
        long.filled_of(options, shop, 12)
