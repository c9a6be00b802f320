"""Sizes of stand-ins: where the parts of the small model go, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.models.load import load_model, zoo_path
from specdec.models.standin import (
    named_shape,
    placed_heads,
    placed_layers,
    standin,
    standin_config,
)
from tests.models.standins import BASE, build


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        # Published with a tied head: 1,235,814,400.
        ("llama3_1b", 1_235_814_400 + 128_256 * 2048),
        # Published with 12 key-value heads and 32,000 tokens: 162,417,408.
        ("llama_160m", 162_417_408 + 2 * 96_256 * 768 - 12 * 2 * 9 * 64 * 768),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    shape, source = named_shape(name)
    config = standin_config(AutoConfig.from_pretrained(zoo_path(source)), shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("small", "large", "places"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 32, [4, 9, 15, 20, 25, 31]),
        (6, 80, [12, 25, 39, 52, 65, 79]),
        (2, 12, [5, 11]),
        (1, 3, [2]),
    ],
)
def test_placed_layers(small: int, large: int, places: list[int]) -> None:
    assert placed_layers(small, large) == places


@pytest.mark.parametrize(
    ("small", "large"),
    [((4, 1), (32, 8)), ((4, 1), (64, 8)), ((4, 1), (4, 4)), ((6, 2), (8, 4)), ((8, 8), (16, 8))],
)
def test_a_query_head_keeps_its_keys(small: tuple[int, int], large: tuple[int, int]) -> None:
    queries, kv_heads = placed_heads(small, large)
    assert len(set(queries)) == small[0]
    assert max(queries) < large[0]
    filled = dict(kv_heads)
    assert len(filled) == len(kv_heads)
    for head, place in enumerate(queries):
        assert filled[place // (large[0] // large[1])] == head // (small[0] // small[1])


MISFITS: dict[str, dict[str, int]] = {
    "hidden_size=384: must be more than the source's 384": {"hidden_size": 384},
    "intermediate_size=1151: must be at least the source's 1152": {"intermediate_size": 1151},
    "num_hidden_layers=5: must be at least the source's 6": {"num_hidden_layers": 5},
    "head_dim=64: must be the source's 128": {"head_dim": 64},
    "vocab_size=8000: must be at least the source's 8192": {"vocab_size": 8000},
    "num_key_value_heads=3: 4 query heads in groups of 4 need 4 groups of 1": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_shape_that_is_too_small_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(replace(BASE, **MISFITS[message]))


def test_an_impossible_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size=0: must be at least 1"):
        replace(BASE, hidden_size=0)
    with pytest.raises(ValueError, match="num_attention_heads=8: must be a multiple"):
        replace(BASE, num_key_value_heads=3)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape=standin:lion: no such stand-in"):
        build("lion")
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        standin(tmp_path / "nowhere", BASE, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen3", {}), ("llama", {"attention_bias": True})]
)
def test_another_architecture_is_refused(tmp_path: Path, kind: str, settings: Any) -> None:
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"source of type {kind}: must be a Llama without"):
        standin(tmp_path, BASE, device="cpu", dtype=torch.float32)


def test_what_has_no_room_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.models.standin.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="GiB does not fit the") as refusal:
        standin(zoo_path("draft"), "llama_160m", device="cpu", dtype=torch.float32)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"^draft=standin:llama_160m: a stand-in of .* choose a"):
        load_model("standin:llama_160m", setting="draft")
