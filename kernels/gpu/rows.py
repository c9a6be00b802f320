"""Tiles of rows, a few columns wide, as the kernels move them."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements a program moves


def tile(key_dim: int, value_dim: int, rows: int) -> tuple[dict[str, Any], int]:
    """Launch parameters of programs that move tiles of rows, and how many it takes."""
    block_dim = triton.next_power_of_2(max(key_dim, value_dim))
    block_rows = min(max(TILE // block_dim, 1), triton.next_power_of_2(rows))
    shape = {"BLOCK_ROWS": block_rows, "BLOCK_DIM": block_dim, "num_warps": 4}
    return shape, triton.cdiv(rows, block_rows)


def outer_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last.

    Raises:
        ValueError: the last is not dense.
    """
    *outer, last = tensor.stride()
    if last != 1:
        raise ValueError(f"a last dimension of stride {last} must be dense")
    return tuple(outer)


@triton.jit
def load_rows(pointer, offsets, alive, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[R, BLOCK_DIM], zeros beyond the rows that are alive and their columns."""
    offs_dim = tl.arange(0, BLOCK_DIM)
    mask = alive[:, None] & (offs_dim < DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + offs_dim[None, :], mask=mask, other=0)


@triton.jit
def store_rows(pointer, offsets, rows, alive, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    offs_dim = tl.arange(0, BLOCK_DIM)
    mask = alive[:, None] & (offs_dim < DIM)[None, :]
    rows = rows.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets[:, None] + offs_dim[None, :], rows, mask=mask)
