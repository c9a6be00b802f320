"""The times of acceptance rules: of each, and of none that disagrees."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import operation, run
from specdec.experiments.bench import rules as rule_steps
from specdec.experiments.figures import kernels as tables
from specdec.kernels import reference
from tests.kernels.cases import DEVICE


def test_every_rule_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    options = "rules device=cpu batches=[1,2] vocabulary=90 nodes=6 candidates=5"
    monkeypatch.setattr(rule_steps, "COMPARED", 2)
    monkeypatch.setattr(operation, "wall_us", lambda call: call() and 1.0)
    assert run.main([*options.split(), f"out={path}"]) == 0
    result = json.loads(path.read_text())
    names = [rule.name for rule, _, _ in rule_steps.RULES]
    assert {"traversal", "block", "k_seq", "tokenwise", "typical", "relaxed"} < set(names)
    for record in result["batches"]:
        assert list(record["operations"]) == names
        for found in record["operations"].values():
            assert found["compared"] == 2
            assert 1.0 <= found["length"] <= 6.0
    assert result["settings"]["vocabulary"] == 90
    assert result["command"].startswith("python -m specdec.experiments.bench.run rules device=cpu")
    assert tables.rules(result).endswith("| relaxed | 1.0 (1) | 1.0 (1) |")
    assert run.main(["rules", "device=cpu", "candidates=9", "vocabulary=8"]) == 2


def test_a_rule_that_disagrees_gets_no_time() -> None:
    inputs = rule_steps.Inputs(2, 5, 4, 80, copies=1, dtype=torch.float32, device=DEVICE)
    tree = inputs.tree("bush", "sample")

    def roots(tree: Any, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        path = torch.zeros(2, tree.depth + 1, dtype=torch.int64, device=DEVICE)
        return path, path[:, 0] + 1, path[:, 0]

    wrong = ModuleType("wrong")
    vars(wrong).update(vars(reference) | {"RULES": {"target_only": roots}})
    one = rule_steps.operation_of(rule_steps.TargetOnly(), inputs, tree, wrong, {})
    found = operation.measure(one, 1, None)
    assert "sequences differ" in found["fault"]
    assert "us" not in found
