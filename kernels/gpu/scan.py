"""One pass over the logits reduces the vocabulary of every node to a few numbers.

Legend: B sequences, N nodes, V vocabulary, C chunks of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.softmax import NOTHING, inverse, joined, weight
from specdec.kernels.layout import TargetLaw
from specdec.kernels.reference.draft import LEAST

SCAN_BYTES = 16384  # logits of a program


def target_law(
    logits: Tensor, size: Tensor, *, temperature: float, entropy: bool = False
) -> TargetLaw:
    """As `specdec.kernels.reference.target_law`; finite for nodes that are not real."""
    logits, size = in_rows(logits), size.contiguous()
    batch, nodes, _ = logits.shape
    tops, totals, logs = scan(logits, size, inverse(temperature), torch.float32, entropy=entropy)
    top = torch.empty(batch, nodes, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(top)
    found = torch.empty_like(top) if entropy else None
    law = TargetLaw(top, total, max(temperature, LEAST), found)
    _law_kernel[(nodes, batch)](
        top,
        total,
        law.entropy,
        tops,
        totals,
        logs,
        size,
        tops.shape[2],
        inverse(temperature),
        C_BLOCK=triton.next_power_of_2(tops.shape[2]),
        num_warps=1,
    )
    return law


def scan(
    logits: Tensor,
    size: Tensor,
    inverse_temperature: float,
    second: torch.dtype,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, N, C] of each chunk: the largest logit; and its lowest index (second=int32), or the sum
    of the weights exp((logit - largest) / temperature) (float32); and, for the entropy, the sum of
    the weights times their logarithms."""
    batch, nodes, vocab = logits.shape
    chunk = min(SCAN_BYTES // logits.element_size(), max(triton.next_power_of_2(vocab), 16))
    chunks = triton.cdiv(vocab, chunk)
    tops = torch.empty(batch, nodes, chunks, dtype=torch.float32, device=logits.device)
    seconds = torch.empty(batch, nodes, chunks, dtype=second, device=logits.device)
    logs = torch.empty_like(tops) if entropy else None
    _scan_kernel[(chunks, nodes, batch)](
        tops,
        seconds,
        logs,
        logits,
        size,
        vocab,
        inverse_temperature,
        logits.stride(0),
        logits.stride(1),
        INDEX=second == torch.int32,
        CHUNK=chunk,
        num_warps=8,
    )
    return tops, seconds, logs


def in_rows(logits: Tensor) -> Tensor:
    """With a dense vocabulary, which the kernels take for granted; nearly always there already."""
    return logits if logits.stride(2) == 1 else logits.contiguous()


@triton.jit
def _scan_kernel(
    tops_ptr,  # [B, N, C]
    seconds_ptr,  # [B, N, C]
    logs_ptr,  # [B, N, C] or None
    logits_ptr,
    size_ptr,
    vocab,
    inverse_temperature,
    stride_logits_b,
    stride_logits_n,
    INDEX: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, node, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if node >= tl.load(size_ptr + row):
        return
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    at = logits_ptr + row.to(tl.int64) * stride_logits_b + node.to(tl.int64) * stride_logits_n
    logits = tl.load(at + offs, mask=offs < vocab, other=NOTHING).to(tl.float32)
    largest = tl.max(logits)
    if INDEX:
        second = tl.min(tl.where(logits == largest, offs, vocab - 1))
    else:
        weights = weight(logits, largest, inverse_temperature)
        second = tl.sum(weights)
    out = (row.to(tl.int64) * tl.num_programs(1) + node) * tl.num_programs(0) + chunk
    tl.store(tops_ptr + out, largest)
    tl.store(seconds_ptr + out, second)
    if logs_ptr is not None:
        below = tl.where(weights > 0.0, (logits - largest) * inverse_temperature, 0.0)
        tl.store(logs_ptr + out, tl.sum(weights * below))


@triton.jit(do_not_specialize=["chunks"])
def _law_kernel(
    top_ptr,  # [B, N]
    total_ptr,  # [B, N]
    entropy_ptr,  # [B, N] or None
    tops_ptr,  # [B, N, C]
    totals_ptr,  # [B, N, C]
    logs_ptr,  # [B, N, C] or None
    size_ptr,
    chunks,
    inverse_temperature,
    C_BLOCK: tl.constexpr,
):
    """Join the chunks of one node."""
    node, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = row * tl.num_programs(0) + node
    if node >= tl.load(size_ptr + row):
        tl.store(top_ptr + here, 0.0)
        tl.store(total_ptr + here, 1.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + here, 0.0)
        return
    top, total = joined(tops_ptr, totals_ptr, here, chunks, inverse_temperature, C_BLOCK)
    tl.store(top_ptr + here, top)
    tl.store(total_ptr + here, total)
    if entropy_ptr is not None:
        offs_c = here * chunks + tl.arange(0, C_BLOCK)
        inside = tl.arange(0, C_BLOCK) < chunks
        tops = tl.load(tops_ptr + offs_c, mask=inside, other=NOTHING)
        totals = tl.load(totals_ptr + offs_c, mask=inside, other=0.0)
        logs = tl.load(logs_ptr + offs_c, mask=inside, other=0.0)
        scale = weight(tops, top, inverse_temperature)
        below = tl.where(scale > 0.0, (tops - top) * inverse_temperature, 0.0)
        logs = tl.sum(scale * (logs + totals * below))
        tl.store(entropy_ptr + here, tl.log(total) - logs / total)
