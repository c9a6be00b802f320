"""From logits to probabilities, inside kernels.

Legend: B sequences, N nodes, C chunks of the vocabulary.
"""

import triton
import triton.language as tl

from specdec.kernels.reference.draft import LEAST

NOTHING = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3e38)
TINY = tl.constexpr(1e-37)  # a divisor that is not zero
SUPPORT_BLOCK = 256


def support_block(support: int) -> int:
    """Of so many draft candidates those that are looked at together."""
    return min(triton.next_power_of_2(support), SUPPORT_BLOCK)


def inverse(temperature: float) -> float:
    """What kernels multiply differences to the largest logit by; float32 can hold it."""
    return 1.0 / max(temperature, LEAST)


@triton.jit
def weight(logits, top, inverse_temperature):
    """exp((logit - top) / temperature), 0 where both are -inf."""
    return tl.exp((logits - tl.maximum(top, LOWEST)) * inverse_temperature)


@triton.jit
def joined(tops_ptr, totals_ptr, here, chunks, inverse_temperature, C_BLOCK: tl.constexpr):
    """(largest logit; sum of exp((logit - largest) / temperature)) of a node, from those of its
    chunks."""
    offs_c = tl.arange(0, C_BLOCK)
    tops = tl.load(tops_ptr + here * chunks + offs_c, mask=offs_c < chunks, other=NOTHING)
    totals = tl.load(totals_ptr + here * chunks + offs_c, mask=offs_c < chunks, other=0.0)
    top = tl.max(tops)
    return top, tl.sum(totals * weight(tops, top, inverse_temperature))
