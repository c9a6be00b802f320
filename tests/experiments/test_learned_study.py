"""experiments/studies/learned.py with the zoo pair on a CPU: the same trees for all, and ratios
that are paired over prompts."""

import json
from pathlib import Path

import pytest

from specdec.experiments.figures.learned import learned, learned_summary, ratio_to
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
        ("methods=[a=drafter=eagle3,a=drafter=dspark]", "a is measured already; give it another"),
        ("methods=[small_llama=drafter=eagle3]", "small_llama is measured already"),
        ("budgets=[5]", "there are 7, 8, 16, 32, 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"spec_bench={tmp_path}/none.jsonl", "device=cpu", f"out={tmp_path}/out.json", word]
    assert study.main(words) == 2
    assert message in capsys.readouterr().err


def taken(drafter: str, budget: int, steps: dict[str, int]) -> dict[str, object]:
    prompts = {one: {"tokens": 12, "steps": n, "seconds": 1.0} for one, n in steps.items()}
    return {"drafter": drafter, "budget": budget, "prompts": prompts, "verbs": {}}


def test_a_target_that_was_trained_stands_beside_the_others_with_its_quality() -> None:
    plain = taken("none", 0, {"a": 12, "b": 12})
    here = {
        "none": plain,
        "small_llama: x": taken("small_llama", 32, {"a": 6, "b": 6}),
        "head: x": taken("head", 32, {"a": 3, "b": 3}),
        "head: worse": taken("head", 32, {"a": 12, "b": 12}),
    }
    apart = {"none": plain, "exit: x": taken("exit", 32, {"a": 4, "b": 4})}
    training = {
        "settings": {"choices": {"method": "early_exit"}, "method": {"loss": "kl"}},
        "corpus": {"trained": 26_855_050},
        "own_texts": 20_280,
        "tokens": 40_000_000,
        "seconds": 110.0,
        "best": {"tokens": 14_000_000, "corpus/nats": 1.778, "own/nats": 1.059},
        "before": {"corpus/nats": 1.758, "own/nats": 1.047},
    }
    result = {
        "settings": {"target": "t", "draft": "d", "dtype": "float32", "tokens": 12},
        "hardware": {"cpu": "c"},
        "command": "python",
        "sets": {"qa": ["a", "b"]},
        "joined": [
            {"name": "exit", "training": training},
            {"name": "head", "hardware": {"cpu": "d"}},
        ],
        "parts": {"T=0": here, "T=0, exit": apart, "T=1": here, "T=1, exit": apart},
    }
    page = learned(result)
    assert page.count("| exit | 3.00 |") == 2, "no ratio to drafters of another target"
    assert page.count("| head | 4.00; 2.00 (2.00 to 2.00) |") == 2
    assert "on one c: 2 prompts" in page
    assert "; head on one d. Accepted" in page
    assert "- exit: `method=early_exit method.loss=kl`, 40 M tokens in 110 s, the best" in page
    assert "of it after 14 M; another target now" in page
    assert "1.758 nats a token of held-out text before and 1.778 after" in page
    rows = learned_summary(result).splitlines()
    assert rows[2:] == [
        "| `small_llama` | 2.00 |  | 2.00 |  |",
        "| head | 4.00 | 2.00 (2.00 to 2.00) | 4.00 | 2.00 (2.00 to 2.00) |",
        "| exit | 3.00 |  | 3.00 |  |",
    ]
