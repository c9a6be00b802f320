"""What a drafter reads off its logits: the most probable tokens, and random numbers to draw by.

Legend: B sequences, R rows, V vocabulary, C chunks of the vocabulary, G groups of a chunk,
E neighbours in a group, K the count of tokens rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.philox import UNIT, key_of, philox_block
from specdec.kernels.gpu.softmax import NOTHING, inverse, weight

DRAW_BLOCKS = 64  # blocks of four numbers of a program
CHUNK = 4096  # logits of a program
WIDE_CHUNK = 8192  # of one that leaves many tokens, for all that it leaves is to be merged
MANY = 64  # tokens
GROUP = 8  # logits in 16 bytes of a 16-bit type
MERGED = 2048  # candidates that a program sorts together
LARGEST = 128  # count
LAST = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**63))


def uniforms(keys: Tensor, stream: int, count: int) -> Tensor:
    """As `specdec.kernels.reference.uniforms`, to the bit."""
    keys = keys.contiguous()
    out = torch.empty(len(keys), count, dtype=torch.float64, device=keys.device)
    _uniforms_kernel[(triton.cdiv(count, 4 * DRAW_BLOCKS), len(keys))](
        out, keys, stream, count, BLOCKS=DRAW_BLOCKS, num_warps=2
    )
    return out


@triton.jit(do_not_specialize=["stream", "count"])
def _uniforms_kernel(out_ptr, keys_ptr, stream, count, BLOCKS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCKS
    seed, sequence, step = key_of(keys_ptr, row)
    block = first + tl.arange(0, BLOCKS)
    zeroth, one, two, three = philox_block(seed, sequence, step, stream, block)
    bits = tl.interleave(tl.interleave(zeroth, two), tl.interleave(one, three))
    offs = 4 * first + tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + row * count + offs, bits.to(tl.float64) * UNIT, mask=offs < count)


def top_tokens(
    logits: Tensor, count: int, *, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `specdec.kernels.reference.top_tokens`, which does it itself for a `count` above
    `LARGEST`.

    A chunk's best tokens lie in its best groups, those with the largest maxima. So only the maxima
    of groups are sorted, then the logits of as many groups as tokens are wanted.
    """
    rows = len(logits)
    vocab = logits.shape[1] if vocab is None else min(vocab, logits.shape[1])
    if not 1 <= count <= min(vocab, LARGEST):
        return reference.top_tokens(logits, count, temperature=temperature, vocab=vocab)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    keys_each = triton.next_power_of_2(count)
    chunk = WIDE_CHUNK if keys_each >= MANY else CHUNK
    chunk = min(chunk, max(triton.next_power_of_2(vocab), GROUP * keys_each))
    chunks = triton.cdiv(vocab, chunk)
    keys = torch.empty(rows, chunks, keys_each, dtype=torch.int64, device=logits.device)
    tops = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    totals = torch.empty_like(tops)
    ids = torch.empty(rows, count, dtype=torch.int64, device=logits.device)
    probs = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    found = keys, tops, totals
    _scan_kernel[(chunks, rows)](
        *found,
        logits,
        vocab,
        inverse(temperature),
        logits.stride(0),
        GROUPS=chunk // GROUP,
        GROUP=GROUP,
        K=keys_each,
        num_warps=8 if chunk > CHUNK else 4,
    )
    merged = min(triton.next_power_of_2(chunks * keys_each), MERGED)
    _merge_kernel[(rows,)](
        ids,
        probs,
        *found,
        count,
        chunks,
        inverse(temperature),
        C_BLOCK=triton.next_power_of_2(chunks),
        TILE=max(merged, keys_each),
        K=keys_each,
        num_warps=8 if merged >= 1024 else 4 if merged >= 256 else 1,
    )
    return ids, probs


@triton.jit
def _scan_kernel(
    keys_ptr,  # [R, C, K]
    tops_ptr,  # [R, C], the largest logit
    totals_ptr,  # [R, C], sum of exp((logit - top) / temperature)
    logits_ptr,
    vocab,
    inverse_temperature,
    stride_logits,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    logits_ptr += row * stride_logits
    offs_g = tl.arange(0, GROUPS)
    offs_e = tl.arange(0, GROUP)
    first = chunk * (GROUPS * GROUP)
    offs = first + offs_g[:, None] * GROUP + offs_e[None, :]  # [G, E]
    logits = tl.load(logits_ptr + offs, mask=offs < vocab, other=NOTHING).to(tl.float32)
    tops = tl.max(logits, axis=1)  # [G]
    top = tl.max(tops)
    out = row * tl.num_programs(0) + chunk
    tl.store(tops_ptr + out, top)
    tl.store(totals_ptr + out, tl.sum(weight(logits, top, inverse_temperature)))

    groups = _largest(_key(tops, offs_g, first + offs_g * GROUP < vocab), K)
    chosen = _index(groups)
    offs = first + chosen[:, None] * GROUP + offs_e[None, :]  # [K, E]
    mask = (groups > NO_KEY)[:, None] & (offs < vocab)
    logits = tl.load(logits_ptr + offs, mask=mask, other=NOTHING).to(tl.float32)
    keys = _largest(tl.reshape(_key(logits, offs, mask), [K * GROUP]), K)
    tl.store(keys_ptr + out * K + tl.arange(0, K), keys)


@triton.jit(do_not_specialize=["count", "chunks"])
def _merge_kernel(
    ids_ptr,  # [R, count]
    probs_ptr,  # [R, count]
    keys_ptr,  # [R, C, K]
    tops_ptr,  # [R, C]
    totals_ptr,  # [R, C]
    count,
    chunks,
    inverse_temperature,
    C_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, C_BLOCK)
    tops = tl.load(tops_ptr + row * chunks + offs_c, mask=offs_c < chunks, other=NOTHING)
    totals = tl.load(totals_ptr + row * chunks + offs_c, mask=offs_c < chunks, other=0.0)
    top = tl.max(tops)
    total = tl.sum(totals * weight(tops, top, inverse_temperature))

    candidates = chunks * K
    keys_ptr += row * candidates
    offs = tl.arange(0, TILE)
    keys = _largest(tl.load(keys_ptr + offs, mask=offs < candidates, other=NO_KEY), K)
    for begin in range(TILE, candidates, TILE):
        offs = begin + tl.arange(0, TILE)
        more = _largest(tl.load(keys_ptr + offs, mask=offs < candidates, other=NO_KEY), K)
        keys = _largest(tl.reshape(tl.join(keys, more), [2 * K]), K)

    offs_k = tl.arange(0, K)
    bits = (keys >> 32).to(tl.int32)
    logits = (bits ^ ((bits >> 31) & LAST)).to(tl.float32, bitcast=True)
    probs = weight(logits, top, inverse_temperature) / total
    tl.store(ids_ptr + row * count + offs_k, _index(keys).to(tl.int64), mask=offs_k < count)
    tl.store(probs_ptr + row * count + offs_k, probs, mask=offs_k < count)


@triton.jit
def _key(logits, index, mask):
    """int64s in the order of the logits, of equal ones the lower index on top."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # no -0.0
    bits ^= (bits >> 31) & LAST  # as integers in the order of the numbers
    return tl.where(mask, (bits.to(tl.int64) << 32) | (index ^ LAST).to(tl.int64), NO_KEY)


@triton.jit
def _index(keys):
    return (keys & LAST).to(tl.int32) ^ LAST


@triton.jit
def _largest(keys, K: tl.constexpr):
    """[K], in descending order."""
    if K == 1:
        return tl.max(keys, axis=0, keep_dims=True)
    else:
        return tl.topk(keys, K)
