"""Quantisation by both implementations against numbers worked out in plain Python."""

from bisect import bisect_left
from fractions import Fraction
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.kernels.reference.cache import LARGEST
from tests.kernels.memory import raw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTISED = [torch.float8_e4m3fn, torch.int8]
both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])


@cache
def e4m3_numbers() -> list[tuple[Fraction, bool]]:
    """The numbers of float8 e4m3 from zero up, and whether their last bit is 0 (Micikevicius et
    al. 2022, table 1)."""
    numbers = []
    for code in range(0x7F):  # 0x7F is NaN
        exponent, mantissa = code >> 3, code & 7
        fraction = Fraction(mantissa, 8) + (exponent > 0)
        numbers.append((fraction * Fraction(2) ** (max(exponent, 1) - 7), code % 2 == 0))
    return numbers


def rounded(x: Fraction, dtype: torch.dtype) -> Fraction:
    """The number of the type nearest to x, of two the even one."""
    if dtype == torch.int8:
        return Fraction(round(x))
    numbers = e4m3_numbers()
    above = bisect_left(numbers, abs(x), key=lambda number: number[0])
    near = numbers[max(above - 1, 0) : above + 1]
    size, _ = min(near, key=lambda number: (abs(number[0] - abs(x)), not number[1]))
    return size if x >= 0 else -size


def scale_by_hand(row: Tensor, dtype: torch.dtype) -> Fraction:
    """The smallest power of two that leaves a row within the type, 1 if it is too small."""
    largest, limit = Fraction(float(row.abs().max())), Fraction(LARGEST[dtype])
    if largest < limit * Fraction(2) ** -126:
        return Fraction(1)
    power = next(power for power in range(-126, 129) if largest <= limit * Fraction(2) ** power)
    return Fraction(2) ** power


def stored_by_hand(row: Tensor, dtype: torch.dtype) -> list[float]:
    scale = scale_by_hand(row, dtype)
    return [float(rounded(Fraction(float(x)) / scale, dtype) * scale) for x in row]


def interesting_rows() -> Tensor:
    """[R, 24] of all sizes: ties, subnormals, a row of zeros, rows too small for a scale, rows
    next to the edge between two scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 24, generator=generator) * torch.logspace(-37, 30, 24)[:, None]
    x[3] = 0
    x[4] = torch.randn(24, generator=generator) * 1e-40
    x[5] = 1e-45
    x[6, 5:] = 0
    x[7] = torch.randn(24, generator=generator) * torch.logspace(-8, 0, 24)
    for row, largest in ((8, 127.0), (9, 448.0)):
        x[row] = (torch.arange(24) - 12) + 0.5
        x[row, 0] = largest
    x[10] = torch.cat([torch.arange(12) * 2.0**-10, torch.arange(12) + 16.5])
    x[10, 11] = 448.0
    edges = torch.tensor(
        [
            edge * side * 2.0**power
            for edge in (448.0, 224.0, 127.0, 63.5)
            for side in (1 - 2**-24, 1, 1 + 2**-24, 1 + 2**-7)  # neighbours, and further up
            for power in (-126, -125, -3, 0, 90)
        ]
    )
    below = -torch.rand(len(edges), 23, generator=generator) * edges[:, None]
    return torch.cat([x, torch.cat([edges[:, None], below], 1)])


@both
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantisation_rounds_to_the_nearest(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = interesting_rows()
    values, scales = (part.cpu() for part in kernels.quantise(x.to(DEVICE), dtype))
    assert values.dtype == dtype
    assert values.shape == x.shape
    assert scales.dtype == torch.float32
    assert scales.shape == x.shape[:1]
    for row, found, scale in zip(x, values.float(), scales, strict=True):
        exact = scale_by_hand(row, dtype)
        assert Fraction(float(scale)) == exact
        assert found.tolist() == [
            float(rounded(Fraction(float(number)) / exact, dtype)) for number in row
        ]


@both
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantised_numbers_are_near_the_true_ones(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(1)).double()
    values, scales = (part.cpu() for part in kernels.quantise(x.to(DEVICE), dtype))
    error = (values.double() * scales[:, None] - x.float()).abs()
    largest = x.abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        assert (error <= largest / 127).all()  # half a step; the scale may be twice the ideal
        assert (error > largest / 254 * 0.99).any()
        return
    normal = x.abs() >= scales[:, None] * 2.0**-6
    assert (error <= torch.where(normal, x.abs() * 2.0**-4, scales[:, None] * 2.0**-10)).all()
    assert (error[normal] > x.abs()[normal] * 2.0**-4 * 0.9).any()


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_the_kernel_quantises_to_the_same_bits(dtype: torch.dtype, given: torch.dtype) -> None:
    """Also the reference on a GPU. Half of the numbers are ties."""
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(3, 7, 50, 33, generator=generator) * torch.logspace(-5, 3, 33)
    if dtype == torch.int8:
        numbers = torch.arange(128.0)
    else:
        numbers = torch.tensor([float(number) for number, _ in e4m3_numbers()])
    chosen = torch.randint(len(numbers) - 1, plain.shape, generator=generator)
    ties = ((numbers[1:] + numbers[:-1]) / 2)[chosen]
    ties[..., 0] = LARGEST[dtype]
    ties *= 2.0 ** torch.randint(-4, 5, (3, 7, 50, 1), generator=generator)
    x = torch.stack([plain, ties]).to(given).to(DEVICE)
    expected = reference.quantise(x.cpu(), dtype)
    for kernels in (gpu, reference):
        found = kernels.quantise(x.mT.contiguous().mT, dtype)
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(found, expected, strict=True))


@both
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_numbers_of_a_type_are_kept(
    kernels: ModuleType, dtype: torch.dtype, given: torch.dtype
) -> None:
    """Rounded once is rounded for good, and every rounded number is one of the model's type."""
    x = interesting_rows().to(given)
    # Rows of zeros in place of those that may leave the type when rounded, and of those with
    # subnormal numbers of bfloat16, which Triton's interpreter reads wrongly.
    largest = x.double().abs().amax(-1, keepdim=True)
    low, high = 1e-30 if given == torch.bfloat16 else 0.0, torch.finfo(given).max * 31 / 32
    x = torch.where((low < largest) & (largest < high), x, 0)
    values, scales = (part.cpu() for part in kernels.quantise(x.to(DEVICE), dtype))
    once = values.double() * scales.double()[:, None]
    assert torch.equal(once.to(given).double(), once)
    assert torch.equal(reference.as_stored(x, dtype).double(), once)
    values, again = (part.cpu() for part in kernels.quantise(once.to(given).to(DEVICE), dtype))
    assert torch.equal(values.double() * again.double()[:, None], once)
    # 224 and a bit fits twice as often as 224, to which it is rounded.
    fell = (again < scales) & (once.abs().amax(-1) > 0)
    assert bool(fell.any()) == (dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_numbers_at_the_end_of_float16_overflow(dtype: torch.dtype) -> None:
    x = torch.tensor([[63456.0, 1.0], [65504.0, 1.0]], dtype=torch.float16)
    assert reference.as_stored(x, dtype).isinf().tolist() == [[False, False], [True, False]]


@both
def test_other_types_take_no_scale(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: must be"):
        kernels.quantise(torch.zeros(2, 2, device=DEVICE), torch.float16)
    tree = torch.zeros(1, 1, 2, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: must be"):
        kernels.write_tree(tree, tree, tree, tree, 0, torch.float16)
