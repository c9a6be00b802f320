"""A head that is written is the head that is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.heads.export import save_head
from specdec.heads.formats import load_head
from specdec.heads.layered import LayeredHead
from specdec.models.paged import PagedLM
from tests.heads import made
from tests.heads.test_formats import PATH, TOKENS, drafted, states_of
from tests.models.tiny import own_attention, tiny

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
CASES: dict[str, tuple[Any, dict[str, Any], list[Any] | None]] = {
    "eagle3": (made.eagle3, {}, None),
    "flags": (made.eagle3, {"layout": "speculators", "flags": FLAGS, "named": None}, None),
    "biases": (made.eagle3, {"layout": "speculators", "layers": 2, "bias": "qkv"}, None),
    "pairs": (made.eagle3, {"layout": "deepspec", "layers": 2}, None),
    "window": (made.eagle3, {"layout": "speculators", "window": 4}, None),
    "normal": (made.eagle3, {}, [1, 4, "normal"]),
    "eagle": (made.eagle, {}, None),
    "no bias": (made.eagle, {"fc_bias": False, "layers": 2}, None),
    "another state": (made.eagle, {}, [5]),
    "norms": (made.eagle, {"norms": ("embedding_layernorm", "hidden_states_layernorm")}, None),
}


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8), name="target.path=tiny")


@pytest.mark.parametrize(("make", "options", "taps"), CASES.values(), ids=CASES.keys())
def test_a_head_that_is_written_is_read_again(
    make: Any, options: dict[str, Any], taps: Any, target: PagedLM, tmp_path: Path
) -> None:
    make(tmp_path / "published", target.model, **options)
    kinds = ("eagle3", "eagle")
    head: Any = load_head(str(tmp_path / "published"), target, kinds=kinds, taps=taps)
    assert isinstance(head, LayeredHead)
    save_head(head, tmp_path / "own", target_name="tiny", dtype=torch.float32)
    again: Any = load_head(str(tmp_path / "own"), target, kinds=kinds)
    assert again.config.taps == head.config.taps
    assert again.config.windows == head.config.windows
    assert bool(head.config.windows) == ("window" in options)
    states = states_of(own_attention(target.model), TOKENS, head.config.taps)
    ours, theirs = (drafted(one, states, TOKENS, PATH) for one in (again, head))
    assert torch.allclose(ours, theirs, atol=1e-5)
    if head.names is not None:
        assert again.names.equal(head.names)


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, (8,)),
        ({"use_sliding_window": True, "max_window_layers": 28}, ()),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, ()),
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"]}, ()),
        ({"layer_types": ["full_attention"] * 8}, ()),  # of its target
    ],
)
def test_no_window_is_written_in_many_ways_and_read_as_one(
    said: dict[str, Any], windows: tuple[int, ...], target: PagedLM, tmp_path: Path
) -> None:
    made.eagle3(tmp_path, target.model, config={"sliding_window": 8, **said})
    head: Any = load_head(str(tmp_path), target, kinds=["eagle3"])
    assert head.config.windows == windows
