"""Random numbers inside kernels: those of `specdec.sampling.uniforms`, to the bit.

Numpy's Philox 4x64-10 (Salmon et al. 2011): the key is (seed, sequence), block i of four words has
the counter (i + 1, 0, stream, step), and the upper 53 bits of a word, divided by 2**53, are its
number in [0, 1).
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-53)


@triton.jit
def key_of(keys_ptr, row):
    """(seed, sequence, step) of a row."""
    keys_ptr += row * 3
    return tl.load(keys_ptr), tl.load(keys_ptr + 1), tl.load(keys_ptr + 2)


@triton.jit
def philox_block(seed, sequence, step, stream, block):
    """The 53 bits of each of the four words of a block, as four int64 tensors.

    Args:
        seed, sequence, step: scalars, int64 that hold the bits of a uint64.
        stream, block: int; `block` a tensor of any shape.
    """
    left, right = seed.to(tl.uint64), sequence.to(tl.uint64)
    first = (block + 1).to(tl.uint64)
    second = tl.zeros_like(first)
    third = second + stream
    fourth = second + step.to(tl.uint64)
    for _ in tl.static_range(10):
        high, low = tl.umulhi(first, 0xD2E7470EE14C6C93), first * 0xD2E7470EE14C6C93
        high_too, low_too = tl.umulhi(third, 0xCA5A826395121157), third * 0xCA5A826395121157
        first, second = high_too ^ second ^ left, low_too
        third, fourth = high ^ fourth ^ right, low
        left += 0x9E3779B97F4A7C15
        right += 0xBB67AE8584CAA73B
    return (
        (first >> 11).to(tl.int64),
        (second >> 11).to(tl.int64),
        (third >> 11).to(tl.int64),
        (fourth >> 11).to(tl.int64),
    )


@triton.jit
def uniform_at(seed, sequence, step, stream, index):
    """[...] float64 in [0, 1): number `index` of the stream, for an int tensor of any shape."""
    zeroth, first, second, third = philox_block(seed, sequence, step, stream, index // 4)
    word = index % 4
    bits = tl.where(
        word < 2, tl.where(word == 0, zeroth, first), tl.where(word == 2, second, third)
    )
    return bits.to(tl.float64) * UNIT


@triton.jit
def arrivals(seed, sequence, step, stream, first_block, BLOCKS: tl.constexpr):
    """[4 * BLOCKS] float32: -log(1 - u) of consecutive numbers u, to about 1e-6 of their value.

    Args:
        first_block: int, a quarter of the index of the first number.
    """
    block = first_block + tl.arange(0, BLOCKS)
    zeroth, first, second, third = philox_block(seed, sequence, step, stream, block)
    bits = tl.interleave(tl.interleave(zeroth, second), tl.interleave(first, third))
    u = bits.to(tl.float32) * UNIT
    rest = (9007199254740992 - bits).to(tl.float32) * UNIT  # 1 - u, rounded only once
    # The logarithm of a number near 1 has a small absolute error, no small relative one:
    # -log(1 - u) = 2 artanh(z).
    z = u / (2.0 - u)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7))))
    return tl.where(u < 0.25, series, -tl.log(rest))
