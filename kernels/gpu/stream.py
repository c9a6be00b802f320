"""How a weight is read by the few rows of a decoding step, and the kernel that does it in Triton.

Launch parameters were measured on an H200, those of float8 and beyond 64 rows on an H100.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

STREAM_ROWS = 64  # of x; beyond, cuBLAS is as good for most weights
FLOAT8_ROWS = 512  # with a weight in float8; beyond, torch computes with one that was made wide
TILE_ROWS = 256  # of x to a program, at most
SPLIT_COLUMNS = 128  # columns of a split are a multiple of these
PROGRAMS = 132  # about as many as a GPU has multiprocessors
RING = 216 * 1024  # bytes of shared memory for tiles on their way to one multiprocessor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """How a weight is read.

    Args:
        rows: of the weight to a program; with a gate, of the gate and of the up half each.
        columns: of an iteration.
        splits: parts the sum over K is cut into.
        warps, stages: of a program, and of its pipeline.
        bulk: read with the bulk copy engine (TMA).
        ring: the kernel with a pipeline kept by hand (`specdec.kernels.gpu.ring`); needs `bulk`
            and warps in fours.
    """

    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int
    bulk: bool = True
    ring: bool = True


EXACT = Stream(rows=32, columns=32, stages=2, bulk=False, ring=False)
FEW_ROWS = Stream(rows=64, columns=128, stages=10)
MANY_ROWS = Stream(rows=128, columns=128, warps=8, stages=4)
GATED = Stream(rows=64, columns=128, stages=5)
GATED_MANY_ROWS = Stream(rows=64, columns=128, stages=2)
GATED_SMALL = Stream(rows=64, columns=64, stages=10)
GATED_WIDE = Stream(rows=64, columns=64, stages=6)
GATED_WIDEST = Stream(rows=128, columns=64, warps=8, stages=4)
WIDE = Stream(rows=64, columns=64, stages=9)
WIDE_WHOLE = Stream(rows=128, columns=64, warps=8, stages=8)
FLOAT8_FEW = Stream(rows=64, columns=256, stages=5)
FLOAT8_TALL = Stream(rows=128, columns=256, warps=8, stages=2)
FLOAT8 = Stream(rows=64, columns=128, stages=10)
FLOAT8_GATED = Stream(rows=128, columns=128, warps=8, stages=4)
FLOAT8_WIDE = Stream(rows=128, columns=128, warps=8, stages=4)
FLOAT8_WIDEST = Stream(rows=128, columns=64, warps=8, stages=5)


def choose_stream(
    *,
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    whole: bool,
    gated: bool = False,
    exact: bool = False,
    float8: bool = False,
    processors: int = PROGRAMS,
) -> Stream:
    """How to read a weight [outputs, inputs] for a product with `rows` rows.

    The order in which a result is summed up follows from its splits alone: tensor cores add to a
    result column after column, however large the tile.

    Args:
        whole: the result is wanted in one part.
        gated: one half of the outputs is the gate of the other.
        exact: as many splits whatever the rows; up to 16 rows it makes no difference.
        float8: the weight is, and has as many splits whatever the rows without `exact` too.
        processors: multiprocessors that share it; splits do not depend on them.
    """
    if dtype == torch.float32:  # no tensor cores: exactness is the point, not speed
        return replace(EXACT, rows=EXACT.rows // 2) if gated else EXACT
    if float8:
        splits = 1 if whole or gated else _splits(outputs, inputs, crowded=True, together=2)[0]
        return _choose_float8(rows, outputs, inputs, dtype, splits, gated, processors)
    if rows > STREAM_ROWS:
        gate = GATED_WIDE if rows <= 128 else GATED_WIDEST
        stream = gate if gated else WIDE_WHOLE if whole else WIDE
    elif gated:
        few = GATED if rows <= 16 else GATED_MANY_ROWS
        stream = few if outputs >= PROGRAMS * GATED.rows else GATED_SMALL
    else:
        stream = MANY_ROWS if whole and rows > 16 else FEW_ROWS
    splits, together = 1, 1  # programs to a multiprocessor
    if rows > STREAM_ROWS:
        splits = 1 if whole or gated else _splits(outputs, inputs, crowded=exact)[0]
    elif whole or stream is GATED_MANY_ROWS:  # one starts while the other is at work
        together = 2
    elif not gated:
        splits, together = _splits(outputs, inputs, crowded=exact or rows <= 16)
    room = RING // together
    lines = (2 if gated else 1) * stream.rows + padded_rows(rows, gated=gated)
    stages = min(stream.stages, room // (lines * stream.columns * dtype.itemsize))
    steps = triton.cdiv(triton.cdiv(inputs, splits), stream.columns)
    return replace(stream, splits=splits, stages=max(2, min(stages, steps)))


def _choose_float8(
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    splits: int,
    gated: bool,
    processors: int,
) -> Stream:
    """How to read a weight in float8. While one program makes its weights wide another has the
    tensor cores, so that two or more share a multiprocessor.

    Measured on an H100, up to 16 rows: 256 columns at a time are 3 to 5 % faster than 128 in as
    many bytes; taller tiles another 7 % where there would be three programs to a multiprocessor;
    and room for a program of the next product, which fills its ring meanwhile, is worth 15 % where
    a program has but four steps, while one of 14 is 11 % faster with a deeper ring. A pass of an
    8B over one token takes 3.51 ms in place of 3.69.
    """
    halves = 2 if gated else 1
    tiles = triton.cdiv(outputs // halves, FLOAT8.rows)
    load = tiles * splits / processors
    spare = 0  # programs that there is room for beside those of this product
    if rows > STREAM_ROWS:
        stream = FLOAT8_GATED if gated else FLOAT8_WIDE if rows <= 128 else FLOAT8_WIDEST
    elif gated and (rows > 32 or load > 3):
        # A second round of a few small tiles would leave most of the GPU idle.
        stream = FLOAT8_GATED
    elif rows > 16 or (gated and load > 2):  # no room for three with 256 columns
        stream = FLOAT8
    elif 2 < load <= 4:
        stream = FLOAT8_TALL
    else:
        stream = FLOAT8_FEW
        spare = 1 if not gated and inputs <= 4 * splits * stream.columns else 0
    programs = triton.cdiv(outputs // halves, stream.rows) * splits
    most = 1 if rows > 128 else 16 // stream.warps  # that have room for their registers
    together = triton.cdiv(programs, processors) + spare
    if together > most:  # they take turns
        together = min(3, most)
    line = halves * stream.rows + padded_rows(rows, gated=gated) * dtype.itemsize
    stages = min(stream.stages, RING // together // (line * stream.columns))
    steps = triton.cdiv(triton.cdiv(inputs, splits), stream.columns)
    return replace(stream, splits=splits, stages=max(2, min(stages, steps)))


def _splits(outputs: int, inputs: int, crowded: bool, together: int = 1) -> tuple[int, int]:
    """Parts of the sum over the inputs, and programs that run at the same time on one
    multiprocessor.

    Args:
        crowded: three of them, where `together` would leave many without work.
    """
    columns = FEW_ROWS.columns
    tiles = triton.cdiv(outputs, FEW_ROWS.rows)
    programs = together * PROGRAMS
    splits = max(1, min(programs // tiles, inputs // (2 * columns)))
    crowd = 3 * PROGRAMS // tiles
    uneven = not 0.9 * programs <= tiles * splits <= programs
    if crowded and uneven and crowd > splits and inputs >= 8 * crowd * columns:
        return crowd, 3
    return splits, together


def few_enough(rows: int, outputs: int, inputs: int, gated: bool) -> bool:
    """Whether a product in half precision is no slower here than with cuBLAS.

    That reads x once for several tiles of the weight, which counts once x is large beside it; but
    it does not join a gate, nor split a long sum, nor begin before the product ahead of it ends.
    Measured on an H100; up to 128 rows, but for the one round of tiles, on an H200 too.
    """
    if rows <= STREAM_ROWS:
        return True
    full = -rows % 128 <= 32  # the tile of x
    one_round = outputs <= PROGRAMS * WIDE.rows
    if rows <= 128:
        return full and (gated or one_round)
    return rows <= TILE_ROWS and ((gated and full) or (one_round and inputs >= 2 * outputs))


def padded_rows(rows: int, *, gated: bool = False, blocked: bool = False) -> int:
    """Columns of the tile that holds x, transposed; fewer at most with a gate, or with scales of
    blocks, for which sums are kept apart that take registers too."""
    most = TILE_ROWS // ((2 if gated else 1) * (2 if blocked else 1))
    return min(max(16, triton.next_power_of_2(rows)), most)


def box_rows(rows: int, tile: int) -> int:
    """Rows of a tile of x that the bulk copy engine reads at once, of which the last may lie
    beyond x: those come slower than what is there, and many boxes wait for each other."""
    rest = rows % tile or tile  # rows of the last tile
    if tile <= STREAM_ROWS or rest > 3 * tile // 4:
        return tile
    return tile // 2 if rest <= tile // 2 else tile // 4


@triton.jit(do_not_specialize=["rows", "x_tiles"])
def stream_kernel(
    out_ptr,  # [S, M, N]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], with a gate [2 N, K]
    x_desc,
    weight_desc,
    scale_ptr,  # None, or of float8: [N] or [N / SCALED, K / SCALED]
    rows,
    x_tiles,
    stride_x_row,
    WIDTH: tl.constexpr,  # N
    DEPTH: tl.constexpr,  # K
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_GATE: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program for a tile of rows of the weight, one split of its columns and a tile of x."""
    first = tl.program_id(0) // x_tiles * BLOCK_N
    first_x = tl.program_id(0) % x_tiles * BLOCK_M  # neighbours read the same weights
    begin = tl.program_id(1) * CHUNK
    end = min(begin + CHUNK, DEPTH)
    offs_m = first_x + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    inside = offs_n < WIDTH
    # Rows beyond the last give results that nobody stores.
    kept_n = tl.minimum(offs_n, WIDTH - 1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_rows = x_ptr + offs_m[:, None].to(tl.int64) * stride_x_row + offs_k  # [BM, BK]
    weight_rows = weight_ptr + kept_n[:, None] * DEPTH + offs_k  # [BN, BK]
    alive = offs_m[:, None] < rows
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if BULK:
            weight = weight_desc.load([first, k])
            x = x_desc.load([first_x, k])
        else:
            near = (k + offs_k < DEPTH)[None, :]
            weight = _read(weight_rows + k, near, DEPTH, BLOCK_K)
            x = tl.load(x_rows + k, mask=alive & near, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        if SCALED:
            part = tl.dot(weight.to(x.dtype), x.T, input_precision=PRECISION)
            acc += part * _scale(scale_ptr, kept_n, k, SCALED, DEPTH)
        else:
            acc = tl.dot(weight.to(x.dtype), x.T, acc, input_precision=PRECISION)
        if WITH_GATE:
            if BULK:
                weight = weight_desc.load([WIDTH + first, k])
            else:
                weight = _read(
                    weight_rows + tl.cast(WIDTH, tl.int64) * DEPTH + k, near, DEPTH, BLOCK_K
                )
            if SCALED:
                part = tl.dot(weight.to(x.dtype), x.T, input_precision=PRECISION)
                up += part * _scale(scale_ptr, kept_n + WIDTH, k, SCALED, DEPTH)
            else:
                up = tl.dot(weight.to(x.dtype), x.T, up, input_precision=PRECISION)
    if scale_ptr is not None and not SCALED:
        acc *= _scale(scale_ptr, kept_n, 0, SCALED, DEPTH)
        if WITH_GATE:
            up *= _scale(scale_ptr, kept_n + WIDTH, 0, SCALED, DEPTH)
    if WITH_GATE:
        acc = gated(acc, up, out_ptr.dtype.element_ty)
    target = (tl.program_id(1) * rows + offs_m[None, :]).to(tl.int64) * WIDTH + offs_n[:, None]
    tl.store(
        out_ptr + target,
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (offs_m < rows)[None, :],
    )


@triton.jit
def _scale(scale_ptr, rows, k, SCALED: tl.constexpr, DEPTH: tl.constexpr):
    """[BN, 1] of rows of the weight, at a column."""
    if SCALED:
        rows = rows // SCALED * tl.cdiv(DEPTH, SCALED) + k // SCALED
    return tl.load(scale_ptr + rows)[:, None]


@triton.jit
def _read(pointers, near, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the weight, which no one will ask for again soon."""
    if DEPTH % BLOCK_K == 0:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=near, other=0.0, eviction_policy="evict_first")


@triton.jit
def gated(opening, up, DTYPE: tl.constexpr):
    """silu(opening) * up of numbers rounded to a type, in float32."""
    opening = opening.to(DTYPE).to(tl.float32)
    return opening / (1.0 + tl.exp(-opening)) * up.to(DTYPE).to(tl.float32)
