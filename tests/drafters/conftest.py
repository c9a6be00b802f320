"""Fixtures of several files."""

import json
from pathlib import Path

import pytest

from specdec.drafters.none import NoDrafter
from specdec.experiments.tools.retokenize import retokenize
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from tests.drafters.learning import run
from tests.drafters.retokenized import KEPT


@pytest.fixture(scope="module")
def zoo() -> tuple[PagedLM, list[list[int]], list[list[int]]]:
    target = load_model("zoo:target")
    texts = [
        'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
        "It was a dark night",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
        "<|user|>\nName three colours.\n<|assistant|>\n",
    ]
    prompts = [target.tokenizer(text).input_ids for text in texts]
    return target, prompts, run(NoDrafter(), prompts, target=target, new=16)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Folders of the built-in draft with so many of its tokens."""
    folder = tmp_path_factory.mktemp("drafts")
    for keep in (KEPT, 3000):
        retokenize("zoo:draft", folder / str(keep), keep=keep, seed=0)
    return {keep: str(folder / str(keep)) for keep in (KEPT, 3000)}


@pytest.fixture(scope="module")
def renamed(drafts: dict[int, str]) -> dict[int, int]:
    """The new id of each kept token, by its old one; ordinary and special."""
    old = json.loads((zoo_path("draft") / "tokenizer.json").read_text())["model"]["vocab"]
    new = json.loads((Path(drafts[KEPT]) / "tokenizer.json").read_text())["model"]["vocab"]
    return {old[token]: i for token, i in new.items()}
