"""What goes wrong though no setting is wrong, and what errors of others say, in one line."""

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from specdec.protocols import Drafter
    from specdec.request import Decoding


class FailedError(ValueError):
    """What ended a run though no setting was wrong: exit code 1."""


class DraftError(RuntimeError):
    """A drafter failed.

    Args:
        requests: ids of what it drafted for.
        reason: what happened, and where.
    """

    def __init__(self, drafter: "Drafter", requests: Sequence[int], reason: str) -> None:
        name = drafter.name or type(drafter).__name__
        super().__init__(f"{name} failed on request {', '.join(map(str, requests))}: {reason}")
        self.drafter, self.requests, self.reason = name, list(requests), reason

    @classmethod
    def caused_by(
        cls, error: Exception, drafter: "Drafter", sequences: Sequence["Decoding"]
    ) -> "DraftError":
        """What `drafter` raised while it drafted for these, with the line it happened in."""
        return cls(drafter, [sequence.request.id for sequence in sequences], described(error))


class LogitsError(ValueError):
    """The target's logits make no distribution, as `specdec.sampling.sound` has it.

    Args:
        requests: ids of what was decoded.
        reason: when it happened.
    """

    def __init__(self, requests: Sequence[int], reason: str) -> None:
        super().__init__(f"NaN or infinite logits on request {requests[0]}, {reason}")
        self.requests, self.reason = list(requests), reason


@contextmanager
def part_of(setting: str) -> Iterator[None]:
    """What a drafter refuses it calls by names outside of any composition; here those of
    `setting`."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bdrafter\.(?!parts\b)", f"{setting}.", str(error))
        raise ValueError(text) from error


def described(error: BaseException) -> str:
    """What an error is, what it says, and the line it happened in."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{said} ({Path(frame.filename).name}:{frame.lineno})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]


@contextmanager
def in_memory(mend: str) -> Iterator[None]:
    """Within, a GPU that is full is told as `full`."""
    import torch  # which some that import this do without

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise full(error, mend) from error


def full(error: "torch.OutOfMemoryError", mend: str) -> FailedError:
    """That the memory of a GPU is full, and what helps."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f", {asked[1]} more were needed" if asked else ""
    return FailedError(f"the memory of the GPU is full{more}; {mend}")
