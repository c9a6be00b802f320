"""How attention divides its keys when bits must not depend on it.

A query at position p reads the keys before t(p) in pieces whose borders are positions, the same in
every run, and those from t(p) on, 64 to 128 of them and its own path among them, by itself
(`specdec.kernels.exact.tail`). So what is added to what, and in which order, follows from p alone:
not from the batch, nor the tree, nor from what has been committed, prefilled or shared already.
Which program works on which pieces follows from lengths, and does not matter.

Pieces grow with their position, as the numbers that a float of three bits can hold: eight between
a power of two and the next, of one unit each up to 16 units. A context of 1,024 tokens has 8,
one of 32,768 has 48, and in no context is the largest more than an eighth of all.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.blocks import Blocks, processors
from specdec.kernels.gpu.plan import FIELDS, clear, even_share, find_groups, put
from specdec.kernels.layout import TreeLayout

REACH = 64  # nodes of a path beside its root: keys this near to a query are read by itself
ALIGNED = tl.constexpr(64)  # t(p) is a multiple of this
NEAR = tl.constexpr(REACH)
TAIL = REACH + ALIGNED.value  # keys from t(p) on, at most
UNIT = tl.constexpr(128)  # keys of the first pieces
MANTISSA = tl.constexpr(3)


def pieces_before(position: int) -> int:
    """How many pieces begin before a position."""
    if position <= 0:
        return 0
    unit = (position - 1) // UNIT.value
    shift = max(unit.bit_length() - 1 - MANTISSA.value, 0)
    return (unit >> shift) + (shift << MANTISSA.value) + 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Plan:
    """The work of one forward pass; all that depends on lengths is on the device.

    Attributes:
        items: [W, FIELDS] int32, ranges of pieces of single sequences; unused ones are zero.
        shared_items: the same for pages shared by several sequences; None without sharing.
        spans: [B, 2] int32: where the partial results of each sequence begin, and how many it has,
            that of the tail the last.
        slots: partial results there may be.
        most: no sequence has more than this.
    """

    items: Tensor
    shared_items: Tensor | None
    spans: Tensor
    slots: int
    most: int


def make_plan(
    layout: TreeLayout,
    *,
    blocks: Blocks,
    nodes: range,
    group: int,
    kv_heads: int,
    page_size: int,
    window: int | None,
    shared_prefix: bool,
) -> Plan:
    """Hand out the pieces of all sequences to as many programs as run together; nothing is read
    back. (Long for what it hands to the kernels.)

    Args:
        nodes: those of each sequence that are asked for.
        group: query heads of a key-value head.
        shared_prefix: read what neighbouring sequences share once for all of them.
    """
    batch, device = len(layout.context_lens), layout.context_lens.device
    rows = len(nodes) * group
    # The last position a query of a chain can have, counted from the context; of a tree the pages
    # hold all that is read in pieces.
    last = layout.first + nodes.stop - 1 if layout.ancestors is None else REACH
    programs = kv_heads * triton.cdiv(rows, blocks.rows)
    slots = processors(device) * blocks.per_processor
    waves = triton.cdiv(batch * programs, slots)
    most = pieces_before(max(layout.max_context + last - REACH, 0))
    target = min(max(batch, waves * slots // programs), batch * max(most, 1))
    items = torch.empty(target, FIELDS.value, dtype=torch.int32, device=device)
    spans = torch.empty(batch, 2, dtype=torch.int32, device=device)
    shared, shared_items = None, None
    if shared_prefix and batch > 1 and window is None:
        shared, shared_items = _share(layout, blocks, rows, page_size, most)
    plan_kernel[(1,)](
        items,
        spans,
        layout.context_lens,
        shared,
        batch,
        target,
        last,
        window or 0,
        B_PAD=triton.next_power_of_2(batch),
        W_PAD=triton.next_power_of_2(target),
        num_warps=4,
    )
    return Plan(
        items=items,
        shared_items=shared_items,
        spans=spans,
        slots=batch * (most + 1),
        most=most + 1,
    )


def _share(
    layout: TreeLayout, blocks: Blocks, rows: int, page_size: int, most: int
) -> tuple[Tensor, Tensor]:
    """(shared [B] int32: pieces that the group of each sequence shares; the programs that read
    them, as `Plan.shared_items`: one for each piece and row block of a group.)"""
    batch, device = len(layout.context_lens), layout.context_lens.device
    shared = torch.empty(batch, dtype=torch.int32, device=device)
    # Every group may leave its last row block partly empty.
    count = (triton.cdiv(batch * rows, blocks.rows) + batch // 2) * max(most, 1)
    items = torch.empty(count, FIELDS.value, dtype=torch.int32, device=device)
    share_kernel[(1,)](
        shared,
        items,
        layout.page_table,
        layout.context_lens,
        batch,
        rows,
        layout.page_table.shape[1],
        layout.page_table.stride(0),
        count,
        B_PAD=triton.next_power_of_2(batch),
        W_PAD=triton.next_power_of_2(count),
        PAGE=page_size,
        BLOCK_M=blocks.rows,
        num_warps=4,
    )
    return shared, items


@triton.jit
def piece_start(piece):
    """The position at which a piece begins."""
    shift = tl.maximum((piece >> MANTISSA) - 1, 0)
    return ((piece - (shift << MANTISSA)) << shift) * UNIT


@triton.jit
def pieces_until(position):
    """How many pieces begin before a position (`pieces_before`)."""
    unit = tl.maximum(position - 1, 0) // UNIT
    log = (unit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.maximum(log - MANTISSA, 0)
    return tl.where(position > 0, (unit >> shift) + (shift << MANTISSA) + 1, 0)


@triton.jit
def tail_begin(position):
    """t(p), the first key that a query reads by itself."""
    return tl.maximum(position - NEAR, 0) // ALIGNED * ALIGNED


@triton.jit
def first_piece(context, window):
    """The piece in which the keys begin that a window leaves to the first query, or a later."""
    start = tl.maximum(context + 1 - window, 0)
    return tl.where(window > 0, tl.maximum(pieces_until(start + 1) - 1, 0), 0)


@triton.jit(do_not_specialize=["batch", "target", "last", "window"])
def plan_kernel(
    items_ptr,
    spans_ptr,
    context_lens_ptr,
    shared_ptr,
    batch,
    target,
    last,
    window,
    B_PAD: tl.constexpr,
    W_PAD: tl.constexpr,
):
    """Items of about equal length; a piece belongs to the item in which it begins."""
    offs_b = tl.arange(0, B_PAD)
    real = offs_b < batch
    context = tl.load(context_lens_ptr + offs_b, mask=real, other=0)  # [B]
    end = tl.where(real, tail_begin(context + last), 0)
    first = tl.minimum(first_piece(context, window), pieces_until(end))
    tl.store(spans_ptr + 2 * offs_b + 1, pieces_until(end) - first + 1, mask=real)
    slots = tl.where(real, pieces_until(end) - first + 1, 0)
    tl.store(spans_ptr + 2 * offs_b, tl.cumsum(slots, 0) - slots, mask=real)
    if shared_ptr is not None:
        first = tl.load(shared_ptr + offs_b, mask=real, other=0)
    begin = tl.minimum(piece_start(first), end)
    units = (end - begin + ALIGNED - 1) // ALIGNED
    count = tl.cdiv(units, even_share(units, target))
    item = tl.cumsum(count, 0) - count
    clear(items_ptr, tl.sum(count, 0), target, W_PAD)
    for i in range(tl.max(count, 0)):
        has = real & (i < count)
        from_piece = pieces_until(begin + i * units // tl.maximum(count, 1) * ALIGNED)
        to_piece = pieces_until(begin + (i + 1) * units // tl.maximum(count, 1) * ALIGNED)
        from_piece, to_piece = tl.maximum(from_piece, first), tl.maximum(to_piece, first)
        # The last pieces are the largest: they come first.
        put(items_ptr, item + count - 1 - i, offs_b, from_piece, to_piece, 0, 0, 1, 0, 0, has)


@triton.jit(do_not_specialize=["batch", "rows", "columns", "target"])
def share_kernel(
    shared_ptr,
    items_ptr,
    page_table_ptr,
    context_lens_ptr,
    batch,
    rows,
    columns,
    stride_table_b,
    target,
    B_PAD: tl.constexpr,
    W_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Groups of neighbouring sequences whose first pieces lie in the same pages."""
    offs_b = tl.arange(0, B_PAD)
    real = offs_b < batch
    # One piece in common is worth a pass.
    leader, members, common = find_groups(
        page_table_ptr, context_lens_ptr, batch, columns, stride_table_b, UNIT, B_PAD, PAGE
    )
    context = tl.load(context_lens_ptr + offs_b, mask=real, other=0)
    together = (leader[:, None] == leader[None, :]) & real[None, :]
    nearest = tl.min(tl.where(together, tail_begin(context)[None, :], 2147483647), 1)
    # Whole pieces alone: the number of borders at or before the end, less the first.
    pieces = tl.maximum(pieces_until(tl.minimum(common, nearest) + 1) - 1, 0)
    pieces = tl.where(real & (members > 1), pieces, 0)
    tl.store(shared_ptr + offs_b, pieces, mask=real)
    leads = (leader == offs_b) & (pieces > 0)
    tiles = tl.where(leads, tl.cdiv(members * rows, BLOCK_M), 0)
    items = tiles * pieces
    first = tl.cumsum(items, 0) - items
    clear(items_ptr, tl.sum(items, 0), target, W_PAD)
    for i in range(tl.max(items, 0)):
        has = leads & (i < items)
        piece = i // tl.maximum(tiles, 1)
        tile = i % tl.maximum(tiles, 1)
        put(items_ptr, first + i, offs_b, piece, piece + 1, 0, 0, members, tile, 0, has)
