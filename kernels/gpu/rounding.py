"""Rounding rows to a quantised type with a scale that is a power of two."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.rows import load_rows, store_rows, tile
from specdec.kernels.reference.cache import LARGEST

LARGEST_E4M3 = tl.constexpr(LARGEST[torch.float8_e4m3fn])
LARGEST_INT8 = tl.constexpr(LARGEST[torch.int8])
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `specdec.kernels.reference.quantise`, to the last bit."""
    triton_type(dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, dim = rows.shape
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    shape, blocks = tile(dim, dim, count)
    quantise_kernel[(blocks,)](values, scales, rows, count, DIM=dim, **shape)
    return values, scales


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """What Triton calls a quantised type.

    Raises:
        ValueError: a type that needs no scale.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype={dtype}: must be torch.float8_e4m3fn or torch.int8")
    return tl.int8 if dtype == torch.int8 else tl.float8e4nv


@triton.jit
def quantise_kernel(
    values_ptr,  # [R, D]
    scales_ptr,  # [R]
    rows_ptr,  # [R, D]
    count,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program for a block of rows."""
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    alive = offs_row < count
    rows = load_rows(rows_ptr, offs_row * DIM, alive, DIM, BLOCK_DIM)
    rows, scale = round_rows(rows, values_ptr.dtype.element_ty)
    tl.store(scales_ptr + offs_row, scale, mask=alive)
    store_rows(values_ptr, offs_row * DIM, rows, alive, DIM, BLOCK_DIM)


@triton.jit
def round_rows(rows, DTYPE: tl.constexpr):
    """Rows [R, D] as numbers a quantised type can hold, still in float32, and their scales [R],
    found as in the reference.

    Rounded by hand: the interpreter's cast to float8 truncates, and int8 has no rounding cast.
    """
    LARGEST: tl.constexpr = LARGEST_INT8 if DTYPE.is_int() else LARGEST_E4M3
    rows = rows.to(tl.float32)
    largest = tl.max(tl.abs(rows), axis=1)
    limit = tl.full(largest.shape, LARGEST, tl.float32)
    largest = tl.where(largest < limit * TINY, limit, largest).to(tl.int32, bitcast=True)
    quotient = largest - limit.to(tl.int32, bitcast=True) + 0x3F800000  # that of 1.0
    scale = (quotient + 0x7FFFFF) & 0x7F800000
    rows *= (0x7F000000 - scale).to(tl.float32, bitcast=True)[:, None]  # the inverse
    scale = scale.to(tl.float32, bitcast=True)
    if DTYPE.is_int():
        return _nearest(rows, 1.0), scale
    bits = rows.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |rows|
    rounded = _nearest(rows, tl.maximum(power, 0.015625) * 0.125)  # e4m3: 3 bits, from 2**-6 on
    sign = bits & -0x80000000  # zeros keep theirs
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), scale


@triton.jit
def _nearest(x, step):
    """The multiple of `step`, a power of two, that is nearest to x, of two the even one; for
    |x| < 2**22 steps."""
    magic = step * 12582912.0  # 1.5 * 2**23: around it, neighbouring float32 are a step apart
    return (x + magic) - magic
