"""Medusa heads against the formula of the paper in float64, read off the parameters by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from specdec.heads.medusa import MedusaConfig, MedusaHeads

BASE = MedusaConfig(heads=3, blocks=2, state_size=10, vocab_size=17)
FORMS = {
    "own matrices": BASE,
    "tied": replace(BASE, tied=True),
    "one block": replace(BASE, blocks=1, bias=False),
    "no block": replace(BASE, blocks=0),
    "one block, thrice": replace(BASE, blocks=3, shared=True),
    "none, shared": replace(BASE, blocks=0, shared=True, tied=True),
}


def formula(heads: MedusaHeads, state: np.ndarray) -> np.ndarray:
    """[M, heads, V] for states [M, H]."""
    weights = {name: x.detach().double().numpy() for name, x in heads.named_parameters()}
    config = heads.config
    out = []
    for head in range(config.heads):
        x = state
        for block in range(config.blocks):
            name = f"blocks.{head}.{0 if config.shared else block}"
            y = x @ weights[f"{name}.weight"].T
            y = y + (weights[f"{name}.bias"] if config.bias else 0)
            x = x + y / (1 + np.exp(-y))
        last = "lm_head" if config.tied else f"lm_heads.{head}"
        out.append(x @ weights[f"{last}.weight"].T)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_logits_are_the_formulas(config: MedusaConfig) -> None:
    torch.manual_seed(1)
    heads = MedusaHeads(config).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    state = torch.randn(5, 10, dtype=torch.float64)
    logits = heads(state)
    assert logits.shape == (5, 3, 17)
    expected = formula(heads, state.numpy())
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_every_parameter_is_learnt() -> None:
    for config in FORMS.values():
        heads = MedusaHeads(config)
        heads.logits(torch.randn(4, 10)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())


@pytest.mark.parametrize(
    ("setting", "value", "mend"),
    [("heads", 0, "at least 1"), ("blocks", -1, "at least 0"), ("taps", (1, 2), "name one")],
)
def test_sizes_out_of_range_are_refused(setting: str, value: object, mend: str) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}=.*{mend}"):
        replace(BASE, **{setting: value})  # type: ignore[arg-type]
