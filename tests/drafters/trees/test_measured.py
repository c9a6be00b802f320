"""Policies that choose shapes by measured rates, and tree=paths; what is wrong with settings."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdec import run as command
from specdec.drafters.trees.accuracy import Accuracy
from specdec.drafters.trees.cost_aware import CostAware
from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.paths import Paths
from specdec.drafters.trees.shapes import (
    greedy,
    optimal,
    skipping,
)
from specdec.drafters.trees.threshold import Threshold
from tests.drafters.scripted import (
    CHILDREN,
)
from tests.drafters.trees.measured import case, cases_file, rates_of

NEW = ("paths", "threshold", "optimal", "accuracy", "cost_aware")


@pytest.mark.parametrize("children", CHILDREN)
def test_the_shapes_of_measured_policies(tmp_path: Path, children: str) -> None:
    rows = [[0.1, 0.6, 0.1], [0.5, 0.1, 0.2]]
    rates = rates_of(*rows)
    path = cases_file(tmp_path, case(children, 1.0, 0.0) | {"rates": rows})
    ordered_only = children != "top_k"
    for budget, depth in [(1, None), (6, None), (9, 2), (16, None)]:
        limits: dict[str, Any] = {"budget": budget, "depth": depth, "children": children}
        best = Optimal(rates=path, temperature=0.7, **limits)
        assert best.shape == optimal(rates, budget, depth)
        likely = Accuracy(rates=path, temperature=2.0, **limits)
        assert likely.shape == greedy(rates, budget, depth, in_order=ordered_only)
        assert (skipping(likely.shape) is None) == ordered_only
        for policy in (best, likely):
            assert 0 < policy.budget == len(policy.shape) <= budget
            assert policy.children == children


def test_paths_are_read_from_a_file_and_from_a_list(tmp_path: Path) -> None:
    listed = [[0, 1], [0], [1], [0, 0], [1]]
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(listed))
    for paths in (listed, str(path)):
        policy = Paths(paths=paths)
        assert policy.shape == {(0,), (1,), (0, 0), (0, 1)}
        assert policy.budget == Paths(paths=paths, budget=4).budget == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Paths(paths=[[0], [1, 0]]), r"tree.paths: \[1, 0\] lacks its parent \[1\]; list"),
        (lambda: Paths(paths=[[0], []]), r"tree.paths: \[\] is no path; each must list ranks"),
        (lambda: Paths(paths=[[0], [0, -1]]), r"tree.paths: \[0, -1\] is no path"),
        (
            lambda: Paths(paths=[[0], [1], [0, 0]], budget=2),
            r"tree.budget=2: the tree has 3 nodes, children 2 \| 1; raise the budget or ",
        ),
        (lambda: Paths(paths=[[0]], budget=-1), "tree.budget=-1: must be 0"),
        (lambda: Paths(paths=[[0]], children="best"), "tree.children=best: must be one of"),
        (
            lambda: Paths(paths=[[0], [2]], children="sample"),
            r"tree.children=sample: the path \[2\] skips a rank, .* use tree.children=top_k",
        ),
        (
            lambda: FixedShape(shape=[(0,), (3,)], children="sample_with_replacement"),
            r"tree.children=sample_with_replacement: the path \[3\] skips a rank",
        ),
        (lambda: Paths(paths="none.json"), "tree.paths=none.json: no such file; it must hold a l"),
        (lambda: Paths(paths="zoo"), "tree.paths=zoo: no such file"),
        (lambda: Threshold(threshold=0.0, budget=3), "tree.threshold=0.0: must be above 0 and at"),
        (lambda: Threshold(threshold=1.1, budget=3), "tree.threshold=1.1: must be above 0 and at"),
        (lambda: Threshold(threshold=0.1, budget=-3), "tree.budget=-3"),
        (lambda: Threshold(threshold=0.1, budget=3, width=0), "tree.width=0: must be at least 1"),
        (lambda: Threshold(threshold=0.1, budget=3, depth=0), "tree.depth=0: must be at least 1"),
        (lambda: Threshold(threshold=0.1, budget=3, children="x"), "tree.children=x"),
        *(
            (lambda kind=kind, wrong=wrong: kind(**{"rates": "zoo", "budget": 3} | wrong), message)
            for kind in (Optimal, Accuracy, CostAware)
            for wrong, message in [
                ({"budget": -1}, "tree.budget=-1: must be 0"),
                ({"depth": 0}, "tree.depth=0: must be at least 1"),
                ({"children": "best"}, "tree.children=best: must be one of"),
                ({"rates": "x"}, "tree.rates=x: no such table"),
                (
                    {"children": "sample"},
                    r"tree.rates=zoo: holds no rates of children=sample at temperature 0 \(",
                ),
            ]
        ),
        (lambda: CostAware(rates="zoo", budget=3, costs="x"), "tree.costs=x: no such table"),
        (lambda: CostAware(rates="zoo", budget=3, batch=0), "tree.batch=0: must be at least 1"),
        (lambda: CostAware(rates="zoo", budget=3, context=0), "tree.context=0: must be at least"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["3", "[0]", "[[0], [0.5]]", "[[true]]", '["0"]', "{}"])
def test_a_file_that_lists_no_paths(tmp_path: Path, content: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"tree.paths={path}: must be a list of paths like"):
        Paths(paths=str(path))


def outputs(folder: Path) -> list[list[int]]:
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return [json.loads(line)["output_ids"] for line in lines]


@pytest.fixture
def specdec(monkeypatch: pytest.MonkeyPatch, load_once: None) -> Callable[..., int]:
    """Run the command in this process: the exit code."""
    quick = ("tracker=none", "prompts.limit=1", "max_new_tokens=12", "dtype=float32")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["specdec", *quick, *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return int(stop.value.code or 0)

    return call


@pytest.mark.some(1)
@pytest.mark.parametrize("tree", NEW)
def test_trees_of_the_command_line_equal_the_baseline(
    specdec: Callable[..., int], tmp_path: Path, tree: str
) -> None:
    costs = ["tree.costs=h200"] if tree == "cost_aware" else []  # by which drafting pays
    out = tmp_path / "greedy"
    assert specdec(f"tree={tree}", *costs, f"out={out}") == 0
    assert outputs(out) == outputs(out / "baseline")
    assert json.loads((out / "summary.json").read_text())["children"] == "top_k"
    out = tmp_path / "sampled"
    sampled = ("sampling=sample", "tree.children=sample", "baseline=false")
    assert specdec(f"tree={tree}", *costs, *sampled, f"out={out}") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["children"] == "sample"
    assert summary["mean_accepted_length"]["pooled"] > 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tree=optimal", "tree.rates=x"), "error: tree.rates=x: no such table"),
        (("tree=optimal", "tree.budget=two"), "error: tree.budget=two: must be a valid integer"),
        (("tree=cost_aware", "tree.costs=x"), "error: tree.costs=x: no such table"),
        (("tree=threshold", "tree.threshold=2"), "error: tree.threshold=2.0: must be above 0"),
        (("tree=paths", "tree.paths=[[0],[1,0]]"), "error: tree.paths: [1, 0] lacks its parent"),
        (("tree=paths", "tree.paths=x.json"), "error: tree.paths=x.json: no such file"),
        (
            ("tree=paths", "tree.paths=[[1]]", "tree.children=sample", "sampling=sample"),
            "error: tree.children=sample: the path [1] skips a rank",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    specdec: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert specdec(*arguments, f"out={tmp_path / 'o'}") == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
