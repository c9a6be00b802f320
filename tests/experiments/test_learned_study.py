"""experiments/studies/learned.py with the zoo pair on a CPU: the same trees for all, and ratios
that are paired over prompts."""

import json
from pathlib import Path

import pytest

from specdec.experiments.figures.learned import learned, ratio_to
from specdec.experiments.studies import learned as study

pytestmark = pytest.mark.usefixtures("load_once")


def test_methods_are_measured_beside_the_draft_and_files_are_joined(tmp_path: Path) -> None:
    texts = ("Tell me of the sea.", "And of the sky.", "Who are you?")
    tasks = [{"question_id": i, "category": "qa", "turns": [text]} for i, text in enumerate(texts)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    words = [f"spec_bench={file}", "device=cpu", "tokens=8", "prompts=3", "batch=3"]
    words += ["temperatures=[0]", "budgets=[7]"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert study.main([*words, "beside=[small_llama]", f"out={one}"]) == 0
    head = "methods=[head=drafter=eagle3]"
    assert study.main([*words, "beside=[]", head, f"join=[{one}]", f"out={two}"]) == 0
    result = json.loads(two.read_text())
    part = result["parts"]["T=0"]
    assert {entry["drafter"] for entry in part.values()} == {"none", "small_llama", "head"}
    assert all(entry["agreement"]["divergences"] == [] for entry in part.values())
    steps = {
        entry["drafter"]: sum(one["steps"] for one in entry["prompts"].values())
        for entry in part.values()
    }
    found = ratio_to(part, "head", 7)
    assert found is not None
    assert found[0] == pytest.approx(steps["small_llama"] / steps["head"])
    assert ratio_to(part, "small_llama", 7) is None
    assert "| head |" in learned(result)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("methods=[eagle3]", "must be NAME=drafter="),
        ("budgets=[5]", "there are 7, 8, 16, 32, 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"spec_bench={tmp_path}/none.jsonl", "device=cpu", f"out={tmp_path}/out.json", word]
    assert study.main(words) == 2
    assert message in capsys.readouterr().err
