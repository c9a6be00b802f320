"""prompts.samples: the same prompt several times, with other random numbers."""

from pathlib import Path
from typing import Any

import pytest

from specdec.lab.tracking import NoTracker
from specdec.models.paged import PagedLM
from tests.running import lines, summary_of

pytestmark = pytest.mark.usefixtures("load_once")

ARGUMENTS = (
    "sampling=sample",
    "sampling.temperature=2",
    "drafter=ngram",
    "batch_size=3",
    "max_new_tokens=12",
)
ARGUMENTS += ("tracker=none", "dtype=float32", "prompts.limit=2", "target.path=zoo:draft")


def texts(folder: Path) -> dict[tuple[int, int], list[int]]:
    return {(g["prompt"], g["sample"]): g["output_ids"] for g in lines(folder)}


def generations(folder: Path) -> dict[tuple[int, int], list[int]]:
    return texts(folder / "generations.jsonl")


def test_samples_differ_and_the_first_is_that_of_a_run_with_one(specdec, tmp_path):
    code, printed, _ = specdec(*ARGUMENTS, "prompts.samples=3", f"out={tmp_path}/three")
    assert code == 0
    summary = summary_of(tmp_path / "three")
    assert (summary["samples"], summary["prompts"]) == (3, 2)
    (row,) = (line for line in printed.splitlines() if "samples of a prompt" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["3", "3"]
    for folder in (tmp_path / "three", tmp_path / "three/baseline"):
        found = generations(folder)
        assert sorted(found) == [(prompt, sample) for prompt in range(2) for sample in range(3)]
        assert len({tuple(found[0, sample]) for sample in range(3)}) == 3

    code, printed, _ = specdec(*ARGUMENTS, f"out={tmp_path}/one")
    assert code == 0
    assert "samples of a prompt" not in printed
    assert summary_of(tmp_path / "one")["samples"] == 1
    first = {key: ids for key, ids in generations(tmp_path / "three").items() if key[1] == 0}
    assert generations(tmp_path / "one") == first


def test_an_interrupted_run_goes_on_with_the_samples_that_are_missing(
    specdec, tmp_path, monkeypatch
):
    arguments = (*ARGUMENTS, "prompts.samples=3", "baseline=false")
    assert specdec(*arguments, f"out={tmp_path}/whole")[0] == 0
    running: list[int] = []

    def interrupt(self: NoTracker, step: Any) -> None:
        running.extend(step.requests)
        if len(set(running)) > 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "step", interrupt)
        assert specdec(*arguments, f"out={tmp_path}/cut")[0] == 130
    before = generations(tmp_path / "cut")
    assert 0 < len(before) < 6
    assert specdec(*arguments, "resume=true", f"out={tmp_path}/cut")[0] == 0
    assert generations(tmp_path / "cut") == generations(tmp_path / "whole")
    assert len(lines(tmp_path / "cut/generations.jsonl")) == 6


def test_samples_of_a_batch_share_the_pages_of_their_prompt(specdec, tmp_path, monkeypatch):
    read: list[int] = []
    prefill = PagedLM.prefill

    def counting(lm: PagedLM, cache: Any, rows: Any, tokens: Any, **options: Any) -> None:
        if cache.idle_row == 3:  # that of the decoder
            read.extend(map(len, tokens))
        prefill(lm, cache, rows, tokens, **options)

    monkeypatch.setattr(PagedLM, "prefill", counting)
    code, _, _ = specdec(
        *(*ARGUMENTS, "prompts.limit=1", "prompts.samples=3", "baseline=false"),
        *("cache.page_size=4", f"out={tmp_path}/o"),
    )
    assert code == 0
    (prompt,) = {tuple(g["prompt_ids"]) for g in lines(tmp_path / "o/generations.jsonl")}
    before = len(prompt) - 1  # the last token is the root of the first tree
    assert before > 8
    assert read[-3:] == [before, before % 4, before % 4]
