"""What is written can be read by who reads published heads, and computes the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.heads.export import save_head
from specdec.heads.formats import load_head
from specdec.training.blocks import rolled
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.methods.mtp import MTP
from specdec.training.methods.peagle import PEagle
from specdec.training.test_time import unroll
from tests.training.small import VOCAB, WIDTH, filled, surroundings, target

CASES: dict[str, dict[str, Any]] = {
    "mtp": {},
    "mtp of a layer": {"tap": 1, "rope_theta": 500.0},
    "usual": {},
    "no norms": {"fc_norm": False},
    "other flags": {
        "norm_before_fc": True,
        "norm_before_residual": True,
        "norm_output": True,
        "fc_norm": False,
        "layers": 2,
        "rope_theta": 500.0,
    },
    "final state": {"taps": ["normal"]},
    "trimmed": {"draft_vocab": 10},
    "tied": {"tied": True},
    "tied and trimmed": {"tied": True, "draft_vocab": 10},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_head_that_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    lm, defaults = target(), dict(save_head.__kwdefaults__)
    of_mtp = case.startswith("mtp")
    trainee = (MTP if of_mtp else Eagle3)(**CASES[case]).make(surroundings(lm))
    head, output = trainee.head, trainee.head.lm_head.weight.clone()
    filled(head).embed_tokens.weight = lm.model.get_input_embeddings().weight
    if of_mtp or "tied" in CASES[case]:
        head.lm_head.weight = torch.nn.Parameter(output, requires_grad=False)
    monkeypatch.setattr(save_head, "__kwdefaults__", {**defaults, "dtype": torch.float32})
    trainee.save(tmp_path, "tiny")
    read: Any = load_head(str(tmp_path), lm, kinds=("eagle3", "mtp"))
    assert read.config.taps == head.config.taps
    if head.names is None:
        assert read.names is None
    else:
        assert torch.equal(read.names, head.names)
    states = torch.randn(2, 5, len(head.config.taps) * WIDTH)
    tokens = torch.randint(VOCAB, (2, 5))
    for one, other in zip(
        unroll(head, states, tokens, 2), unroll(read, states, tokens, 2), strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(head.lm_head(one), read.lm_head(other))


@torch.no_grad()
def test_p_eagle_is_written_as_speculators_has_it(tmp_path: Path) -> None:
    lm = target()
    trainee = PEagle(draft_vocab=10).make(surroundings(lm))
    head: Any = filled(trainee.head)
    head.embed_tokens.weight = lm.model.get_input_embeddings().weight
    for name, parameter in head.named_parameters():
        if not name.startswith("embed_tokens"):
            parameter.copy_(parameter.bfloat16().float())
    trainee.save(tmp_path, "tiny")
    read: Any = load_head(str(tmp_path), lm, kinds=("peagle",))
    assert read.description.startswith("P-EAGLE of speculators: 2 layers of 16")
    assert read.config == replace(head.config, layer=read.config.layer, output_bias=False)
    assert read.names.equal(head.names)
    states = torch.randn(2, 5, len(head.config.taps) * WIDTH)
    tokens = torch.randint(VOCAB, (2, 5))
    anchors = torch.tensor([[0, 3], [4, 2]])
    ours, theirs = (rolled(one, states, tokens, anchors, 3) for one in (head, read))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
