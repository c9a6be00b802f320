"""Placing: small tensors in large ones, so that the large compute what the small ones did."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.models.standin import RANDOM_STD

Places = tuple[Tensor, Tensor]
"""Where numbers go in a large tensor, and where they stand in the small one."""


def ranges(starts: Iterable[tuple[int, int]], size: int) -> Places:
    """Ranges of `size` numbers, from where they begin in the large tensor and in the small."""
    pairs = list(starts)
    to, of = (
        torch.cat([torch.arange(start[side], start[side] + size) for start in pairs])
        for side in (0, 1)
    )
    return to, of


def side_by_side(count: int, small: int, large: int) -> Places:
    """Where so many vectors go that stand side by side."""
    return ranges(((index * large, index * small) for index in range(count)), small)


def beginning(size: int) -> Places:
    return ranges([(0, 0)], size)


def place(
    large: Tensor, small: Tensor, rows: Places | None = None, columns: Places | None = None
) -> None:
    """A small matrix into a large one, which is zero elsewhere."""
    large.zero_()
    put(large, small, rows, columns)


def put(
    large: Tensor, small: Tensor, rows: Places | None = None, columns: Places | None = None
) -> None:
    """Without places, into the first rows or columns."""
    to_rows, of_rows = rows or beginning(small.shape[0])
    to_columns, of_columns = columns or beginning(small.shape[1])
    device = large.device
    chosen = small.to(device)[of_rows.to(device)][:, of_columns.to(device)]
    large[to_rows.to(device)[:, None], to_columns.to(device)] = chosen.to(large.dtype)


def fill(
    large: Any,
    small: Any,
    rows: Places | None = None,
    columns: Places | None = None,
    random: torch.Generator | None = None,
) -> None:
    """A product, with zeros where there is nothing of the small one's; or with random numbers, if
    what reads it drops the rows and what it reads has zeros for the columns."""
    if random is None:
        large.weight.zero_()
    else:
        large.weight.normal_(std=RANDOM_STD, generator=random)
    put(large.weight, small.weight, rows, columns)
    if small.bias is not None:
        column = beginning(1)
        place(large.bias[:, None], small.bias[:, None], rows, column)


def fill_norm(large: Any, small: Any, constant: float = 0.0, places: Places | None = None) -> None:
    """What the small norm makes, of a larger input that is zero elsewhere.

    Args:
        constant: sum of squares of what else is in the input.
    """
    of, to = small.weight.shape[0], large.weight.shape[0]
    scaled = small.weight * math.sqrt(of / to)
    place(large.weight[:, None], scaled[:, None], places, beginning(1))
    large.variance_epsilon = (of * small.variance_epsilon - constant) / to


def linear_of(weight: Tensor) -> nn.Linear:
    """A product by this weight, which stays where it is."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
