"""Random numbers in kernels against numpy's."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from specdec.kernels.gpu.philox import arrivals, uniform_at
from specdec.sampling import random_keys
from tests.kernels.cases import DEVICE


@triton.jit
def _numbers_kernel(
    uniforms_ptr, arrivals_ptr, keys_ptr, first, STREAM: tl.constexpr, COUNT: tl.constexpr
):
    seed, sequence, step = tl.load(keys_ptr), tl.load(keys_ptr + 1), tl.load(keys_ptr + 2)
    offs = tl.arange(0, COUNT)
    numbers = uniform_at(seed, sequence, step, STREAM, first + offs)
    times = arrivals(seed, sequence, step, STREAM, first // 4, COUNT // 4)
    tl.store(uniforms_ptr + offs, numbers)
    tl.store(arrivals_ptr + offs, times)


@pytest.mark.parametrize(
    ("seed", "sequence", "step", "stream"),
    [(0, 0, 0, 0), (1, 2, 3, 1), (2**64 - 1, 2**63 + 5, 2**40, 0), (12345, 2**33, 7, 1)],
)
def test_numbers_are_those_of_numpy(seed: int, sequence: int, step: int, stream: int) -> None:
    count, first = 8192, 128
    keys = random_keys(seed, [sequence], [step], DEVICE)
    numbers = torch.empty(count, dtype=torch.float64, device=DEVICE)
    times = torch.empty(count, dtype=torch.float32, device=DEVICE)
    _numbers_kernel[(1,)](numbers, times, keys, first, STREAM=stream, COUNT=count)
    bits = np.random.Philox(
        key=np.array([seed, sequence], np.uint64), counter=[0, 0, stream, step]
    )
    expected = np.random.Generator(bits).random(first + count)[first:]
    assert numbers.cpu().tolist() == expected.tolist()
    np.testing.assert_allclose(times.cpu().double(), -np.log1p(-expected), rtol=1e-6)
