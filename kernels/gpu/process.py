"""What `generate` does to logits before a token is chosen, in one launch.

Legend: B sequences, N nodes, V vocabulary, R cache rows, W = ceil(V / 32) words, A new tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.scan import in_rows
from specdec.kernels.gpu.softmax import NOTHING

PROCESS_CHUNK = 2048  # tokens of a program


def process_logits(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    rows: Tensor,
    seen: Tensor,
    counts: Tensor,
    *,
    penalty: float = 1.0,
    bias: Tensor | None = None,
    not_before: Tensor | None = None,
) -> Tensor:
    """As `specdec.kernels.reference.process_logits`."""
    logits = in_rows(logits)
    batch, nodes, vocab = logits.shape
    out = torch.empty(batch, nodes, vocab, dtype=torch.float32, device=logits.device)
    chunk = min(PROCESS_CHUNK, max(triton.next_power_of_2(vocab), 16))
    process_kernel[(triton.cdiv(vocab, chunk), nodes, batch)](
        out,
        logits,
        bias,
        not_before,
        tokens.contiguous(),
        parents.contiguous(),
        rows,
        seen,
        counts,
        nodes,
        vocab,
        seen.shape[1],
        penalty,
        logits.stride(0),
        logits.stride(1),
        PENALTY=penalty != 1.0,
        CHUNK=chunk,
        num_warps=8,
    )
    return out


def note_tokens(
    seen: Tensor, counts: Tensor, rows: Tensor, tokens: Tensor, length: Tensor
) -> None:
    """As `specdec.kernels.reference.note_tokens`."""
    batch, most = tokens.shape
    note_kernel[(batch,)](
        seen,
        counts,
        rows,
        tokens.contiguous(),
        length.contiguous(),
        most,
        seen.shape[1],
        A_BLOCK=triton.next_power_of_2(most),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["nodes", "penalty"])
def process_kernel(
    out_ptr,  # [B, N, V]
    logits_ptr,
    bias_ptr,  # [V] or None
    not_before_ptr,  # [2, V] or None
    tokens_ptr,  # [B, N]
    parents_ptr,  # [B, N]
    rows_ptr,  # [B]
    seen_ptr,  # [R, W]
    counts_ptr,  # [R, 2]
    nodes,
    vocab,
    words,
    penalty,
    stride_logits_b,
    stride_logits_n,
    PENALTY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A chunk of the vocabulary after one node, which walks up to its root for its own path."""
    first, node = tl.program_id(0) * CHUNK, tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.load(rows_ptr + sequence)
    offs = first + tl.arange(0, CHUNK)
    inside = offs < vocab
    at = logits_ptr + sequence * stride_logits_b + node.to(tl.int64) * stride_logits_n
    scores = tl.load(at + offs, mask=inside, other=NOTHING).to(tl.float32)
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offs, mask=inside, other=0.0)

    known = tl.zeros([CHUNK], tl.int32)
    if PENALTY:
        packed = tl.load(seen_ptr + row * words + (offs >> 5), mask=inside, other=0)
        known = (packed >> (offs & 31)) & 1
    depth = -1
    here = node
    while here >= 0:
        if PENALTY:
            token = tl.load(tokens_ptr + sequence * nodes + here)
            if (token >= first) & (token < first + CHUNK):
                known |= (offs == token).to(tl.int32)
        above = tl.load(parents_ptr + sequence * nodes + here).to(tl.int32)
        here = tl.where(above < here, above, -1)  # so that nonsense cannot keep a GPU busy
        depth += 1
    if PENALTY:
        factor = tl.zeros([CHUNK], tl.float32) + penalty
        penalised = tl.where(scores < 0.0, scores * factor, tl.div_rn(scores, factor))
        scores = tl.where(known > 0, penalised, scores)
    if not_before_ptr is not None:
        new = tl.load(counts_ptr + 2 * row) + depth
        total = tl.load(counts_ptr + 2 * row + 1) + depth
        early = new < tl.load(not_before_ptr + offs, mask=inside, other=0)
        early |= total < tl.load(not_before_ptr + vocab + offs, mask=inside, other=0)
        scores = tl.where(early, NOTHING, scores)
    out_ptr += (sequence * nodes + node) * vocab
    tl.store(out_ptr + offs, scores, mask=inside)


@triton.jit(do_not_specialize=["most"])
def note_kernel(
    seen_ptr,  # [R, W]
    counts_ptr,  # [R, 2]
    rows_ptr,  # [B]
    tokens_ptr,  # [B, A]
    length_ptr,  # [B]
    most,
    words,
    A_BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row, length = tl.load(rows_ptr + sequence), tl.load(length_ptr + sequence)
    if length == 0:  # idle rows are one and the same
        return
    offs = tl.arange(0, A_BLOCK)
    tokens = tl.load(tokens_ptr + sequence * most + offs, mask=offs < length, other=0)
    bits = (1 << (tokens & 31)).to(tl.int32)
    tl.atomic_or(seen_ptr + row * words + (tokens >> 5), bits, mask=offs < length)
    both = counts_ptr + 2 * row + tl.arange(0, 2)
    tl.store(both, tl.load(both) + length.to(tl.int32))
