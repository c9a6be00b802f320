"""Online state: what a drafter learns while it decodes, and how long it keeps it."""

from collections.abc import Callable, Hashable
from typing import Generic, Literal, TypeVar, get_args

from specdec.request import Decoding, Request

T = TypeVar("T")
Reset = Literal["prompt", "category", "never"]
"""After what a drafter forgets: a prompt (each turn of a conversation), a category of prompts, or
nothing until the run ends."""


def check_reset(reset: str) -> None:
    """Raise ValueError unless `reset` is one of `Reset`."""
    if reset not in get_args(Reset):
        raise ValueError(f"drafter.reset={reset}: must be one of {', '.join(get_args(Reset))}")


def state_key(request: Request, reset: Reset) -> Hashable:
    """Requests with equal keys share what is learnt."""
    if reset == "never":
        return None
    return request.id if reset == "prompt" else request.category


class Memory(Generic[T]):
    """A state for each prompt, for each category, or one for all.

    Args:
        reset: which of these.
        make: an empty state.
    """

    def __init__(self, reset: Reset, make: Callable[[], T]) -> None:
        self.reset, self.make = reset, make
        self._states: dict[Hashable, T] = {}

    def of(self, sequence: Decoding) -> T:
        key = state_key(sequence.request, self.reset)
        if key not in self._states:
            self._states[key] = self.make()
        return self._states[key]

    def finish(self, sequence: Decoding) -> None:
        """This sequence has ended, and its prompt with it."""
        if self.reset == "prompt":
            self._states.pop(sequence.request.id, None)

    def clear(self) -> None:
        self._states.clear()
