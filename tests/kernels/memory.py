"""Memory that is poisoned: what must not be looked at holds NaN."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 1024  # elements before and behind a tensor; keeps it aligned


def guarded(content: Tensor) -> Tensor:
    """A dense copy on the device in the middle of poisoned memory."""
    memory = poison(content.numel() + 2 * GUARD, content.dtype)
    memory[GUARD : GUARD + content.numel()] = content.flatten().to(DEVICE)
    return memory[GUARD : GUARD + content.numel()].view(content.shape)


def part_of_wider(content: Tensor) -> Tensor:
    """A copy on the device that is part of a poisoned tensor, wider at both ends of every
    dimension but the last."""
    *outer, last = content.shape
    shape = [size + 2 for size in outer] + [last]
    wide = poison(math.prod(shape), content.dtype).view(shape)
    inner = wide[tuple(slice(1, -1) for _ in outer)]
    inner.copy_(content)
    return inner


def poison(count: int, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.full((count,), math.nan, device=DEVICE).to(dtype)
    return torch.full((count,), -77, dtype=dtype, device=DEVICE)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the block new memory is full of NaN or of small numbers, so that an element nobody
    writes is noticed, and lies between guards.

    Raises:
        AssertionError: something was written to a guard.
    """
    given: list[tuple[Tensor, int]] = []

    def fill(count: int, dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return poison(count, dtype)
        return (torch.arange(count, device=DEVICE) % 5).to(dtype)  # could be meant

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        given.append((fill(count + 2 * GUARD, dtype), count))
        return given[-1][0][GUARD : GUARD + count].view(shape)

    def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(size) if not size or isinstance(size[0], int) else tuple(size[0])

    def empty(*size: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
        return allocate(shape_of(size), dtype)

    def empty_like(like: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return allocate(like.shape, dtype or like.dtype)

    def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return allocate(shape_of(size), dtype or like.dtype)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield
    for memory, count in given:
        before = fill(len(memory), memory.dtype)
        for guard in (slice(GUARD), slice(GUARD + count, None)):
            assert torch.equal(bits(memory[guard]), bits(before[guard]))


def bits(tensor: Tensor) -> Tensor:
    """The bytes: NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().view(torch.uint8)


def raw(tensor: Tensor) -> Tensor:
    """The bytes on the host."""
    return bits(tensor).cpu()
