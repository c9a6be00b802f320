"""Observation: what a pass of the target shows a drafter. It is all that a drafter learns of the
target, and the way back to `tree.Begun`, by which a draft hands its work on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, Self

from torch import Tensor

Tap = int | Literal["normal"]
"""A state of the target: what leaves layer k, counted from 1 (0 is the embedding), or what the
final norm makes of what leaves the last. transformers calls the former hidden_states[k], for k
below the number of layers; hidden_states[layers] is the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observes:
    """What a drafter asks for.

    Args:
        tokens: so many of the target's most probable tokens, after every node that it verifies.
        prompts: the same after every token of a prompt that it reads. What another sequence has
            read already, and shares, is not read again.
        taps: states of the target at every node, and with `prompts` likewise: a drafter says
            (`page_successors`) whether it needs those of all tokens.
    """

    tokens: int = 0
    prompts: bool = False
    taps: tuple[Tap, ...] = ()

    def __or__(self, other: Self) -> Self:
        """What serves both."""
        return type(self)(
            tokens=max(self.tokens, other.tokens),
            prompts=self.prompts or other.prompts,
            taps=(*self.taps, *(tap for tap in other.taps if tap not in self.taps)),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Observation:
    """What was seen at N nodes or tokens of each of B sequences.

    Args:
        tokens: [B, N, K] int64, the target's most probable tokens after each, best first; None if
            nobody asked. A composition asks for the most that a part wants.
        states: [B, N, H], the target's hidden states, by tap.
    """

    tokens: Tensor | None = None
    states: Mapping[Tap, Tensor] = field(default_factory=dict)


def observe(
    observes: Observes,
    logits: Tensor | None,
    states: Mapping[Tap, Tensor],
    kernels: ModuleType,
) -> Observation:
    """What is asked for, of the target's logits [B, N, V], which are there if tokens are, and of
    its states."""
    best = None
    if observes.tokens and logits is not None:
        best, _ = kernels.top_tokens(logits.flatten(0, 1), min(observes.tokens, logits.shape[2]))
        best = best.view(*logits.shape[:2], -1)
    return Observation(tokens=best, states=dict(states))
