"""What errors of others say, in one line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class FailedError(ValueError):
    """What ended a run though no setting was wrong: exit code 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]


def full(error: "torch.OutOfMemoryError", mend: str) -> FailedError:
    """That the memory of a GPU is full, and what helps."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f", {asked[1]} more were needed" if asked else ""
    return FailedError(f"the memory of the GPU is full{more}; {mend}")
