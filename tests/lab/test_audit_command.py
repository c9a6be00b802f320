"""`specdec audit` on folders of runs: what it says, what it leaves, and how it ends."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from specdec.audit import FOUND, Recorded, main
from specdec.evidence import numbers_in
from specdec.lab import audit as audit_module
from specdec.lab.running import run
from specdec.lab.settings import settings_of
from specdec.lab.witness import drafts_of
from specdec.models.load import load_model
from specdec.record import command as record
from specdec.replay.record import Record
from tests.running import lines

WORDS = (
    "device=cpu dtype=float32 kernels=reference tracker=none prompts.limit=2 max_new_tokens=8 "
    "record.evidence=true tree=chain tree.budget=2 batch_size=2 target.path=zoo:draft"
)
SAMPLED = f"{WORDS} sampling=sample baseline=false drafter=small_llama"


def made(folder: Path, words: str) -> Path:
    run(settings_of(f"{words} out={folder}"), folder, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "greedy", f"{WORDS} drafter=ngram")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "sampled", SAMPLED)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def found_in(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / FOUND).read_text())
    return result


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_sound_run_ends_with_0(sampled, capsys):
    assert main([str(sampled)]) == 0
    assert ": passed; " in " ".join(capsys.readouterr().out.split())
    found = found_in(sampled)
    summary = json.loads((sampled / "summary.json").read_text())["lossless"]
    assert found.keys() == summary.keys()
    assert found["evidence"].keys() == summary["evidence"].keys()
    assert found["evidence"]["verdict"] == summary["evidence"]["verdict"] == "clean"
    tokens = sum(len(text["output_ids"]) for text in lines(sampled / "generations.jsonl"))
    assert found["evidence"]["tokens"] == found["tokens"] == tokens
    assert found["bets"] is not None


@pytest.mark.slow
def test_several_runs_are_audited_one_after_the_other(greedy, sampled):
    assert main([str(greedy), str(sampled)]) == 0
    assert (found_in(greedy)["identical"], found_in(greedy)["checked"]) == (2, 2)
    assert found_in(greedy)["bets"] is None
    assert found_in(sampled)["bets"] is not None


def test_an_altered_number_ends_with_3(sampled, tmp_path, capsys):
    folder = copied(sampled, tmp_path / "altered")
    records = lines(folder / "evidence.jsonl")
    numbers = numbers_in(records[1]["numbers"])
    numbers[5, 3] += 0.01  # a log-sum-exp
    letters = base64.b64encode(numbers.astype("<f4").tobytes()).decode()
    write(folder / "evidence.jsonl", [records[0], {**records[1], "numbers": letters}])
    assert main([str(folder)]) == 3
    assert ": failed; the verifying pass differs" in " ".join(capsys.readouterr().out.split())
    assert found_in(folder)["evidence"]["worst"] == [records[1]["request"], 5]


@pytest.mark.slow
def test_an_altered_text_ends_with_3(greedy, tmp_path):
    folder = copied(greedy, tmp_path / "altered")
    records = lines(folder / "generations.jsonl")
    records[0]["output_ids"][3] = (records[0]["output_ids"][3] + 1) % 1000
    write(folder / "generations.jsonl", records)
    assert main([str(folder)]) == 3
    (divergence,) = found_in(folder)["divergences"]
    assert not divergence["explained"]
    assert divergence["measured"] > 10


def test_a_suspect_ends_with_0_and_a_warning(sampled, tmp_path, monkeypatch, capsys):
    folder = copied(sampled, tmp_path / "suspect")
    monkeypatch.setattr(audit_module, "SUSPECT", 1e-9)
    assert main([str(folder)]) == 0
    assert ": suspect; " in " ".join(capsys.readouterr().out.split())


def test_without_evidence_the_texts_are_judged(sampled, tmp_path, capsys):
    folder = copied(sampled, tmp_path / "bare")
    (folder / "evidence.jsonl").unlink()
    assert main([str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has no evidence; record.evidence=true keeps it" in said
    assert found_in(folder)["evidence"]["verdict"] == "not checked"


def test_bad_input_ends_with_2_in_one_line(sampled, tmp_path, capsys):
    damaged = copied(sampled, tmp_path / "damaged")
    (damaged / "evidence.jsonl").write_text('{"request": 0, "row": 0, "numbers": "?"}\n')
    other = copied(sampled, tmp_path / "other")
    records = lines(other / "evidence.jsonl")
    write(other / "evidence.jsonl", [{**records[0], "numbers": records[0]["numbers"][:64]}])
    for words, said in (
        ([], "runs: must be given"),
        ([str(tmp_path)], f"{tmp_path}: must be the folder of a run, with a config.yaml"),
        ([str(sampled), "tokens=0"], "tokens=0: must be greater than or equal to 1"),
        ([str(sampled), f"record={tmp_path}"], "holds no finished record"),
        ([str(damaged)], "line 1 is no record"),
        ([str(other)], "3 tokens of request"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_a_record_says_what_the_drafter_says(sampled, tmp_path, capsys):
    """The same as the model's own passes; and of a drafter that has no model of its own."""
    assert record([f"run={sampled}", f"out={tmp_path / 'record'}"]) == 0
    target = draft = load_model("zoo:draft")
    told = Recorded(Record.open(tmp_path / "record"), target)
    passes = drafts_of(draft, target)
    assert passes is not None
    for text in lines(sampled / "generations.jsonl"):
        (mine,), (own,) = told(text), passes(text)
        kept = mine > -torch.inf
        assert kept.sum(1).tolist() == [64] * len(mine)
        torch.testing.assert_close(mine[kept], own.log_softmax(-1)[kept], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="holds another text of request"):
        next(told({**text, "output_ids": [*text["output_ids"], 1]}))
    assert list(told({"request": 10**6, "output_ids": [1]})) == []
    assert main([str(sampled), str(sampled), f"record={tmp_path / 'record'}"]) == 2
    assert "is of one run" in capsys.readouterr().err
    assert main([str(sampled), f"record={tmp_path / 'record'}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["early_exit", "translated drafter.path=zoo:draft"])
def test_bets_know_what_drafters_without_a_model_say(drafter, tmp_path, capsys):
    folder = made(tmp_path / "run", SAMPLED.replace("drafter=small_llama", f"drafter={drafter}"))
    assert main([str(folder)]) == 0
    said = "bets do not know what" in " ".join(capsys.readouterr().out.split())
    assert said == (drafter == "early_exit")  # a draft of the target's vocabulary is asked itself
    assert record([f"run={folder}", f"out={tmp_path / 'record'}"]) == 0
    assert main([str(folder), f"record={tmp_path / 'record'}"]) == 0
    assert "bets do not know" not in " ".join(capsys.readouterr().out.split())
    told = Recorded(Record.open(tmp_path / "record"), load_model("zoo:draft"))
    for text in lines(folder / "generations.jsonl"):
        assert sum(len(part) for part in told(text)) == len(text["output_ids"])
