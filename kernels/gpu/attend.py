"""Tree attention over paged keys and values.

Query heads of a group and nodes of a tree make up the rows of one matrix product, so a page is
read once for all of them. The context is split into pieces that run side by side; it needs no mask
but at its end. The tree's own keys follow the context, masked by packed ancestor bits. Where a
sequence has several pieces, each leaves a normalised partial result and its log-sum-exp, and a
second kernel merges them (flash-decoding, Dao et al. 2023; packing the heads of a group and
sharing prefixes as in FlashInfer, Ye et al. 2025, section 3).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.gpu.blocks import Blocks, choose_blocks
from specdec.kernels.gpu.plan import FIELDS, Pieces, plan_pieces
from specdec.kernels.layout import TreeLayout

LOG2_E = tl.constexpr(1.4426950408889634)
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


def tree_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_tree: Tensor,
    value_tree: Tensor,
    layout: TreeLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    fixed_splits: int | None = None,
    shared_prefix: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `reference.tree_attention`, for queries that do not stand before the end of the context.

    Args:
        blocks: launch parameters, for tuning; None chooses them by the shape.

    Raises:
        ValueError: a type that has no kernels, or a scale that is not positive.
    """
    batch, query_heads, nodes, key_dim = query.shape
    kv_heads, page_size, value_dim = key_pages.shape[1], key_pages.shape[2], value_pages.shape[3]
    if query.dtype not in SUPPORTED:
        raise ValueError(
            f"kernels.impl=triton: no kernels for {query.dtype}; use kernels=reference"
        )
    if scale <= 0:
        raise ValueError(f"scale={scale}: must be positive")
    out = query.new_empty(batch, nodes, query_heads, value_dim)
    if not out.numel():
        return out
    group = query_heads // kv_heads
    rows = group * nodes
    if blocks is None:
        plain = key_pages.dtype == query.dtype
        plain = plain and key_pages.is_contiguous() and value_pages.is_contiguous()
        blocks = choose_blocks(
            rows=rows,
            head_dim=max(key_dim, value_dim),
            dtype=query.dtype,
            page_size=page_size,
            plain=plain,
        )
    pieces: Pieces = layout.remember(
        ("pieces", blocks, rows, kv_heads, page_size, window, fixed_splits, shared_prefix),
        lambda: plan_pieces(
            layout,
            blocks=blocks,
            rows=rows,
            kv_heads=kv_heads,
            page_size=page_size,
            window=window,
            fixed_splits=fixed_splits,
            shared_prefix=shared_prefix,
        ),
    )
    row_blocks = triton.cdiv(rows, blocks.rows)
    padded_rows = row_blocks * blocks.rows
    partial, partial_lse = None, None
    if pieces.most > 1:
        partial, partial_lse = layout.remember(
            ("partial", pieces.slots, kv_heads, padded_rows, value_dim),
            lambda: _partials(pieces, kv_heads, padded_rows, value_dim),
        )
    interpreting = triton.knobs.runtime.interpret
    ancestors = layout.ancestors
    passes = [(pieces.items, row_blocks, False)]
    if pieces.shared_items is not None:
        passes.insert(0, (pieces.shared_items, 1, True))
    for items, blocks_of_an_item, shared in passes:
        _attention_kernel[(len(items) * kv_heads * blocks_of_an_item,)](
            out,
            partial,
            partial_lse,
            query,
            key_pages,
            value_pages,
            _descriptor(key_pages, blocks),
            _descriptor(value_pages, blocks),
            key_tree,
            value_tree,
            key_scales,
            value_scales,
            sinks,
            items,
            pieces.spans,
            layout.page_table,
            layout.context_lens,
            layout.positions,
            layout.key_positions,
            ancestors,
            scale,
            window or 0,
            softcap or 0.0,
            rows,
            blocks_of_an_item,
            padded_rows,
            layout.key_positions.shape[1],
            layout.first,
            *query.stride()[:3],
            *key_pages.stride()[:2],
            *value_pages.stride()[:2],
            *key_tree.stride()[:2],
            *value_tree.stride()[:2],
            *((0, 0) if key_scales is None else key_scales.stride()[:2]),
            layout.page_table.stride(0),
            *layout.positions.stride(),
            *layout.key_positions.stride(),
            *((0, 0) if ancestors is None else ancestors.stride()[:2]),
            KEY_STEP=key_pages.stride(2),
            VALUE_STEP=value_pages.stride(2),
            KEY_TREE_STEP=key_tree.stride(2),
            VALUE_TREE_STEP=value_tree.stride(2),
            KV_HEADS=kv_heads,
            GROUP=group,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEY_PAD=_padded(key_dim),
            VALUE_PAD=_padded(value_dim),
            PAGE=page_size,
            BLOCK_M=blocks.rows,
            BLOCK_N=blocks.keys,
            TREE_BLOCK=blocks.tree_keys,
            TREE_COST=blocks.tree_cost,
            STAGES=blocks.stages,
            BULK=blocks.bulk,
            SHARED=shared,
            CAUSAL=ancestors is None,
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else None,
            UPCAST=interpreting and query.dtype == torch.bfloat16,
            OVERLAP=pieces.most > 1 and not shared and not interpreting,
            num_warps=blocks.warps,
        )
    if partial is not None:
        all_rows = rows * kv_heads * batch
        block = max(1, min(16, triton.next_power_of_2(min(all_rows // 2048, rows))))
        width = _padded(value_dim)
        warps = max(1, min(4, block * width // 128))
        elements = max(4, block * width // (32 * warps))  # of a thread and piece
        most = triton.next_power_of_2(pieces.most)
        _merge_kernel[(triton.cdiv(rows, block), kv_heads, batch)](
            out,
            partial,
            partial_lse,
            sinks,
            pieces.spans,
            rows,
            padded_rows,
            KV_HEADS=kv_heads,
            GROUP=group,
            VALUE_DIM=value_dim,
            VALUE_PAD=width,
            PIECES=most,
            AT_ONCE=min(max(1, 64 // elements), most),
            BLOCK_R=block,
            OVERLAP=not interpreting,
            num_warps=warps,
            launch_pdl=not interpreting,
        )
    return out


def _descriptor(pages: Tensor, blocks: Blocks) -> TensorDescriptor | None:
    """The rows of all pages for the bulk copy engine."""
    if not blocks.bulk:
        return None
    rows = pages.view(-1, pages.shape[-1])
    return TensorDescriptor.from_tensor(rows, [blocks.keys, _padded(pages.shape[-1])])


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _partials(
    pieces: Pieces, kv_heads: int, padded_rows: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Workspace for unmerged results and their log-sum-exp, shared by all layers of a pass."""
    shape, device = (pieces.slots, kv_heads, padded_rows), pieces.items.device
    partial = torch.empty(*shape, value_dim, dtype=torch.float32, device=device)
    return partial, torch.empty(shape, dtype=torch.float32, device=device)


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
def _attention_kernel(
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
):
    """One row block and key-value head over one piece of the keys.

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
    query_rows = (
        query_ptr
        + owner * stride_query_b
        + query_head.to(tl.int64) * stride_query_h
        + node * stride_query_n
    )
    query = _load(query_rows[:, None] + offs_k, real[:, None], offs_k, KEY_DIM)  # [BM, DK]
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
        if PAGE % BLOCK_N == 0:
            page = tl.load(page_table_ptr + block * BLOCK_N // PAGE)
            within = block * BLOCK_N % PAGE
        else:
            page = tl.load(page_table_ptr + (block * BLOCK_N + offs_n) // PAGE)  # [BN]
            within = (block * BLOCK_N + offs_n) % PAGE
        if BULK:
            keys = key_desc.load([(page * KV_HEADS + head) * PAGE + within, 0])  # [BN, DK]
            values = value_desc.load([(page * KV_HEADS + head) * PAGE + within, 0])  # [BN, DV]
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
            keys = _load(key_block_ptr, None, offs_k, KEY_DIM)
            values = _load(value_block_ptr, None, offs_v, VALUE_DIM)
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
        acc, peak, mass = _absorb(
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
            keys = _load(key_rows_ptr[:, None] + offs_k, inside[:, None], offs_k, KEY_DIM)
            value_rows_ptr = value_ptr + page * stride_value_page + within * VALUE_STEP
            values = _load(value_rows_ptr[:, None] + offs_v, inside[:, None], offs_v, VALUE_DIM)
            key_scales, value_scales = None, None
            if key_scale_ptr is not None:
                scale_rows = page * stride_scale_page + head * stride_scale_h + within
                key_scales = tl.load(key_scale_ptr + scale_rows, mask=inside, other=0.0)
                value_scales = tl.load(value_scale_ptr + scale_rows, mask=inside, other=0.0)
            seen = inside[None, :]
            if WINDOW:
                seen = seen & (index[None, :] > position[:, None] - window)
            acc, peak, mass = _absorb(
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
            keys = _load(key_rows_ptr + offs_k, used[:, None], offs_k, KEY_DIM)
            value_rows_ptr = value_tree_ptr + index[:, None] * VALUE_TREE_STEP
            values = _load(value_rows_ptr + offs_v, used[:, None], offs_v, VALUE_DIM)
            acc, peak, mass = _absorb(
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
def _load(pointers, rows, columns, WIDTH: tl.constexpr):
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
def _absorb(
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
        weights *= value_scales[None, :]
    acc = tl.dot(weights.to(query.dtype), values.to(query.dtype), acc, input_precision=PRECISION)
    return acc, higher, mass


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def _merge_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    sink_ptr,
    span_ptr,
    rows,
    padded_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PIECES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weigh the partial results of some rows of a sequence by the exponential of their
    log-sum-exp."""
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(span_ptr + 2 * sequence).to(tl.int64)
    pieces = tl.load(span_ptr + 2 * sequence + 1)
    if pieces == 1:
        return
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_v = tl.arange(0, VALUE_PAD)
    offs_p = tl.arange(0, PIECES)
    real = offs_r < rows
    query_head = head * GROUP + offs_r % GROUP
    step = tl.cast(KV_HEADS * padded_rows, tl.int64)  # from one piece to the next
    place = (slot * KV_HEADS + head) * padded_rows + offs_r  # [BR]
    lse = tl.load(
        lse_ptr + place + offs_p[:, None] * step,
        mask=(offs_p < pieces)[:, None] & real,
        other=float("-inf"),
    )  # [P, BR]
    peak = tl.max(lse, 0)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + query_head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(tl.exp2(lse - peak), 0)
    if sink_ptr is not None:
        mass += tl.exp2(sink - peak)
    total = peak + tl.log2(tl.where(mass > 0, mass, 1.0))
    acc = tl.zeros([BLOCK_R, VALUE_PAD], tl.float32)
    for base in range(0, pieces, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # independent loads, all on their way together
            here = place + (base + i) * step
            there = real & (tl.full([BLOCK_R], base + i, tl.int32) < pieces)
            share = tl.load(lse_ptr + here, mask=there, other=float("-inf"))
            partial = tl.load(
                partial_ptr + here[:, None] * VALUE_DIM + offs_v,
                mask=there[:, None] & (offs_v < VALUE_DIM),
                other=0.0,
            )
            acc += tl.exp2(share - total)[:, None] * partial
    node = (offs_r // GROUP).to(tl.int64)
    out_rows = (sequence * (rows // GROUP) + node) * (KV_HEADS * GROUP) + query_head
    tl.store(
        out_ptr + out_rows[:, None] * VALUE_DIM + offs_v,
        acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (offs_v < VALUE_DIM),
    )
