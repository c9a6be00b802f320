"""The keys that queries have in common, in pieces of fixed borders."""

import triton
import triton.language as tl

from specdec.kernels.exact.pieces import (
    first_piece,
    piece_start,
    tail_begin,
)
from specdec.kernels.gpu.attention import absorb, load_block, read_block
from specdec.kernels.gpu.plan import FIELDS


@triton.jit(
    do_not_specialize=[
        "window",
        "rows",
        "row_blocks",
        "start_node",
        "last",
        "stride_table_b",
        "stride_position_b",
        "stride_position_n",
    ]
)
def context_kernel(
    partial_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    key_tree_ptr,
    value_tree_ptr,
    key_scale_ptr,
    value_scale_ptr,
    item_ptr,
    span_ptr,
    page_table_ptr,
    context_lens_ptr,
    position_ptr,
    scale,
    window,
    softcap,
    rows,
    row_blocks,
    start_node,
    last,
    stride_query_b,
    stride_query_h,
    stride_query_n,
    stride_key_page,
    stride_key_h,
    stride_value_page,
    stride_value_h,
    stride_key_tree_b,
    stride_key_tree_h,
    stride_value_tree_b,
    stride_value_tree_h,
    stride_scale_page,
    stride_scale_h,
    stride_table_b,
    stride_position_b,
    stride_position_n,
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    KEY_TREE_STEP: tl.constexpr,
    VALUE_TREE_STEP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BULK: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row block and key-value head over some pieces, each of which leaves a partial result.

    A block of keys beyond a query's reach leaves what is known of the query as it is, to the bit.
    With CAUSAL keys of the scratch are read too, for the later queries of a long chain.
    """
    head = tl.program_id(0) // row_blocks % KV_HEADS
    item_ptr += tl.program_id(0) // (row_blocks * KV_HEADS) * FIELDS
    sequence = tl.load(item_ptr).to(tl.int64)
    from_piece = tl.load(item_ptr + 1)
    to_piece = tl.load(item_ptr + 2)
    context = tl.load(context_lens_ptr + sequence)
    end = tail_begin(context + last) // BLOCK_N  # blocks of keys that some query reads here
    row_block = tl.program_id(0) % row_blocks
    if SHARED:
        row_block = tl.load(item_ptr + 6)
    offs_r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = offs_r
    owner = sequence
    real = offs_r < rows
    if SHARED:
        row = offs_r % rows
        owner = sequence + offs_r // rows  # [BM]
        real = offs_r < rows * tl.load(item_ptr + 5)
        slot = tl.load(span_ptr + 2 * owner, mask=real, other=0).to(tl.int64)
    else:
        slot = tl.load(span_ptr + 2 * sequence).to(tl.int64)
        slot -= first_piece(context, window)
    node = (start_node + row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    offs_k = tl.arange(0, KEY_PAD)
    offs_v = tl.arange(0, VALUE_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    position_rows = position_ptr + owner * stride_position_b + node * stride_position_n
    position = tl.load(position_rows, mask=real, other=0)
    reach = tail_begin(position) // BLOCK_N  # [BM]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if OVERLAP:  # the tails read what was there before this kernel, and run beside it
        tl.extra.cuda.gdc_launch_dependents()
    query_rows = (
        query_ptr
        + owner * stride_query_b
        + query_head.to(tl.int64) * stride_query_h
        + node * stride_query_n
    )
    query = load_block(query_rows[:, None] + offs_k, real[:, None], offs_k, KEY_DIM)  # [BM, DK]
    if UPCAST:
        query = query.to(tl.float32)
    page_table_ptr += sequence * stride_table_b
    key_ptr += head.to(tl.int64) * stride_key_h
    value_ptr += head.to(tl.int64) * stride_value_h
    if CAUSAL:
        key_tree_ptr += sequence * stride_key_tree_b + head.to(tl.int64) * stride_key_tree_h
        value_tree_ptr += sequence * stride_value_tree_b + head.to(tl.int64) * stride_value_tree_h

    for number in range(to_piece - from_piece):
        piece = from_piece + number
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
        begin = piece_start(piece) // BLOCK_N
        stop = tl.minimum(piece_start(piece + 1) // BLOCK_N, end)
        whole = tl.minimum(stop, context // BLOCK_N)
        for block in tl.range(begin, whole, num_stages=STAGES):
            keys, values, page, within = read_block(
                block,
                key_ptr,
                value_ptr,
                key_desc,
                value_desc,
                page_table_ptr,
                head,
                offs_n,
                offs_k,
                offs_v,
                stride_key_page,
                stride_value_page,
                KEY_STEP,
                VALUE_STEP,
                KV_HEADS,
                KEY_DIM,
                VALUE_DIM,
                PAGE,
                BLOCK_N,
                BULK,
            )
            key_scales, value_scales = None, None
            if key_scale_ptr is not None:
                if PAGE % BLOCK_N == 0:
                    within += offs_n
                scale_rows = page * stride_scale_page + head * stride_scale_h + within
                key_scales = tl.load(key_scale_ptr + scale_rows)
                value_scales = tl.load(value_scale_ptr + scale_rows)
            seen = block < reach[:, None]
            if WINDOW:
                seen &= block * BLOCK_N + offs_n[None, :] > position[:, None] - window
            acc, peak, mass = absorb(
                acc,
                peak,
                mass,
                query,
                keys,
                values,
                key_scales,
                value_scales,
                seen,
                scale,
                softcap,
                SOFTCAP,
                PRECISION,
            )
        if CAUSAL:
            for block in tl.range(tl.maximum(begin, whole), stop, num_stages=1):
                index = block * BLOCK_N + offs_n
                keys, values = gather(
                    index,
                    index < context,
                    index - context,
                    index >= context,
                    key_ptr,
                    value_ptr,
                    key_tree_ptr,
                    value_tree_ptr,
                    key_scale_ptr,
                    value_scale_ptr,
                    page_table_ptr,
                    head,
                    stride_key_page,
                    stride_value_page,
                    stride_scale_page,
                    stride_scale_h,
                    KEY_STEP,
                    VALUE_STEP,
                    KEY_TREE_STEP,
                    VALUE_TREE_STEP,
                    KEY_DIM,
                    VALUE_DIM,
                    KEY_PAD,
                    VALUE_PAD,
                    PAGE,
                    UPCAST,
                    False,  # registers are too few
                )
                seen = block < reach[:, None]
                if WINDOW:
                    seen &= index[None, :] > position[:, None] - window
                acc, peak, mass = absorb(
                    acc,
                    peak,
                    mass,
                    query,
                    keys,
                    values,
                    None,
                    None,
                    seen,
                    scale,
                    softcap,
                    SOFTCAP,
                    PRECISION,
                )
        inverse = 1.0 / tl.where(mass > 0, mass, 1.0)
        place = ((slot + piece) * KV_HEADS + head) * rows + row
        tl.store(
            partial_ptr + place[:, None] * VALUE_DIM + offs_v,
            acc * inverse[:, None],
            mask=real[:, None] & (offs_v < VALUE_DIM),
        )
        lse = peak + tl.log2(tl.where(mass > 0, mass, 1.0))
        tl.store(lse_ptr + place, lse, mask=real)


@triton.jit
def gather(
    index,  # [K] positions
    in_pages,  # [K]
    scratch_row,  # [K]
    in_scratch,  # [K]
    key_ptr,
    value_ptr,
    key_tree_ptr,
    value_tree_ptr,
    key_scale_ptr,
    value_scale_ptr,
    page_table_ptr,
    head,
    stride_key_page,
    stride_value_page,
    stride_scale_page,
    stride_scale_h,
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    KEY_TREE_STEP: tl.constexpr,
    VALUE_TREE_STEP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_LOAD: tl.constexpr,
):
    """Keys and values [K, D] one by one, from pages or the scratch, in the type of the scratch:
    pages of a quantised type hold a power of two times the same numbers.

    Args:
        ONE_LOAD: rows begin at multiples of 16 bytes, so that one load may read either.
    """
    page = tl.load(page_table_ptr + index // PAGE, mask=in_pages, other=0).to(tl.int64)
    within = index % PAGE
    row = scratch_row.to(tl.int64)
    key_scales, value_scales = None, None
    if key_scale_ptr is not None:
        scale_rows = page * stride_scale_page + head * stride_scale_h + within
        key_scales = tl.load(key_scale_ptr + scale_rows, mask=in_pages, other=0.0)
        value_scales = tl.load(value_scale_ptr + scale_rows, mask=in_pages, other=0.0)
    keys = _either(
        key_ptr + page * stride_key_page + within * KEY_STEP,
        in_pages,
        key_tree_ptr + row * KEY_TREE_STEP,
        in_scratch,
        key_scales,
        KEY_DIM,
        KEY_PAD,
        UPCAST,
        ONE_LOAD,
    )
    values = _either(
        value_ptr + page * stride_value_page + within * VALUE_STEP,
        in_pages,
        value_tree_ptr + row * VALUE_TREE_STEP,
        in_scratch,
        value_scales,
        VALUE_DIM,
        VALUE_PAD,
        UPCAST,
        ONE_LOAD,
    )
    return keys, values


@triton.jit
def _either(
    page_rows,
    in_pages,
    tree_rows,
    in_scratch,
    scales,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_LOAD: tl.constexpr,
):
    """[K, PAD], zeros in rows that are nowhere."""
    columns = tl.arange(0, PAD)
    if ONE_LOAD and page_rows.dtype == tree_rows.dtype:  # two loads wait for one another
        rows = tl.multiple_of(tl.where(in_scratch, tree_rows, page_rows), 16)
        return load_block(rows[:, None] + columns, (in_pages | in_scratch)[:, None], columns, DIM)
    block = load_block(page_rows[:, None] + columns, in_pages[:, None], columns, DIM)
    if scales is not None:
        dtype: tl.constexpr = tree_rows.dtype.element_ty
        # Powers of two: the product is exact in the type itself, if that has their range.
        wide: tl.constexpr = dtype if dtype == tl.bfloat16 and not UPCAST else tl.float32
        block = (block.to(wide) * scales.to(wide)[:, None]).to(dtype)
    mask = in_scratch[:, None] & (columns < DIM)[None, :]
    return tl.load(tree_rows[:, None] + columns, mask=mask, other=block)
