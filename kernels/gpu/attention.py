"""The attention kernel: rows of queries over a piece of their keys."""

import triton
import triton.language as tl

from specdec.kernels.gpu.plan import FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)


# Strides of small index tensors vary with the shape of a tree: not worth a kernel each.
@triton.jit(
    do_not_specialize=[
        "window",
        "rows",
        "row_blocks",
        "padded_rows",
        "key_rows",
        "first",
        "stride_table_b",
        "stride_position_b",
        "stride_position_n",
        "stride_key_position_b",
        "stride_key_position_m",
        "stride_ancestor_b",
        "stride_ancestor_n",
    ]
)
def attention_kernel(
    out_ptr,
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
    sink_ptr,
    item_ptr,
    span_ptr,
    page_table_ptr,
    context_lens_ptr,
    position_ptr,
    key_position_ptr,
    ancestor_ptr,
    scale,
    window,
    softcap,
    rows,
    row_blocks,
    padded_rows,
    key_rows,
    first,
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
    stride_key_position_b,
    stride_key_position_m,
    stride_ancestor_b,
    stride_ancestor_n,
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
    TREE_BLOCK: tl.constexpr,
    TREE_COST: tl.constexpr,
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
    """One row block and key-value head over one piece of the keys.

    With EARLY it may start while the kernel before it is at work, which can have made the queries
    and the scratch, but nothing else.

    With SHARED the rows are those of several sequences, and the piece lies in pages they share.
    """
    # Row blocks of the same keys are neighbours, so that they find them in the L2 cache.
    head = tl.program_id(0) // row_blocks % KV_HEADS
    item_ptr += tl.program_id(0) // (row_blocks * KV_HEADS) * FIELDS
    sequence = tl.load(item_ptr).to(tl.int64)
    begin = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    count = tl.load(item_ptr + 3)
    slot = tl.load(item_ptr + 4).to(tl.int64)
    context = tl.load(context_lens_ptr + sequence)
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
        span_ptr += 2 * owner
        slot = tl.load(span_ptr, mask=real, other=0) + tl.load(span_ptr + 1, mask=real, other=0)
        slot = slot.to(tl.int64) - count + 1 + tl.load(item_ptr + 7)  # the last of the sequence
    node = (row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    offs_k = tl.arange(0, KEY_PAD)
    offs_v = tl.arange(0, VALUE_PAD)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    query_rows = (
        query_ptr
        + owner * stride_query_b
        + query_head.to(tl.int64) * stride_query_h
        + node * stride_query_n
    )
    query = load_block(query_rows[:, None] + offs_k, real[:, None], offs_k, KEY_DIM)  # [BM, DK]
    if UPCAST:
        query = query.to(tl.float32)
    position = tl.zeros([BLOCK_M], tl.int64)
    if WINDOW:
        position_rows = position_ptr + sequence * stride_position_b + node * stride_position_n
        position = tl.load(position_rows, mask=real, other=0)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of scores, base 2
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    page_table_ptr += sequence * stride_table_b
    key_ptr += head.to(tl.int64) * stride_key_h
    value_ptr += head.to(tl.int64) * stride_value_h
    offs_n = tl.arange(0, BLOCK_N)

    # Whole blocks of the context.
    whole = tl.minimum(end, context // BLOCK_N)
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
        seen = None
        if WINDOW:
            seen = block * BLOCK_N + offs_n[None, :] > position[:, None] - window
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

    if not SHARED:
        # What is left of the context: the rest of its last page may hold anything.
        offs_t = tl.arange(0, TREE_BLOCK)
        rest = tl.maximum(begin, whole) * BLOCK_N
        rest_end = tl.minimum(end * BLOCK_N, context)
        for start in tl.range(rest, rest_end, TREE_BLOCK, num_stages=STAGES):
            index = start + offs_t  # [BT]
            inside = index < context
            page = tl.load(page_table_ptr + index // PAGE, mask=inside, other=0).to(tl.int64)
            within = index % PAGE
            key_rows_ptr = key_ptr + page * stride_key_page + within * KEY_STEP
            keys = load_block(key_rows_ptr[:, None] + offs_k, inside[:, None], offs_k, KEY_DIM)
            value_rows_ptr = value_ptr + page * stride_value_page + within * VALUE_STEP
            values = load_block(
                value_rows_ptr[:, None] + offs_v, inside[:, None], offs_v, VALUE_DIM
            )
            key_scales, value_scales = None, None
            if key_scale_ptr is not None:
                scale_rows = page * stride_scale_page + head * stride_scale_h + within
                key_scales = tl.load(key_scale_ptr + scale_rows, mask=inside, other=0.0)
                value_scales = tl.load(value_scale_ptr + scale_rows, mask=inside, other=0.0)
            seen = inside[None, :]
            if WINDOW:
                seen = seen & (index[None, :] > position[:, None] - window)
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

        # The tree.
        context_blocks = tl.cdiv(context, BLOCK_N)
        tree_begin = tl.cdiv(tl.maximum(begin - context_blocks, 0), TREE_COST) * BLOCK_N
        tree_end = tl.cdiv(tl.maximum(end - context_blocks, 0), TREE_COST) * BLOCK_N
        tree_end = tl.minimum(tree_end, key_rows)
        if CAUSAL:
            last_node = (tl.minimum(row_block * BLOCK_M + BLOCK_M, rows) - 1) // GROUP
            tree_end = tl.minimum(tree_end, first + last_node + 1)
        key_tree_ptr += sequence * stride_key_tree_b + head.to(tl.int64) * stride_key_tree_h
        value_tree_ptr += sequence * stride_value_tree_b + head.to(tl.int64) * stride_value_tree_h
        for start in tl.range(tree_begin, tree_end, TREE_BLOCK, num_stages=1):
            index = start + offs_t  # [BT]
            used = index < tree_end
            if CAUSAL:
                seen = index[None, :] <= first + node[:, None]
            else:
                word_ptr = ancestor_ptr + sequence * stride_ancestor_b + node * stride_ancestor_n
                word = tl.load(word_ptr + start // 32, mask=real, other=0) >> start % 32  # [BM]
                seen = (word[:, None] >> offs_t[None, :]) & 1 != 0
                # Rows that nobody sees may hold anything, and a weight of zero does not silence
                # a NaN.
                used = used & ((tl.reduce_or(word, 0) >> offs_t) & 1 != 0)
            if WINDOW:
                key_position = tl.load(
                    key_position_ptr
                    + sequence * stride_key_position_b
                    + index * stride_key_position_m,
                    mask=used,
                    other=0,
                )
                seen = seen & (key_position[None, :] > position[:, None] - window)
            key_rows_ptr = key_tree_ptr + index[:, None] * KEY_TREE_STEP
            keys = load_block(key_rows_ptr + offs_k, used[:, None], offs_k, KEY_DIM)
            value_rows_ptr = value_tree_ptr + index[:, None] * VALUE_TREE_STEP
            values = load_block(value_rows_ptr + offs_v, used[:, None], offs_v, VALUE_DIM)
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

    if OVERLAP:  # the merge may take its places now; it waits for the results
        tl.extra.cuda.gdc_launch_dependents()
    stored = real[:, None] & (offs_v < VALUE_DIM)
    inverse = 1.0 / tl.where(mass > 0, mass, 1.0)
    if partial_ptr is not None and count > 1:
        place = (slot * KV_HEADS + head) * padded_rows + row
        tl.store(
            partial_ptr + place[:, None] * VALUE_DIM + offs_v, acc * inverse[:, None], mask=stored
        )
        lse = peak + tl.log2(tl.where(mass > 0, mass, 1.0))
        tl.store(lse_ptr + place, lse, mask=real)
    if count == 1:
        if sink_ptr is not None:
            sink = tl.load(sink_ptr + query_head, mask=real, other=0.0).to(tl.float32) * LOG2_E
            higher = tl.maximum(peak, sink)
            shrink = tl.exp2(peak - higher)
            inverse = shrink / (mass * shrink + tl.exp2(sink - higher))
        out_rows = (sequence * (rows // GROUP) + node) * (KV_HEADS * GROUP) + query_head
        tl.store(
            out_ptr + out_rows[:, None] * VALUE_DIM + offs_v,
            (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
            mask=stored,
        )


@triton.jit
def read_block(
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
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
):
    """A whole block of the context: keys [BN, DK] and values [BN, DV], in which page it lies and
    where in that, or [BN] of each where a page is no multiple of a block."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(page_table_ptr + block * BLOCK_N // PAGE)
        within = block * BLOCK_N % PAGE
    else:
        page = tl.load(page_table_ptr + (block * BLOCK_N + offs_n) // PAGE)  # [BN]
        within = (block * BLOCK_N + offs_n) % PAGE
    if BULK:
        keys = key_desc.load([(page * KV_HEADS + head) * PAGE + within, 0])
        values = value_desc.load([(page * KV_HEADS + head) * PAGE + within, 0])
        page = page.to(tl.int64)
    else:
        page = page.to(tl.int64)
        key_rows_ptr = key_ptr + page * stride_key_page + within * KEY_STEP
        value_rows_ptr = value_ptr + page * stride_value_page + within * VALUE_STEP
        if PAGE % BLOCK_N == 0:  # offsets within a page are constants
            key_block_ptr = key_rows_ptr + offs_n[:, None] * KEY_STEP + offs_k
            value_block_ptr = value_rows_ptr + offs_n[:, None] * VALUE_STEP + offs_v
        else:
            key_block_ptr = key_rows_ptr[:, None] + offs_k
            value_block_ptr = value_rows_ptr[:, None] + offs_v
        keys = load_block(key_block_ptr, None, offs_k, KEY_DIM)
        values = load_block(value_block_ptr, None, offs_v, VALUE_DIM)
    return keys, values, page, within


@triton.jit
def load_block(pointers, rows, columns, WIDTH: tl.constexpr):
    """A block of rows of WIDTH elements; rows is a mask [R, 1] or None for all."""
    PADDED: tl.constexpr = columns.shape[0]
    if rows is None:
        if PADDED == WIDTH:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        block = tl.load(pointers, mask=rows & (columns < WIDTH)[None, :], other=0.0)
    return block


@triton.jit
def absorb(
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
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax: take a block of keys and values [BN, D] into accumulator [BM, DV], running
    maximum and mass [BM]. `seen` is [BM, BN], or None for all of them."""
    scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision=PRECISION)
    if key_scales is not None:
        scores *= key_scales[None, :]
    if SOFTCAP:
        # tanh by exp: 1 - 2 / (exp(2 x) + 1) is right at both ends
        grown = tl.exp2(scores * (scale / softcap * 2.0 * LOG2_E))
        scores = softcap * (1.0 - 2.0 / (grown + 1.0))
        factor = LOG2_E
    else:
        factor = scale * LOG2_E  # positive, so the maximum may come first: one multiply-add each
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    base = higher
    if seen is not None:  # a row that has seen nothing yet: -inf - -inf is NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if value_scales is not None:
        if query.dtype == tl.float16:  # weights times small scales would fall below its range
            values = values.to(tl.float32) * value_scales[:, None]
        else:
            weights *= value_scales[None, :]
    acc = tl.dot(weights.to(query.dtype), values.to(query.dtype), acc, input_precision=PRECISION)
    return acc, higher, mass
