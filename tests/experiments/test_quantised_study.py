"""The study of quantisation: its figures by closed forms, and the program from one end to the
other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.experiments.figures.quantised import quantised
from specdec.experiments.studies import quantised as study
from specdec.lab.prompts import Asked


def logs(*rows: list[float]) -> Any:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_overlap_is_the_chance_to_be_accepted() -> None:
    target, draft = logs([0.5, 0.3, 0.2], [0.1, 0.8, 0.1]), logs([0.2, 0.7, 0.1], [0.2, 0.5, 0.3])
    assert study.overlap(target, draft, 1) == pytest.approx(0.6 + 0.7)
    assert study.overlap(target, draft, 0) == 1.0
    assert study.overlap(target, draft[:, :2], 1) == pytest.approx(0.5 + 0.6)


def test_divergence_and_agreement() -> None:
    mine, other = (
        logs([0.5, 0.5, 0.0], [0.9, 0.05, 0.05]),
        logs([0.25, 0.7, 0.05], [0.9, 0.05, 0.05]),
    )
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.7)
    assert study.divergence(mine, other) == pytest.approx(expected)
    assert study.divergence(mine, mine) == 0.0
    assert study.agreement(mine, other) == 1.0


def test_contexts_end_with_their_prompt_and_have_one_length() -> None:
    asked = [Asked(i, f"a/{i}", [10 * i + j for j in range(4)]) for i in range(4)]
    found = study.contexts(asked, 9, 2)
    assert [one.id for one in found] == [0, 2]
    assert found[0].tokens == [23, *range(30, 34), *range(4)][-9:]
    assert found[1].tokens == [3, *range(10, 14), *range(20, 24)]
    assert len(study.contexts(asked, 16, 9)) == 4
    with pytest.raises(ValueError, match="contexts=17: all prompts have 16 tokens"):
        study.contexts(asked, 17, 2)


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    out, prompts = tmp_path / "quantised.json", tmp_path / "prompts.jsonl"
    texts_of = ("def add(a, b):\n    return a + b\n\n" * 8, "import os\n\n\ndef name():\n    " * 9)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts_of))
    words = f"humaneval={prompts} device=cpu prompts=2 tokens=6"
    code = study.main([*words.split(), "contexts=[64]", "pages=2", f"out={out}"])
    assert not code
    result = json.loads(out.read_text())
    texts = result["weights"]["1"]["texts"]
    assert texts["none"]["tokens"] == [6.0, 6.0]
    assert 0 < sum(texts["none"]["fp8"]) < 12
    assert sum(texts["fp8"]["divergence"]) > 0
    assert result["pages"]["64"]["auto"]["divergence"] == [0.0, 0.0]
    assert sum(result["pages"]["64"]["fp8_e4m3"]["divergence"]) > 0
    assert result["weights"]["0"]["accepted"]["eagle3"]["fp8"]["tokens"] == [6, 6]
    assert "KL, fp8 from bf16" in quantised(result)
