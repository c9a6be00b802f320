"""CostTable: interpolation against a formula, edges, files that are no such table."""

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.costs import CostTable

BATCHES, NODES, CONTEXTS, WIDTHS = [1, 8, 32], [1, 2, 64], [128, 1024], [1, 4]


def verify_cost(batch: float, nodes: float, context: float) -> float:
    """Linear in each argument, so that interpolation gives it exactly."""
    return 5e-3 + 1e-5 * batch * nodes + 2e-8 * batch * context + 1e-9 * nodes * context


def draft_cost(batch: float, width: float) -> float:
    return 1e-3 + 1e-5 * batch * width


def data() -> dict[str, Any]:
    return {
        "verify": {
            "batch": BATCHES,
            "nodes": NODES,
            "context": CONTEXTS,
            "seconds": [
                [[verify_cost(b, n, c) for c in CONTEXTS] for n in NODES] for b in BATCHES
            ],
        },
        "draft": {
            "batch": BATCHES,
            "width": WIDTHS,
            "context": 1024,
            "seconds": [[draft_cost(b, w) for w in WIDTHS] for b in BATCHES],
        },
    }


def load(tmp_path: Path, found: Any) -> CostTable:
    path = tmp_path / "costs.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return CostTable.load(path)


@pytest.mark.parametrize(
    "point", [(1, 1, 128), (32, 64, 1024), (8, 2, 500), (3, 33, 777), (20.5, 1.5, 129)]
)
def test_inside_the_grid(tmp_path: Path, point: tuple[float, float, float]) -> None:
    table = load(tmp_path, data())
    assert table.verify(*point) == pytest.approx(verify_cost(*point), rel=1e-12)
    batch, width = point[0], min(point[1], 4)
    assert table.draft(batch, width, point[2]) == pytest.approx(
        draft_cost(batch, width), rel=1e-12
    )
    assert table.verify_batches == BATCHES


def test_outside_the_edge_counts(tmp_path: Path) -> None:
    table = load(tmp_path, data())
    assert table.verify(0, 1, 1) == pytest.approx(verify_cost(1, 1, 128))
    assert table.verify(100, 65, 9999) == pytest.approx(verify_cost(32, 64, 1024))
    assert table.verify(100, 33, 0) == pytest.approx(verify_cost(32, 33, 128))
    assert table.draft(1, 99, 5) == pytest.approx(draft_cost(1, 4))


def test_a_grid_of_one_value(tmp_path: Path) -> None:
    found = data()
    found["draft"] |= {"batch": [8], "width": [1], "seconds": [[0.25]]}
    assert load(tmp_path, found).draft(3, 7, 100) == 0.25


def test_drafts_of_several_contexts(tmp_path: Path) -> None:
    """Between contexts by a line, at an edge its own, and what did not fit as before."""
    found = data()
    contexts = [1024, 8192, 32768]
    seconds = [
        [[draft_cost(b, w) + 1e-9 * b * c for c in contexts] for w in WIDTHS] for b in BATCHES
    ]
    seconds[2][1][2] = None  # type: ignore[call-overload]
    found["draft"] |= {"context": contexts, "seconds": seconds}
    table = load(tmp_path, found)
    for batch, width, context in ((1, 1, 1024), (8, 2, 5000), (20, 3, 8192), (8, 4, 20000)):
        wanted = draft_cost(batch, width) + 1e-9 * batch * context
        assert table.draft(batch, width, context) == pytest.approx(wanted, rel=1e-12)
    assert table.draft(8, 1, 1) == table.draft(8, 1, 1024)
    assert table.draft(32, 4, 32768) == table.draft(32, 4, 8192)


def test_what_did_not_fit_into_memory_costs_what_a_shorter_context_does(tmp_path: Path) -> None:
    found = data()
    found["verify"]["seconds"][2][1][1] = None
    table = load(tmp_path, found)
    assert table.verify(32, 2, 1024) == pytest.approx(verify_cost(32, 2, 128))
    assert table.verify(8, 2, 1024) == pytest.approx(verify_cost(8, 2, 1024))


def test_of_shorter_contexts_the_longest_stands_for_what_did_not_fit(tmp_path: Path) -> None:
    found = data()
    contexts, (shortest, longest) = [128, 512, 1024, 2048], (0.25, 0.5)
    found["verify"] |= {
        "context": contexts,
        "seconds": [[[shortest, longest, None, None]] * len(NODES)] * len(BATCHES),
    }
    table = load(tmp_path, found)
    assert [table.verify(8, 2, context) for context in contexts] == [shortest, *[longest] * 3]


def broken(**changes: Any) -> dict[str, Any]:
    found = data()
    found["verify"] |= changes
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "has no 'verify'"),
        ("[]", "list indices"),
        (broken(batch=[8, 1, 32]), "not ascending"),
        (broken(batch=[]), "empty"),
        (broken(nodes=[1, 2]), r"shape \(3, 3, 2\), expected \(3, 2, 2\)"),
        (broken(seconds=[[[None, 1.0]] * 3] * 3), "missing or not positive"),
        (broken(seconds=[[[-1.0, 1.0]] * 3] * 3), "missing or not positive"),
        (broken(seconds=[[["todo", 1.0]] * 3] * 3), "unfinished"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, found)
    assert str(error.value).startswith(str(tmp_path / "costs.json"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.json: no such file; python -m .*calibrate makes"):
        CostTable.load(tmp_path / "none.json")


def test_the_packaged_table_of_the_h200_is_the_one_of_the_readme() -> None:
    root = Path(__file__).parents[2]
    packaged = root / "specdec/data/costs/h200.json"
    assert packaged.read_text() == (root / "experiments/results/calibrate.json").read_text()


@pytest.mark.parametrize("level", [[0.001], [0.001, float("nan")], [0.001, -1.0]])
def test_what_the_loop_adds_is_checked(tmp_path: Path, level: list[float]) -> None:
    data = json.loads((Path(__file__).parents[2] / "specdec/data/costs/h200.json").read_text())
    data["loop"] = {"batch": [1, 8], "level": level, "step": [0.001, 0.002]}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{path}: "):
        CostTable.load(path)
    data["loop"]["level"] = [0.001, 0.003]
    path.write_text(json.dumps(data))
    table = CostTable.load(path)
    assert (table.level(1), table.step(8), table.level(99)) == (0.001, 0.002, 0.003)
    assert table.step(8, 4) == 0.002
    data["loop"]["accept"] = [0.5, 1.0]
    path.write_text(json.dumps(data))
    assert CostTable.load(path).step(8, 4) == 4.002
