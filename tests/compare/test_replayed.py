"""Replayed methods beside runs: what a replay expects is shown, and never mixed with times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from specdec.compare.comparing import compare
from specdec.compare.report import html
from tests.compare.folders import LENGTHS, entries, only, run, texts
from tests.compare.page import Page

GENERATIONS, STEPS = texts(LENGTHS)
SETTINGS = {
    "target.path": "zoo:target",
    "sampling.temperature": 0.0,
    "max_new_tokens": 12,
    "seed": 3,
    "prompts.samples": 1,
    "prompts.turns": None,
    "drafter._target_": "ngram",
    "kernels.graphs": False,
}


def row(budget: int, steps: Sequence[float], seconds: float | None) -> dict[str, Any]:
    labels = {"drafter": "ngram", "tree": "optimal", "children": "sample", "acceptance": "block"}
    spent = {} if seconds is None else {"seconds": [seconds * one for one in steps]}
    nodes = [budget * one for one in steps]
    return {
        **labels,
        "budget": budget,
        "acceptance_by_depth": [0.5, 0.25],
        "steps": list(steps),
        "nodes": nodes,
        **spent,
    }


def replay(folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """As `specdec replay` leaves it."""
    conversations = [
        {"category": g["category"], "id": g["id"], "mark": g["prompt_hash"], "texts": 1}
        | {"tokens": g["tokens"]}
        for g in GENERATIONS
    ]
    found = {
        "schema": 2,
        "record": "records/a",
        "costs": "cpu",
        "batch": 4,
        "settings": SETTINGS,
        "contents": {"target.path": "f00d"},
        "code": "c0de",
        "config": {"choices": {"drafter": "ngram"}, "drafter": {}},
        "command": "specdec replay records/a costs=cpu",
        "conversations": conversations,
        "rows": list(rows),
    }
    folder.mkdir(parents=True)
    (folder / "replay.json").write_text(json.dumps(found | changes))
    return folder


def test_expectations_stand_beside_a_run(tmp_path: Path) -> None:
    """A record is of the same work however it was decoded: kernels, batch and seed may differ."""
    one = run(tmp_path / "run", (GENERATIONS, STEPS), settings={"kernels.graphs": True})
    steps = [float(i + 3) for i in range(len(LENGTHS))]
    oracle = {"tokens_per_second": 9.5, "regret": {"optimal": 0.125}}
    rows = [row(4, steps, 0.25), row(8, [0.5 * n for n in steps], 0.5)]
    group = only(compare([one, replay(tmp_path / "told", rows, oracle=oracle)]))
    alone = only(compare([one]))
    assert [entry.mark for entry in group.entries] == ["", "REPLAYED", "REPLAYED"]
    assert group.entries[0].tokens_per_second == alone.entries[0].tokens_per_second
    (four,) = (e for name, e in entries(group).items() if "budget=4" in name and e.mark)
    assert four.accepted_length.value == pytest.approx(12 * len(steps) / sum(steps))
    assert four.nodes_per_step == pytest.approx(4)
    assert four.expected_speed == pytest.approx(4 * 12 * len(steps) / (0.25 * sum(steps)))
    measured = (four.tokens_per_second, four.speedup, four.anatomy, four.per_request)
    assert measured == (None, None, None, None)
    assert {d.quantity for d in group.differences if "optimal" in d.first} == {"accepted_length"}
    assert any("9.5 tokens/s" in note and "optimal 12.5%" in note for note in group.notes)
    assert "2 replayed methods stand apart" in group.verdict[2]


def test_a_replay_alone_has_a_page_without_sections_of_runs(tmp_path: Path) -> None:
    steps = [float(i + 3) for i in range(len(LENGTHS))]
    told = replay(tmp_path / "told", [row(4, steps, None), row(8, [n - 1 for n in steps], None)])
    found = compare([told])
    page = Page(html(found))
    sections = {name for name in page.ids if name.startswith("g0-")}
    assert {"g0-methods", "g0-pareto", "g0-depth", "g0-differences"} <= sections
    assert not sections & {"g0-anatomy", "g0-lossless", "g0-trees"}
    assert found.commands == [
        "specdec record drafter=ngram out=records/a",
        "specdec replay records/a costs=cpu",
    ]
    assert only(found).entries[0].expected_speed is None
    assert only(found).verdict[2].startswith("Nothing was decoded")


def test_other_work_is_another_group_and_by_name_refused(tmp_path: Path) -> None:
    one = run(tmp_path / "run", (GENERATIONS, STEPS))
    steps = [3.0] * len(LENGTHS)
    other = {**SETTINGS, "sampling.temperature": 1.0}
    other |= {"kernels.graphs": False}  # which keeps no replay from a run
    told = replay(tmp_path / "told", [row(4, steps, None)], settings=other)
    with pytest.raises(ValueError, match=r"differ in sampling\.temperature \(\S+ and 1\.0\), so"):
        compare([one, told])


@pytest.mark.parametrize("changes", [{"schema": 1}, {"rows": [{"steps": []}]}, {"rows": 3}])
def test_a_file_of_another_make_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    told = replay(tmp_path / "told", [])
    path = told / "replay.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"replay\.json: cannot be used.*writes it anew"):
        compare([told])
