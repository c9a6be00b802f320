"""Packed bits."""

import math

import pytest
import torch

from specdec.kernels.layout import pack_bits, unpack_bits, words


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 129])
def test_bits_survive_packing(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    dense = torch.rand(2, 3, rows, generator=generator) < 0.5
    dense[0, 0], dense[0, 1] = True, False
    packed = pack_bits(dense)
    assert packed.dtype == torch.int32
    assert packed.shape == (2, 3, words(rows))
    assert words(rows) == math.ceil(rows / 32)
    assert torch.equal(unpack_bits(packed, rows), dense)
    for bits, word_list in zip(
        dense.view(6, -1).tolist(), packed.view(6, -1).tolist(), strict=True
    ):
        number = sum(1 << i for i, bit in enumerate(bits) if bit)
        unsigned = [word % 2**32 for word in word_list]
        assert sum(word << 32 * i for i, word in enumerate(unsigned)) == number


def test_no_rows_still_take_a_word() -> None:
    assert words(0) == 1
    assert pack_bits(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 1)
