"""What tree policies share: a checked budget, and the answers of a policy that takes every
candidate."""

from functools import cache
from types import ModuleType
from typing import cast, get_args

import torch
from torch import Tensor

from specdec.kernels.choose import AUTO
from specdec.protocols import TreePolicy
from specdec.tree import Children


class BasePolicy:
    """A `TreePolicy` that turns every candidate into a node, expands every node and keeps all.

    Args:
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        children: "top_k" (a node's most probable tokens), "sample" (drawn without replacement) or
            "sample_with_replacement".

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, *, budget: int, children: str = "top_k") -> None:
        check_basics(budget, children)
        self.budget = budget
        self.children = cast(Children, children)

    def levels(self, depth: int | None) -> int:
        raise NotImplementedError

    def width(self, level: int) -> int:
        raise NotImplementedError

    def select(self, level: int, levels: int, scores: Tensor, *, sampled: bool) -> Tensor:
        return scores > float("-inf")

    def expand(self, level: int, scores: Tensor) -> Tensor | None:
        return None

    def keep(self, scores: Tensor) -> Tensor | None:
        return None


def check_basics(budget: int, children: str) -> None:
    """Raise ValueError, naming the setting, unless any policy could have these."""
    if budget < 0:
        raise ValueError(f"tree.budget={budget}: must be 0 (no drafting) or positive")
    if children not in get_args(Children):
        known = ", ".join(get_args(Children))
        raise ValueError(f"tree.children={children}: must be one of {known}")


def check_positive(**settings: int | None) -> None:
    """Raise ValueError, naming the setting, if one of these is below 1; None is none."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"tree.{name}={value}: must be at least 1")


def overrides(policy: TreePolicy, method: str) -> bool:
    """Whether a policy may answer otherwise than `BasePolicy` does."""
    return getattr(type(policy), method) is not getattr(BasePolicy, method)


def takes_all(policy: TreePolicy) -> bool:
    """Whether a policy takes every candidate of its widths without a look at the scores."""
    return not any(overrides(policy, method) for method in ("select", "expand", "keep"))


@cache
def kernels_on(device: torch.device) -> ModuleType:
    """What a policy computes with: it decides the same with any."""
    return AUTO.on(device)
