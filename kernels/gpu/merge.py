"""Merging the partial results of a sequence's pieces."""

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.attention import LOG2_E
from specdec.kernels.gpu.blocks import padded
from specdec.kernels.gpu.plan import Pieces


def merge(
    out: Tensor, partial: Tensor, partial_lse: Tensor, sinks: Tensor | None, pieces: Pieces
) -> None:
    """Weigh partial results by the exponential of their log-sum-exp, into `out`.

    Args:
        out: [B, N, HQ, DV]; rows of sequences in one piece are left as they are.
        partial, partial_lse: [slots, HKV, R, DV] and [slots, HKV, R], base 2, where R is at least
            the number of nodes times query heads of a group.
        sinks: [HQ].
    """
    batch, nodes, query_heads, value_dim = out.shape
    kv_heads, padded_rows = partial_lse.shape[1:]
    group = query_heads // kv_heads
    rows = group * nodes
    # Few rows of a program when there are few in all: they come sooner.
    block = max(1, min(16, triton.next_power_of_2(min(batch * kv_heads * rows // 2048, rows))))
    width = padded(value_dim)
    warps = max(1, min(4, block * width // 128))
    elements = max(4, block * width // (32 * warps))  # of a thread and piece
    most = triton.next_power_of_2(pieces.most)
    interpreting = triton.knobs.runtime.interpret
    merge_kernel[(triton.cdiv(rows, block), kv_heads, batch)](
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


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def merge_kernel(
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
        tl.extra.cuda.gdc_launch_dependents()
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
