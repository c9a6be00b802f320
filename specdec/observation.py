"""Observation: what a pass of the target shows a drafter. It is all that a drafter learns of the
target, and the way back to `tree.Begun`, by which a draft hands its work on."""

from dataclasses import dataclass
from types import ModuleType
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Observes:
    """What a drafter asks for.

    Args:
        tokens: so many of the target's most probable tokens, after every node that it verifies.
        prompts: the same after every token of a prompt that it reads. What another sequence has
            read already, and shares, is not read again.
    """

    tokens: int = 0
    prompts: bool = False

    def __or__(self, other: Self) -> Self:
        """What serves both."""
        return type(self)(
            tokens=max(self.tokens, other.tokens), prompts=self.prompts or other.prompts
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Observation:
    """What was seen at N nodes or tokens of each of B sequences.

    Args:
        tokens: [B, N, K] int64, the target's most probable tokens after each, best first; None if
            nobody asked. A composition asks for the most that a part wants.
    """

    tokens: Tensor | None = None


def observe(observes: Observes, logits: Tensor, kernels: ModuleType) -> Observation:
    """What is asked for, of the target's logits [B, N, V]."""
    count = min(observes.tokens, logits.shape[2])
    if not count:
        return Observation()
    best, _ = kernels.top_tokens(logits.flatten(0, 1), count)
    return Observation(tokens=best.view(*logits.shape[:2], count))
