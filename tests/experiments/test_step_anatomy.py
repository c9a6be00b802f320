"""Where a step goes: kernels of a made-up trace, verbs of the zoo pair, tables and plots."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from specdec.experiments.bench import anatomy, run, timeline
from specdec.experiments.bench.timeline import OTHER, Piece
from specdec.experiments.figures import draw, kernels
from specdec.lab.build import method_of
from specdec.lab.command import parse
from specdec.lab.settings import settings_of

ROOT = Path(__file__).parents[2]


def event(name: str, begin: float, duration: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration}


TRACE = {
    "traceEvents": [
        event("attention_kernel", 8.0, 6.0),  # starts early, waits until 10
        event("stream_kernel", 0.0, 10.0),
        event("Memcpy DtoH (Device -> Pinned)", 20.0, 2.0, "gpu_memcpy"),
        event("void at::native::elementwise", 21.0, 0.5),  # inside the copy
        event("cudaGraphLaunch", 0.0, 100.0, "cuda_runtime"),
        event("ProfilerStep#1", 0.0, 100.0, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_time_is_counted_once() -> None:
    found = timeline.breakdown(timeline.pieces_of(TRACE), steps=2)
    assert found["wall_ms"] == pytest.approx(22e-3 / 2)
    assert found["busy_ms"] == pytest.approx(16e-3 / 2)
    assert found["sum_ms"] == pytest.approx(18.5e-3 / 2)
    assert found["idle"] == pytest.approx(6 / 22)
    groups = found["groups"]
    assert list(groups) == ["weights", "attention", "copies", OTHER]
    assert groups["attention"] == pytest.approx({"own_ms": 2e-3, "sum_ms": 3e-3, "launches": 0.5})
    assert groups[OTHER]["own_ms"] == 0
    assert sum(group["own_ms"] for group in groups.values()) == pytest.approx(found["busy_ms"])
    assert found["longest"][0]["name"] == "stream_kernel"
    with pytest.raises(ValueError, match="nothing was profiled"):
        timeline.breakdown([], steps=2)


def test_own_time_of_nested_and_apart() -> None:
    pieces = [Piece("a", 0, 10), Piece("b", 2, 4), Piece("c", 9, 12), Piece("d", 20, 21)]
    assert timeline.own_time(pieces) == [10, 0, 2, 1]


def test_every_kernel_of_ours_has_a_group() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels/gpu").glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)
    assert len(names) > 15
    assert [name for name in names if timeline.group_of(name) == OTHER] == []
    for name, group in {
        "nvjet_tst_128x64_64x6_2x1_v_bz_TNT": "weights",
        "sm90_xmma_gemm_bf16bf16": "weights",
        "Memset (Device)": "copies",
        "void at::native::vectorized_gather_kernel": OTHER,
    }.items():
        assert timeline.group_of(name) == group


def test_cases() -> None:
    options = anatomy.Options(draft="zoo:draft")
    for case, budget, children in (
        ("none", 0, "top_k"),
        ("chain:4", 4, "sample"),
        ("dynamic:12,3,4", 12, "sample"),
    ):
        method = method_of(settings_of(anatomy.words_of(case, 1.0, options)))
        assert method.labels["tree"] == ("chain" if case == "none" else case.partition(":")[0])
        assert (method.tree.budget, method.tree.children) == (budget, children)
    for wrong in ("chain", "chain:", "chain:x", "dynamic:1,2", "star:3", "head chain:4"):
        with pytest.raises(ValueError, match="cases="):
            anatomy.words_of(wrong, 0.0, options)
    settings = settings_of(anatomy.words_of("eagle3 chain:4", 0.0, options))
    assert (settings["drafter"]["path"], settings["tree"]["budget"]) == ("zoo:eagle3", 4)
    with pytest.raises(ValueError, match="heads="):
        anatomy.words_of("dflash chain:4", 0.0, options)
    given = 'heads=["mtp=a b/c,vocabulary=32000,layers=1", dflash=d]'
    options = parse(anatomy.Options, [given])
    found = settings_of(anatomy.words_of("mtp chain:4", 0.0, options))["drafter"]
    assert (found["path"], found["vocabulary"], found["layers"]) == ("a b/c", 32000, 1)
    assert settings_of(anatomy.words_of("dflash chain:4", 0.0, options))["drafter"]["path"] == "d"
    options = parse(anatomy.Options, ['heads=["eagle3 less=zoo:eagle3,quantize=fp8"]'])
    for case, quantize in (("eagle3", "none"), ("eagle3 less", "fp8")):
        found = settings_of(anatomy.words_of(f"{case} chain:4", 0.0, options))["drafter"]
        assert (found["path"], found["quantize"]) == ("zoo:eagle3", quantize)
    options = parse(anatomy.Options, [given.replace('"', "")])
    with pytest.raises(ValueError, match=r"^heads=vocabulary=32000: .* stands in quotes"):
        anatomy.words_of("mtp chain:4", 0.0, options)


def test_verbs_of_the_zoo_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "anatomy.json"
    words = ["anatomy", "target=zoo:target", "draft=zoo:draft", "device=cpu", "dtype=float32"]
    words += ["tokens=12", "batches=1", f"out={out}"]
    assert run.main([*words, "cases=none"]) == 0
    before = json.loads(out.read_text())["cases"]
    assert run.main([*words, "cases=[none,chain:2]", "resume=true"]) == 0
    assert "chain:2, batch 1" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["cases"]["none, batch 1"] == before["none, batch 1"]
    drafted = result["cases"]["chain:2, batch 1"]
    assert drafted["adds_up"], drafted
    assert drafted["accepted_length"] > 1
    assert sum(drafted["verbs_ms"].values()) == pytest.approx(drafted["wall_ms"])
    assert draw.main([str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cases=star:3"], "cases=star:3: must be none, chain:BUDGET, "),
        (["temperatures=0.5"], "temperatures=[0.5]: must be 0 or 1"),
        (["target=zoo:nobody"], "zoo:nobody"),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["anatomy", "device=cpu", f"out={tmp_path / 'x.json'}", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tables_and_plot_of_kernels(tmp_path: Path) -> None:
    case = {
        "wall_ms": 0.010,
        "verbs_ms": {"draft": 0.002, "verify": 0.008},
        "accepted_length": 2.5,
        "sum_over_clock": 0.9,
        "adds_up": False,
        "kernels": timeline.breakdown(timeline.pieces_of(TRACE), steps=2),
        "host_gap": 0.2,
    }
    result = {
        "command": "python -m specdec.experiments.bench.run anatomy",
        "settings": {"target": "standin:llama3_8b", "draft": "standin:llama_160m"},
        "hardware": {"gpu": "NVIDIA H200", "cpu": "some"},
        "cases": {"chain:4, batch 1": case, "none, batch 1": {"fault": "X: y [z]"}},
    }
    assert list(kernels.faults(result)) == [
        "chain:4, batch 1: the verbs are 0.900 of the clock",
        "none, batch 1: X: y [z]",
    ]
    out = tmp_path / "anatomy.json"
    out.write_text(json.dumps(result))
    assert draw.main([str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = kernels.anatomy(result).splitlines()
    assert "NVIDIA H200" in lines[0]
    assert lines[-1] == "| chain:4, batch 1 | 0.01 | 0.01 | 0.00 | 0.00 | 0.00 | 20.0% |"
    assert lines[-1].count("|") == lines[-3].count("|")
