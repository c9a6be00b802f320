"""Teacher: the target as drafters are trained on it, its states and logits computed anew for every
batch. Nothing is stored: states of a large target would take terabytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.taps import usual_taps
from specdec.models.hook import ATTENTION
from specdec.models.quantised import output_of
from specdec.observation import Tap


@contextmanager
def plain(model: Any) -> Iterator[Any]:
    """A model of a `PagedLM` with attention of transformers' own, while it lasts."""
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, ImportError):  # of a family without it
        model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(ATTENTION)


def default_taps(layers: int) -> tuple[Tap, ...]:
    """Three states, as in EAGLE-3; where these are not distinct, spread evenly, from after the
    first to before the last."""
    usual = usual_taps(layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    last = max(layers - 1, 0)
    spread = [round(1 + (last - 1) * part / 2) for part in range(3)] if last else [0]
    return tuple(dict.fromkeys(spread))


def check_taps(taps: Sequence[Tap], layers: int, setting: str = "method.taps") -> None:
    """Raise ValueError for states that a target of so many layers does not have."""
    for tap in taps:
        if tap != "normal" and (not isinstance(tap, int) or not 0 <= tap <= layers):
            raise ValueError(
                f"{setting}={list(taps)}: {tap} must be 0 to {layers}, the layers passed, or "
                f"normal"
            )
    if not taps or len({*taps}) < len(taps):
        raise ValueError(f"{setting}={list(taps)}: must be one or more, each once")


def chosen_taps(taps: Sequence[Tap] | None, layers: int) -> tuple[Tap, ...]:
    """Those of `method.taps`, as `check_taps`; the default ones if it is open."""
    chosen = default_taps(layers) if taps is None else tuple(taps)
    check_taps(chosen, layers)
    return chosen


class Teacher:
    """States and logits of a target.

    Args:
        model: a causal LM whose attention is transformers' own.
        taps: which states; there may be none.
    """

    def __init__(self, model: Any, taps: Sequence[Tap]) -> None:
        self.model, self.taps = model, tuple(taps)
        self.layers: int = model.config.get_text_config().num_hidden_layers
        self._before_norm: Tensor | None = None
        if self.layers in self.taps:  # transformers shows this state normed alone
            norm = final_norm(model)
            if norm is None:
                raise ValueError(
                    f"method.taps={list(self.taps)}: {type(model).__name__} does not show its "
                    f"state before the final norm; use normal instead of {self.layers}"
                )
            norm.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before_norm = inputs[0]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What it makes of [B, T] tokens: the tapped states side by side [B, T, taps * H], and
        logits [B, T, V]."""
        wanted = bool(self.taps)
        out = self.model(input_ids=tokens, output_hidden_states=wanted, use_cache=False)
        if not wanted:
            return out.logits.new_empty(*tokens.shape, 0), out.logits
        states = [self._state(out.hidden_states, tap) for tap in self.taps]
        return torch.cat(states, dim=-1), out.logits

    def _state(self, states: Sequence[Tensor], tap: Tap) -> Tensor:
        if tap == self.layers:
            assert self._before_norm is not None
            return self._before_norm
        return states[self.layers if tap == "normal" else tap]


def final_norm(model: Any) -> nn.Module | None:
    """The norm before the output head, where it has its usual name."""
    return getattr(model.base_model, "norm", None)


@torch.no_grad()
def norm_weight(model: Any) -> Tensor | None:
    """What the final norm multiplies by [H], None where it is no RMS norm: of a row of ones it
    makes its weight, however that is kept."""
    norm = final_norm(model)
    if norm is None or "RMS" not in type(norm).__name__:
        return None
    weight = output_of(model)
    scale: Tensor = norm(weight.new_ones(1, weight.shape[1]))[0].float()
    return scale
