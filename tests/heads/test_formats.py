"""Heads in the layouts that are published: what is loaded computes what the files say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.heads.formats import load_head
from specdec.heads.recurrent import joined
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from tests.heads import made, oracle
from tests.models.tiny import VOCABULARY, own_attention, tiny

TOLERANCE = 1e-5
TOKENS = torch.randint(3, VOCABULARY, (19,), generator=torch.Generator().manual_seed(1)).tolist()
PATH = [7, 41, 90, 12]


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8), name="target.path=tiny")


def states_of(target: PagedLM, tokens: list[int], taps: Sequence[Tap]) -> list[Tensor]:
    """[T, H] each, as transformers has them."""
    with torch.inference_mode():
        out = own_attention(target.model).base_model(
            input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False
        )
    normal = target.layers
    return [out.hidden_states[normal if tap == "normal" else tap][0].clone() for tap in taps]


@torch.no_grad()
def drafted(head: Any, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, by the head's own forward over all pairs, again for each
    token."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    features = head.fuse(joined([state[None, : len(tokens) - 1] for state in states]))
    for count in range(len(path) + 1):
        embedded = head.embed(torch.tensor([tokens[1:] + path[:count]]))
        places = torch.arange(embedded.shape[1])[None]
        fed, read = head(embedded, features, head.rotary(embedded, places), attend)
        features = torch.cat([features, fed[:, -1:]], dim=1)
    logits: Tensor = head.lm_head(read[0, -1])
    return logits


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double().softmax(-1) - expected.softmax(-1)).abs().max())


def check(head: Any, facts: oracle.Facts, target: PagedLM, restated: Any) -> None:
    assert head.config.taps == facts.taps
    states = states_of(target, TOKENS, facts.taps)
    ids = torch.arange(VOCABULARY) if head.names is None else head.names
    assert ids.equal(facts.ids)
    for length in range(len(PATH) + 1):
        ours = drafted(head, states, TOKENS, PATH[:length])
        assert distance(ours, restated(facts, states, TOKENS, PATH[:length])) < TOLERANCE


EAGLE3: dict[str, dict[str, Any]] = {
    "safeailab, bin": {"layout": "safeailab"},
    "safeailab, safetensors": {"layout": "safeailab", "file": "model.safetensors"},
    "speculators": {"layout": "speculators"},
    "all tokens": {"named": None},
    "another size of heads": {"head_dim": 16},
    **{
        f"speculators, {flag}": {"layout": "speculators", "flags": frozenset([flag])}
        for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    },
}


@pytest.mark.parametrize("case", EAGLE3.values(), ids=EAGLE3.keys())
def test_a_head_of_eagle_3_is_what_its_files_say(
    case: dict[str, Any], target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle3(tmp_path, target.model, **case)
    head: Any = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, facts, target, oracle.eagle3)
    assert not head.training
    assert not any(p.requires_grad for p in head.parameters())
    assert "EAGLE-3" in head.description
