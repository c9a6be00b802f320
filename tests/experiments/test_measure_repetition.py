"""experiments/tools/measure_repetition.py on texts of which one knows."""

import json
from pathlib import Path

import pytest

from specdec.experiments.tools.measure_repetition import main


def test_loops_are_found_in_files_and_runs(tmp_path: Path) -> None:
    line = "\u2028".join("ab")  # a separator of lines to some, not to JSON
    records = [{"turns": ["x y " * 40, line * 40]}, {"turns": None}, {"turns": []}]
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "asked.jsonl").write_text(text)
    outputs = [[7] * 30, [*range(30)], [7] * 20]  # the last one is too short
    (tmp_path / "run").mkdir()
    lines = "".join(json.dumps({"output_ids": one}) + "\n" for one in outputs)
    (tmp_path / "run/generations.jsonl").write_text(lines)
    words = [f"texts=[{tmp_path}/asked.jsonl:turns]", f"runs=[{tmp_path}/run]", "lengths=[24]"]
    assert main([*words, "most=2", f"out={tmp_path}/found.json"]) == 0
    asked, run = json.loads((tmp_path / "found.json").read_text())["sources"]
    names = "source", "stretches", "degenerate"
    assert [asked[name] for name in names] == ["asked.jsonl:turns", 4, 4]
    assert [run[name] for name in names] == ["run", 2, 1]
    assert run["longest_loop"] == pytest.approx([12.0, 22.8, 23.76, 24.0])
    assert main(["texts=[x.jsonl]", f"out={tmp_path}/o.json"]) == 2
