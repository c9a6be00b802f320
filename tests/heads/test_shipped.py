"""Every head that comes with the package is what its drafter takes without a path."""

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.dynamic import Dynamic
from specdec.lab.build import method_of
from specdec.lab.settings import settings_of
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from tests.decoding import decoder_of, outputs_of

ZOO = zoo_path("target").parent
HEADS = sorted(p.name for p in ZOO.iterdir() if p.is_dir() and p.name not in ("target", "draft"))
MOST = 12e6  # bytes


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_the_package_is_small_and_drafts_without_a_path(
    name: str, target: PagedLM
) -> None:
    folder: Path = ZOO / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST
    assert "zoo:target" in json.dumps(json.loads((folder / "config.json").read_text()))
    drafter: Any = method_of(settings_of(f"drafter={name} tree=dynamic")).drafter
    assert drafter.path == f"zoo:{name}"
    prompts = [list(range(300, 324))]
    plain = outputs_of(decoder_of(target, NoDrafter()), prompts, 8)
    decoder = decoder_of(target, drafter, Dynamic(budget=12, depth=4), share=False)
    assert outputs_of(decoder, prompts, 8) == plain
    assert drafter.notes["drafter.path"]
