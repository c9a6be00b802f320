"""Tokens of a tokenizer that a model has no row for: one was added, the weights were not
resized."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from specdec.lab.conversations import Conversations
from specdec.lab.prompts import load_prompts
from specdec.models.load import zoo_path
from specdec.request import Request


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in target with a token more."""
    folder = tmp_path_factory.mktemp("models") / "grown"
    folder.mkdir()
    for file in zoo_path("target").iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "record", [{"text": "Once upon <tool> a time"}, {"turns": ["Once upon", "a <tool> time"]}]
)
def test_prompts_with_one_are_refused_before_decoding(
    specdec: Any, grown: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, {"id": "a/1", "text": "fine"}, {"id": "a/2", **record})
    words = ("target=hf", f"target.path={grown}", f"prompts.path={path}", "tracker=none")
    code, printed, error = specdec(*words, "drafter=ngram", f"out={tmp_path}/o")
    assert code == 2
    assert error.startswith("error: prompt 'a/2': token 8192 '<tool>' is none of the 8192 that ")
    assert error.count("\n") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "o").exists()


def test_an_answer_that_gives_a_later_turn_one_skips_it(grown: Path, tmp_path: Path) -> None:
    path = written(tmp_path, {"turns": ["Say it.", "And again.", "And again."]})
    asked: list[Request] = []
    decoder: Any = SimpleNamespace(
        capacity=SimpleNamespace(max_tokens=200),
        verifier=SimpleNamespace(max_context=400),
        submit=lambda request, first: asked.append(request),
    )
    queue = Conversations(
        AutoTokenizer.from_pretrained(grown),
        load_prompts(path=str(path), field=None, limit=None),
        vocab_size=8192,
        samples=1,
        chat="auto",
        max_new_tokens=8,
        marks={},
        finished=[{"prompt": 0, "sample": 0, "turn": 0, "text": "<tool>"}],
    )
    skipped = list(queue.begin(decoder))
    assert [(one["turn"], one["finish_reason"]) for one in skipped] == [
        (1, "unknown_token"),
        (2, "unknown_token"),
    ]
    assert not asked
