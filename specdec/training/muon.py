"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are applied,
scaled so that rates are of AdamW's size (Liu et al. 2025, section 2.2).

It computes what `torch.optim.Muon` does with `match_rms_adamw`, but that iterates in bfloat16 even
on a CPU without such arithmetic, where a step of it took 20 times as long as all the rest.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM, ITERATIONS = 0.95, 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the polynomial that is iterated
EPS = 1e-7
RMS = 0.2  # of an update of AdamW


class Muon(torch.optim.Optimizer):
    """For parameters [N, K].

    Args:
        rate: of learning.
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, rate: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM))
                scale = RMS * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)
        return None


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows or columns, roughly: singular values come to lie
    around 1. By five Newton-Schulz iterations, in bfloat16 on a GPU."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.norm().clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
