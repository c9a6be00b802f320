"""The training-time test: all chains at once are what each is token by token, and so are its
gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specdec.heads.layered import LayeredHead
from specdec.training import test_time
from specdec.training.test_time import unroll
from tests.training.small import VOCAB, WIDTH, decoded, eagle, eagle3, mtp

SLOTS, STEPS = 7, 4
HEADS: dict[str, Callable[[], LayeredHead]] = {
    "eagle3": eagle3,
    "fc_norm": lambda: eagle3(fc_norm=True),
    "norm_before_fc": lambda: eagle3(norm_before_fc=True),
    "norm_before_residual": lambda: eagle3(norm_before_residual=True),
    "norm_output": lambda: eagle3(norm_output=True, fc_norm=True),
    "two layers": lambda: eagle3(layers=2),
    "two layers of pairs": lambda: eagle3(layers=2, pairs=2),
    "windows": lambda: eagle3(layers=2, windows=(5, None)),
    "eagle": eagle,
    "eagle, window of fewer than steps": lambda: eagle(windows=(2,)),
    "mtp": mtp,
    "mtp, gated, unnormed": lambda: mtp(gated=True, turned=2, norm_output=False),
    "eagle with norms": lambda: eagle(norms=True, input_norm=True, output_norm=True),
}


def inputs(head: LayeredHead) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = len(head.config.taps) * WIDTH
    states = torch.randn(2, SLOTS, size, generator=generator)
    return states, torch.randint(VOCAB, (2, SLOTS), generator=generator)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_chain_is_that_of_decoding_with_a_cache(name: str) -> None:
    head = HEADS[name]()
    states, tokens = inputs(head)
    for step, outputs in enumerate(unroll(head, states, tokens, STEPS)):
        for row in range(2):
            wanted = decoded(head, states[row], tokens[row], step)
            found = outputs[row, step:]
            assert (found - wanted[step:]).abs().max() < 1e-5 * wanted.abs().max(), (step, row)


@pytest.mark.parametrize("name", ["fc_norm", "windows", "eagle", "mtp"])
def test_gradients_are_those_of_two_steps_of_decoding(name: str) -> None:
    head = HEADS[name]()
    states, tokens = inputs(head)
    weights = torch.randn(SLOTS - 1, head.width, generator=torch.Generator().manual_seed(3))

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        trained = [p for n, p in head.named_parameters() if not n.startswith(("lm_", "embed"))]
        return list(torch.autograd.grad((output * weights).sum(), trained))

    parallel = gradients(unroll(head, states[:1], tokens[:1], 2)[1][0, 1:])
    sequential = gradients(decoded(head, states[0], tokens[0], 1)[1:])
    for one, other in zip(parallel, sequential, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def wrong_history(query: Any, entries: Any, window: Any) -> Any:
    """Without the shift of the true history."""
    (key, value), *chain = entries
    if not chain:
        return original(query, entries)
    return original(query, [(test_time.later(key, 1, 2), test_time.later(value, 1, 2)), *chain])


original = test_time.chain_attention


@torch.no_grad()
def test_a_wrong_mask_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    head = eagle3()
    states, tokens = inputs(head)
    monkeypatch.setattr(test_time, "chain_attention", wrong_history)
    wanted = decoded(head, states[0], tokens[0], 1)
    found = unroll(head, states, tokens, 2)[1][0]
    assert (found - wanted)[1:].abs().max() > 1e-2 * wanted.abs().max()
