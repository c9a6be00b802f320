"""Benchmarks of steps and small operations: definitions, files, tables, the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import elementwise, operation, rules, run, steps
from specdec.experiments.figures import draw, kernels
from specdec.kernels import gpu, reference
from specdec.lab.command import write
from tests.experiments.benched import DEVICE, ScriptedClock

# Steps and elementwise operations


@pytest.mark.slow
def test_steps_agree_with_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NODES", 10)
    monkeypatch.setattr(operation, "wall_us", lambda call: 1.0)
    inputs = steps.StepInputs(2, copies=1, vocabulary=300, layers=1, device=DEVICE)
    names = []
    for name, found in steps.operations(inputs, gpu):
        names.append(name)
        assert "us" in operation.measure(found, 1, ScriptedClock()), name
    assert len(names) == 1 + 3 + 1 + 3
    mine, _ = inputs.contexts(reference)
    lengths = steps.RULES[2].accept(mine, inputs.bush, inputs.logits[0]).length
    assert int(lengths.max()) > 1  # otherwise nothing was walked


def test_steps_that_disagree_get_no_time() -> None:
    inputs = steps.StepInputs(2, copies=1, vocabulary=300, layers=1, device=DEVICE)

    class Wrong:
        RULES, uniforms = gpu.RULES, gpu.uniforms

        @staticmethod
        def tree_structure(*given: Any, **options: Any) -> Any:
            right = reference.tree_structure(*given, **options)
            return right._replace(depths=right.depths + 1)

        @staticmethod
        def commit_path(*given: Any) -> None:
            given[0].zero_()

    for name, found in steps.operations(inputs, Wrong):  # type: ignore[arg-type]
        if name in ("tree_structure", "commit_path"):
            assert "wrong" in operation.measure(found, 1, ScriptedClock())["fault"], name


def test_elementwise_functions() -> None:
    torch.manual_seed(0)
    hidden, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total, normal = elementwise.add_norm(hidden, residual, weight)
    for row in range(3):
        values = [float(h + r) for h, r in zip(hidden[row], residual[row], strict=True)]
        root = math.sqrt(sum(value**2 for value in values) / 8 + 1e-5)
        assert total[row].tolist() == pytest.approx(values)
        wanted = [value / root * float(w) for value, w in zip(values, weight, strict=True)]
        assert normal[row].tolist() == pytest.approx(wanted, rel=1e-5)

    angle = torch.randn(3, 4).repeat(1, 2)
    key_tree, value_tree = torch.zeros(2, 2, 3, 8)
    joined = torch.randn(3, (4 + 2 * 2) * 8)
    query = elementwise.rotate_and_write(key_tree, value_tree, joined, angle.cos(), angle.sin())
    heads = joined.view(3, 8, 8).transpose(0, 1)
    turned = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(
        torch.ones(3, 4), angle[:, :4]
    )
    rotated = torch.cat([turned.real, turned.imag], -1)
    assert torch.allclose(query, rotated[:4], atol=1e-6)
    assert torch.allclose(key_tree, rotated[4:6], atol=1e-6)
    assert torch.equal(value_tree, heads[6:])

    gate, up = torch.randn(2, 3, 5)
    product_ = elementwise.swiglu(torch.cat([gate, up], -1))
    assert torch.allclose(product_, gate * torch.sigmoid(gate) * up)


def test_compiled_functions_are_compared() -> None:
    arguments = (torch.randn(3, 8),)

    def wrong(joined: Tensor) -> Tensor:
        return elementwise.swiglu(joined) * 1.1

    check = elementwise._check_compiled
    check(elementwise.swiglu, elementwise.swiglu, arguments)
    with pytest.raises(ArithmeticError, match="relative difference"):
        check(wrong, elementwise.swiglu, arguments)


# Files


def made_up(measured: dict[str, Any], part: str) -> dict[str, Any]:
    missing = measured | {
        "nodes": 7,
        "methods": {"ours": {"variants": {"": {"fault": "X: y [z]"}}}},
    }
    return {
        "part": part,
        "command": "python -m specdec.experiments.bench.run attention",
        "page_size": 64,
        "ceilings": {"read": 4.5e12, "compute": 7.9e14},
        "hardware": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "shapes": [measured, measured | {"context": 2048}, missing],
    }


@pytest.mark.parametrize("part", ["attention", "grid"])
def test_results_become_a_table_and_a_plot(
    part: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / f"kernel_{part}.json"
    write(path, made_up(measured, part))
    result = json.loads(path.read_text())
    assert "4.50 TB/s, 790 TFLOP/s" in kernels.TABLES[part](result)
    assert any("nodes 7, heads 4: ours: X: y [z]" in line for line in kernels.faults(result))
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_was_cut_short_says_so_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rules.json"

    def fail(options: Any, result: dict[str, Any], save: Any) -> int:
        result["batches"] = [{"batch": 1, "operations": {"greedy": {"us": 1, "torch_us": 2}}}]
        result["settings"] |= {"temperature": 1.0, "dtype": "float32"}
        raise RuntimeError("gone")

    monkeypatch.setattr(rules, "rules", fail)
    assert run.main(["rules", "device=cpu", f"out={out}"]) == 1
    shown = capsys.readouterr().out
    assert "1.0 (2)" in shown
    assert "stopped: RuntimeError: gone" in shown
    assert json.loads(out.read_text())["fault"] == "RuntimeError: gone"


def test_tables_of_operations() -> None:
    result = {
        "command": "",
        "batches": [
            {"batch": 1, "nodes": 64, "operations": {"greedy": {"us": 21.5, "torch_us": 800.0}}},
            {"batch": 8, "operations": {"greedy": {"fault": "ArithmeticError: wrong"}}},
        ],
    }
    assert "| greedy | 21.5 (800) |  |" in kernels.steps(result)
    assert list(kernels.faults(result)) == ["batch 8: greedy: ArithmeticError: wrong"]
    rows = [{"rows": 64, "operations": {"SwiGLU product": {"us": 3.0, "torch_us": 20.0}}}]
    text = kernels.elementwise({"command": "", "rows": rows, "floor": {"1 programs": 1.25}})
    assert "| us (torch) | rows 64 |" in text
    assert "1.2 (1 programs)" in text


def test_table_of_attention(measured: dict[str, Any]) -> None:
    table = kernels.attention(made_up(measured, "attention")).splitlines()
    header, _, *lines = table[-5:]
    assert "NVIDIA H200" in table[0]
    assert header.count("|") == lines[0].count("|") == lines[2].count("|")
    assert lines[1].startswith("| 2, 2048, 5 | 1.0 |")
    assert lines[2].startswith("| 2, 64, 7 |  |")


def test_without_a_gpu_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["attention", "shapes=[[1,2048,64]]"]) == 2
    assert "error: attention: needs an NVIDIA GPU" in capsys.readouterr().err
    assert run.main(["attentive"]) == 2
    assert "attentive: no such part; there are attention, grid" in capsys.readouterr().err
    for words in (["--help"], ["attention", "--help"], ["anatomy", "-h"]):
        assert run.main(words) == 0
    assert "page_size=64" in capsys.readouterr().out
