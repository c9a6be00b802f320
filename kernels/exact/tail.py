"""The keys next to a query, its own path among them: each query reads them by itself.

They are read in the order of their positions, of which every slot of the tile stands for one, so
that it does not matter whether a key lies in a page or in the scratch, nor what else does.
"""

import triton
import triton.language as tl

from specdec.kernels.exact.context import gather
from specdec.kernels.exact.pieces import tail_begin
from specdec.kernels.gpu.attention import absorb, load_block

NOWHERE = tl.constexpr(-1)


@triton.jit(
    do_not_specialize=[
        "nodes",
        "key_rows",
        "first",
        "stride_position_b",
        "stride_position_n",
        "stride_key_position_b",
        "stride_key_position_m",
        "stride_ancestor_b",
        "stride_ancestor_n",
    ]
)
def locate_kernel(
    place_ptr,  # [B, N, SLOTS]
    position_ptr,
    key_position_ptr,
    ancestor_ptr,
    context_lens_ptr,
    nodes,
    key_rows,
    first,
    stride_position_b,
    stride_position_n,
    stride_key_position_b,
    stride_key_position_m,
    stride_ancestor_b,
    stride_ancestor_n,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The scratch rows that stand at the positions of one query's slots: NOWHERE before the
    scratch, and behind the query."""
    node, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr + sequence * stride_position_b + node * stride_position_n)
    context = tl.load(context_lens_ptr + sequence)
    index = tail_begin(position) + tl.arange(0, SLOTS)
    if CAUSAL:
        row = (index - context).to(tl.int32)
        row = tl.where((row >= 0) & (row <= first + node), row, NOWHERE)
    else:
        row = tl.full([SLOTS], NOWHERE, tl.int32)
        ancestor_ptr += sequence * stride_ancestor_b + node.to(tl.int64) * stride_ancestor_n
        offs = tl.arange(0, 32)
        for word in range(WORDS):
            bits = tl.load(ancestor_ptr + word) >> offs & 1
            rows = word * 32 + offs
            seen = (bits != 0) & (rows < key_rows)
            there = key_position_ptr + sequence * stride_key_position_b
            there = tl.load(there + rows * stride_key_position_m, mask=seen, other=-1)
            found = tl.where(there[None, :] == index[:, None], rows[None, :], NOWHERE)
            row = tl.maximum(row, tl.max(found, 1))
    place_ptr += (sequence * nodes + node) * SLOTS
    tl.store(place_ptr + tl.arange(0, SLOTS), row)


@triton.jit(
    do_not_specialize=[
        "window",
        "rows",
        "nodes",
        "start_node",
        "stride_table_b",
        "stride_position_b",
        "stride_position_n",
    ]
)
def tail_kernel(
    partial_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_tree_ptr,
    value_tree_ptr,
    key_scale_ptr,
    value_scale_ptr,
    place_ptr,  # [B, N, SLOTS]
    span_ptr,
    page_table_ptr,
    context_lens_ptr,
    position_ptr,
    scale,
    window,
    softcap,
    rows,
    nodes,
    start_node,
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
    GROUP_PAD: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_LOAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One query of a sequence, with the heads of one group.

    It starts beside the kernel of the pieces, whose programs began when queries and scratch were
    there, and ends after it, so that whoever waits for this one has waited for both.
    """
    node, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    offs_g = tl.arange(0, GROUP_PAD)
    offs_k = tl.arange(0, KEY_PAD)
    offs_v = tl.arange(0, VALUE_PAD)
    real = offs_g < GROUP
    at = (start_node + node).to(tl.int64)
    position = tl.load(position_ptr + sequence * stride_position_b + at * stride_position_n)
    context = tl.load(context_lens_ptr + sequence)
    begin = tail_begin(position)
    place_ptr += (sequence * nodes + at) * SLOTS
    if OVERLAP:  # the merge may take its places; it waits until this kernel has ended
        tl.extra.cuda.gdc_launch_dependents()
    query_ptr += sequence * stride_query_b + at * stride_query_n
    query_rows = query_ptr + (head * GROUP + offs_g).to(tl.int64) * stride_query_h
    query = load_block(query_rows[:, None] + offs_k, real[:, None], offs_k, KEY_DIM)  # [G, DK]
    if UPCAST:
        query = query.to(tl.float32)
    acc = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_PAD], tl.float32)
    for slot in tl.range(0, SLOTS, AT_ONCE, num_stages=1):
        offs = slot + tl.arange(0, AT_ONCE)
        index = begin + offs
        row = tl.load(place_ptr + offs)
        in_pages = (index < context) & (index <= position)
        in_scratch = row != NOWHERE
        seen = in_pages | in_scratch
        if WINDOW:
            seen &= index > position - window
        keys, values = gather(
            index,
            in_pages & seen,
            row,
            in_scratch & seen,
            key_ptr + head.to(tl.int64) * stride_key_h,
            value_ptr + head.to(tl.int64) * stride_value_h,
            key_tree_ptr + sequence * stride_key_tree_b + head.to(tl.int64) * stride_key_tree_h,
            value_tree_ptr
            + sequence * stride_value_tree_b
            + head.to(tl.int64) * stride_value_tree_h,
            key_scale_ptr,
            value_scale_ptr,
            page_table_ptr + sequence * stride_table_b,
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
            ONE_LOAD,
        )
        acc, peak, mass = absorb(
            acc,
            peak,
            mass,
            query,
            keys,
            values,
            None,
            None,
            seen[None, :],
            scale,
            softcap,
            SOFTCAP,
            PRECISION,
        )
    slot = tl.load(span_ptr + 2 * sequence) + tl.load(span_ptr + 2 * sequence + 1) - 1
    place = (slot.to(tl.int64) * KV_HEADS + head) * rows + node * GROUP + offs_g
    inverse = 1.0 / tl.where(mass > 0, mass, 1.0)
    tl.store(
        partial_ptr + place[:, None] * VALUE_DIM + offs_v,
        acc * inverse[:, None],
        mask=real[:, None] & (offs_v < VALUE_DIM),
    )
    tl.store(lse_ptr + place, peak + tl.log2(tl.where(mass > 0, mass, 1.0)), mask=real)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
