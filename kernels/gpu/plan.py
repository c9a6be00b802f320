"""How attention divides its work: a list of pieces, made on the device.

A piece is a range of key blocks of one sequence, or of the pages that neighbouring sequences
share. The pieces of a sequence are processed side by side and merged afterwards, so that a few
long contexts still fill the whole GPU. Lengths are known to the device only, so the list is made
there, once for all layers of a forward pass.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.blocks import Blocks, processors
from specdec.kernels.layout import TreeLayout

# Fields of an item: first sequence, first and last (exclusive) unit of work, partial results of
# the sequence in all (1: the result is final), where its own go, sequences, row block, piece.
# A unit is a block of context keys; every block of the tree, which follows, is `tree_cost` units.
FIELDS = tl.constexpr(8)
SHARED_BLOCKS = 4  # fewer key blocks in common are not worth a pass of their own
SHARED_PIECES = 16


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pieces:
    """The work of one forward pass; all that depends on lengths is on the device.

    Attributes:
        items: [W, FIELDS] int32, pieces of single sequences; unused ones are zero.
        shared_items: the same for pages shared by several sequences; None without sharing.
        spans: [B, 2] int32: where the partial results of each sequence begin, and how many it has.
        slots: partial results there may be.
        most: no sequence has more than this.
    """

    items: Tensor
    shared_items: Tensor | None
    spans: Tensor
    slots: int
    most: int


def plan_pieces(
    layout: TreeLayout,
    *,
    blocks: Blocks,
    rows: int,
    kv_heads: int,
    page_size: int,
    window: int | None,
    shared_prefix: bool,
) -> Pieces:
    """Divide the keys of all sequences into pieces that keep the GPU busy; nothing is read back.
    (Long for what it hands to the kernel.)

    Args:
        rows: query rows of a sequence and key-value head.
        shared_prefix: read what neighbouring sequences share once for all of them.
    """
    batch, device = len(layout.context_lens), layout.context_lens.device
    tree_units = triton.cdiv(layout.key_positions.shape[1], blocks.keys) * blocks.tree_cost
    programs = kv_heads * triton.cdiv(rows, blocks.rows)  # of a piece
    slots = processors(device) * blocks.per_processor
    waves = triton.cdiv(batch * programs, slots)
    target = max(batch, waves * slots // programs)
    longest = triton.cdiv(layout.max_context, blocks.keys) + tree_units
    most = max(1, min(target - batch + 1, longest))
    target = min(target, batch * most)
    items = torch.empty(target, FIELDS.value, dtype=torch.int32, device=device)
    spans = torch.empty(batch, 2, dtype=torch.int32, device=device)
    shared, shared_items, shared_pieces = None, None, 0
    if shared_prefix and batch > 1 and window is None:
        shared, shared_items, shared_pieces = _share(layout, blocks, rows, kv_heads, page_size)
    _plan_kernel[(1,)](
        items,
        spans,
        layout.context_lens,
        shared,
        batch,
        target,
        tree_units,
        window or 0,
        B_PAD=triton.next_power_of_2(batch),
        W_PAD=triton.next_power_of_2(target),
        BLOCK_N=blocks.keys,
        SHARED_PIECES=shared_pieces,
        num_warps=4,
    )
    return Pieces(
        items=items,
        shared_items=shared_items,
        spans=spans,
        slots=target + batch * shared_pieces,
        most=most + shared_pieces,
    )


def _share(
    layout: TreeLayout, blocks: Blocks, rows: int, kv_heads: int, page_size: int
) -> tuple[Tensor, Tensor, int]:
    """(shared [B] int32: key blocks that the group of each sequence shares, 0 for none; their
    pieces, as `Pieces.shared_items`; in how many pieces each group is read.)"""
    batch, device = len(layout.context_lens), layout.context_lens.device
    row_blocks = triton.cdiv(batch * rows, blocks.rows)
    slots = processors(device) * blocks.per_processor
    pieces = max(1, min(SHARED_PIECES, slots // (kv_heads * row_blocks)))
    shared = torch.empty(batch, dtype=torch.int32, device=device)
    # Every group may leave its last row block partly empty.
    count = (row_blocks + batch // 2) * pieces
    items = torch.empty(count, FIELDS.value, dtype=torch.int32, device=device)
    _share_kernel[(1,)](
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
        BLOCK_N=blocks.keys,
        LEAST=SHARED_BLOCKS,
        PIECES=pieces,
        num_warps=4,
    )
    return shared, items, pieces


@triton.jit(do_not_specialize=["batch", "target", "tree_units", "window"])
def _plan_kernel(
    items_ptr,
    spans_ptr,
    context_lens_ptr,
    shared_ptr,
    batch,
    target,
    tree_units,
    window,
    B_PAD: tl.constexpr,
    W_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARED_PIECES: tl.constexpr,
):
    offs_b = tl.arange(0, B_PAD)
    real = offs_b < batch
    context = tl.load(context_lens_ptr + offs_b, mask=real, other=0)  # [B]
    begin = tl.where(window > 0, tl.maximum(context + 1 - window, 0) // BLOCK_N, 0)
    elsewhere = tl.zeros([B_PAD], tl.int32)  # partial results of shared pages
    if shared_ptr is not None:
        begin = tl.load(shared_ptr + offs_b, mask=real, other=0)
        elsewhere = tl.where(begin > 0, SHARED_PIECES, 0)
    length = tl.where(real, tl.cdiv(context, BLOCK_N) - begin + tree_units, 0)
    pieces = tl.cdiv(length, even_share(length, target))
    pieces = tl.where(real, tl.maximum(pieces, 1), 0)  # a row without keys still wants its zeros
    item = tl.cumsum(pieces, 0) - pieces
    count = pieces + elsewhere
    slot = tl.cumsum(count, 0) - count
    tl.store(spans_ptr + 2 * offs_b, slot, mask=real)
    tl.store(spans_ptr + 2 * offs_b + 1, count, mask=real)
    clear(items_ptr, tl.sum(pieces, 0), target, W_PAD)
    for i in range(tl.max(pieces, 0)):
        from_unit = begin + i * length // tl.maximum(pieces, 1)
        to_unit = begin + (i + 1) * length // tl.maximum(pieces, 1)
        has = real & (i < pieces)
        put(items_ptr, item + i, offs_b, from_unit, to_unit, count, slot + i, 1, 0, i, has)


@triton.jit
def even_share(lengths, target):
    """The smallest length of an item with which lengths [B] make no more items than `target`."""
    longest = tl.max(lengths, 0)
    share = tl.maximum(tl.cdiv(tl.sum(lengths, 0), target), 1)
    while (tl.sum(tl.cdiv(lengths, share), 0) > target) & (share < longest):
        share += tl.maximum(share // 16, 1)
    return share


@triton.jit
def put(items_ptr, item, sequence, begin, end, count, slot, sequences, row_block, piece, mask):
    """Write items [B]; the fields are those of FIELDS."""
    item_ptr = items_ptr + FIELDS * item
    tl.store(item_ptr, sequence, mask=mask)
    tl.store(item_ptr + 1, begin, mask=mask)
    tl.store(item_ptr + 2, end, mask=mask)
    tl.store(item_ptr + 3, count, mask=mask)
    tl.store(item_ptr + 4, slot, mask=mask)
    tl.store(item_ptr + 5, sequences, mask=mask)
    tl.store(item_ptr + 6, row_block, mask=mask)
    tl.store(item_ptr + 7, piece, mask=mask)


@triton.jit
def clear(items_ptr, used, target, W_PAD: tl.constexpr):
    """Mark what is left of the list as no work."""
    offs_w = tl.arange(0, W_PAD)
    unused = (offs_w >= used) & (offs_w < target)
    for field in tl.static_range(FIELDS):
        tl.store(items_ptr + FIELDS * offs_w + field, 0, mask=unused)


@triton.jit(do_not_specialize=["batch", "rows", "columns", "target"])
def _share_kernel(
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
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Groups of neighbouring sequences that begin with the same full pages.

    Stores for each sequence the key blocks its group shares (0: none), and the list of pieces:
    every row block of a group, times PIECES.
    """
    offs_b = tl.arange(0, B_PAD)
    real = offs_b < batch
    leader, members, common = find_groups(
        page_table_ptr,
        context_lens_ptr,
        batch,
        columns,
        stride_table_b,
        LEAST * BLOCK_N,
        B_PAD,
        PAGE,
    )
    common = common // BLOCK_N
    tl.store(shared_ptr + offs_b, common, mask=real)

    leads = real & (leader == offs_b) & (members > 1)
    tiles = tl.where(leads, tl.cdiv(members * rows, BLOCK_M), 0)
    first = (tl.cumsum(tiles, 0) - tiles) * PIECES
    clear(items_ptr, tl.sum(tiles, 0) * PIECES, target, W_PAD)
    for tile in range(tl.max(tiles, 0)):
        has = leads & (tile < tiles)
        for piece in range(PIECES):
            item = first + piece * tiles + tile
            begin = piece * common // PIECES
            end = (piece + 1) * common // PIECES
            count = PIECES + 1
            put(items_ptr, item, offs_b, begin, end, count, 0, members, tile, piece, has)


