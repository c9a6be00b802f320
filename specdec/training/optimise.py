"""Optimisers of a training, and how their rates rise and fall."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specdec.training.muon import Muon
from specdec.training.trainee import Rates, Trainee

BETAS = (0.9, 0.95)
LEAST = 0.02  # part of a rate that is left at the end


class Optimisers:
    """Muon for matrices inside, and AdamW for the rest, without decay."""

    def __init__(self, trainee: Trainee, rates: Rates) -> None:
        self.rates = rates
        matrices = list(trainee.matrices())
        inside = {id(parameter) for parameter in matrices}
        self.parameters: list[nn.Parameter] = [
            parameter for parameter in trainee.module.parameters() if parameter.requires_grad
        ]
        rest = [parameter for parameter in self.parameters if id(parameter) not in inside]
        self.each: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = Muon(matrices, rate=rates.matrix_rate, weight_decay=rates.weight_decay)
            self.each.append((muon, rates.matrix_rate))
        if rest:
            adam = torch.optim.AdamW(rest, lr=rates.rate, betas=BETAS, weight_decay=0.0)
            self.each.append((adam, rates.rate))

    def step(self, share: float, number: int) -> None:
        """Change the parameters by their gradients, and clear these.

        Args:
            share: of the budget that is used up.
            number: of the step, from 0.
        """
        nn.utils.clip_grad_norm_(self.parameters, self.rates.clip)
        scale = scale_of(share, number, self.rates)
        for optimiser, rate in self.each:
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser, _ in self.each]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        for (optimiser, _), state in zip(self.each, states, strict=True):
            optimiser.load_state_dict(state)


def scale_of(share: float, number: int, rates: Rates) -> float:
    """Part of the full rate: it rises over the warm-up, stays, and falls to `LEAST` at the end."""
    rise = min(1.0, (number + 1) / rates.warm_up) if rates.warm_up else 1.0
    if share < rates.steady:
        return rise
    return rise * max(LEAST, (1 - share) / (1 - rates.steady))
