"""The times of acceptance rules: of each, and of none that disagrees."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import rule_steps
from specdec.experiments.figures import pages as readme
from specdec.kernels import reference
from tests.kernels.cases import DEVICE


def test_every_rule_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    options = "--device cpu --batch 1 2 --vocab 90 --nodes 6 --candidates 5 --out"
    monkeypatch.setattr(sys, "argv", ["rule_steps", *options.split(), str(path)])
    monkeypatch.setattr(rule_steps, "COMPARED", 2)
    monkeypatch.setattr(rule_steps, "wall_us", lambda call: call() and 1.0)
    assert rule_steps.main() == 0
    result = json.loads(path.read_text())
    names = [rule.name for rule, _, _ in rule_steps.RULES]
    assert {"traversal", "block", "k_seq", "tokenwise", "typical", "relaxed"} < set(names)
    for record in result["batches"]:
        assert list(record["operations"]) == names
        for found in record["operations"].values():
            assert found["compared"] == 2
            assert 1.0 <= found["length"] <= 6.0
    lines = readme._operations(result["batches"], "batch", "batch")
    assert lines[-1] == "| relaxed | 1.0 (1) | 1.0 (1) |"


def test_a_rule_that_disagrees_gets_no_time() -> None:
    sizes = rule_steps.Sizes(batch=2, nodes=5, candidates=4, vocabulary=80)
    inputs = rule_steps.Inputs(sizes, copies=1, dtype=torch.float32, device=DEVICE)
    tree = inputs.tree("bush", "sample")

    def roots(tree: Any, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        path = torch.zeros(2, tree.depth + 1, dtype=torch.int64, device=DEVICE)
        return path, path[:, 0] + 1, path[:, 0]

    wrong = ModuleType("wrong")
    vars(wrong).update(vars(reference) | {"RULES": {"target_only": roots}})
    found = rule_steps.time_rule(rule_steps.TargetOnly(), inputs, tree, wrong, None)
    assert "sequences differ" in found["fault"]
    assert "us" not in found