@triton.jit
def find_groups(
    page_table_ptr,
    context_lens_ptr,
    batch,
    columns,
    stride_table_b,
    least,
    B_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """(the first sequence of the group of each, [B]; how many its group has; keys in full pages
    that all of them begin with, 0 in a group of one.) Neighbours with fewer than `least` in common
    are of different groups."""
    COLUMNS: tl.constexpr = 32
    offs_b = tl.arange(0, B_PAD)
    offs_p = tl.arange(0, COLUMNS)
    later = (offs_b > 0) & (offs_b < batch)
    context = tl.load(context_lens_ptr + offs_b, mask=offs_b < batch, other=0)
    before = tl.load(context_lens_ptr + offs_b - 1, mask=later, other=0)
    full = tl.minimum(context, before) // PAGE  # [B] full pages, no more than that are compared
    same = full  # full pages in common with the sequence before
    table_ptr = page_table_ptr + offs_b.to(tl.int64) * stride_table_b
    for start in range(0, tl.minimum(tl.max(full, 0), columns), COLUMNS):
        page = start + offs_p
        compared = later[:, None] & (page[None, :] < full[:, None])
        own = tl.load(table_ptr[:, None] + page, mask=compared, other=0)
        other = tl.load(table_ptr[:, None] + page - stride_table_b, mask=compared, other=0)
        differs = tl.where(compared & (own != other), page[None, :], columns)
        same = tl.minimum(same, tl.min(differs, 1))
    keys = tl.where(later, same * PAGE, 0)
    linked = keys >= least
    # [B, B]: a sequence, and a candidate for the first of its group or another member of it
    heads = (offs_b[None, :] <= offs_b[:, None]) & (tl.where(linked, 0, 1)[None, :] > 0)
    leader = tl.max(tl.where(heads, offs_b[None, :], 0), 1)
    together = (leader[:, None] == leader[None, :]) & (offs_b < batch)[None, :]
    members = tl.sum(together.to(tl.int32), 1)
    shared = tl.where(together & linked[None, :], keys[None, :], columns * PAGE)
    common = tl.where(members > 1, tl.min(shared, 1), 0)
    return leader, members, common
