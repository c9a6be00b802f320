"""Merging the partial results of a sequence's pieces."""

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.attention import LOG2_E
from specdec.kernels.gpu.blocks import padded


def merge(
    out: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    sinks: Tensor | None,
    *,
    spans: Tensor,
    most: int,
    always: bool = False,
) -> None:
    """Weigh partial results by the exponential of their log-sum-exp, into `out`.

    They are added up one after the other, and one without keys changes no bit. (Long for what it
    hands to the kernel.)

    Args:
        out: [B, N, HQ, DV], dense but for B.
        partial, partial_lse: [slots, HKV, R, DV] and [slots, HKV, R], base 2, where R is at least
            the number of nodes times query heads of a group.
        sinks: [HQ].
        spans: [B, 2] int32: where those of each sequence begin, and how many it has.
        most: no sequence has more.
        always: False leaves rows of sequences with one partial result as they are.
    """
    batch, nodes, query_heads, value_dim = out.shape
    kv_heads, padded_rows = partial_lse.shape[1:]
    group = query_heads // kv_heads
    rows = group * nodes
    # Few rows of a program when there are few in all: they come sooner.
    interpreting = triton.knobs.runtime.interpret
    many = rows if interpreting else min(batch * kv_heads * rows // 2048, rows)
    block = max(1, min(16, triton.next_power_of_2(many)))
    width = padded(value_dim)
    warps = max(1, min(4, block * width // 128))
    elements = max(4, block * width // (32 * warps))  # of a thread and piece
    most = triton.next_power_of_2(most)
    merge_kernel[(triton.cdiv(rows, block), kv_heads, batch)](
        out,
        partial,
        partial_lse,
        sinks,
        spans,
        rows,
        padded_rows,
        out.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        VALUE_DIM=value_dim,
        VALUE_PAD=width,
        PIECES=most,
        AT_ONCE=min(max(1, 64 // elements), most),
        BLOCK_R=block,
        LEAST=1 if always else 2,
        OVERLAP=not interpreting,
        num_warps=warps,
        launch_pdl=not interpreting,
    )


@triton.jit(do_not_specialize=["rows", "padded_rows", "stride_out_b"])
def merge_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    sink_ptr,
    span_ptr,
    rows,
    padded_rows,
    stride_out_b,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PIECES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weigh the partial results of some rows of a sequence by the exponential of their
    log-sum-exp."""
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(span_ptr + 2 * sequence).to(tl.int64)
    pieces = tl.load(span_ptr + 2 * sequence + 1)
    if pieces < LEAST:
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
    mass = tl.zeros([BLOCK_R], tl.float32)
    if sink_ptr is not None:
        mass += tl.exp2(sink - peak)
    # One by one: a sum over a tile would be added up as its width, and that of its padding, want.
    for base in range(0, pieces, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = real & (tl.full([BLOCK_R], base + i, tl.int32) < pieces)
            here = lse_ptr + place + (base + i) * step
            mass += tl.exp2(tl.load(here, mask=there, other=float("-inf")) - peak)
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
            share = tl.broadcast_to(tl.exp2(share - total)[:, None], [BLOCK_R, VALUE_PAD])
            acc = tl.fma(share, partial, acc)
    node = (offs_r // GROUP).to(tl.int64)
    out_rows = node * (KV_HEADS * GROUP) + query_head
    tl.store(
        out_ptr + sequence * stride_out_b + out_rows[:, None] * VALUE_DIM + offs_v,
        acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (offs_v < VALUE_DIM),
    )
