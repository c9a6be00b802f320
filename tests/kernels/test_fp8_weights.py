"""Weights in float8: what they are dequantised to, how they are made, and products with them."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def fp8_weight(outputs: int, inputs: int, *, blocked: bool = False) -> Fp8Weight:
    """All of e4m3 but NaN, subnormal numbers and zeros too; scales are no powers of two."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    codes = torch.randint(0, 254, (outputs, inputs), generator=generator)
    codes += codes >= 127  # 127 and 255 are NaN
    shape = [-(-outputs // SCALED_BLOCK), -(-inputs // SCALED_BLOCK)] if blocked else [outputs]
    scale = (torch.rand(shape, generator=generator) + 0.5) / (100 * inputs**0.5)
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    return Fp8Weight(values.to(DEVICE), scale.to(DEVICE))


def exact(weight: Fp8Weight) -> Tensor:
    """In float64, scale by scale."""
    found = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
    for row in range(weight.shape[0]):
        for column in range(0, weight.shape[1], SCALED_BLOCK):
            some = slice(column, column + SCALED_BLOCK)
            at = (row // SCALED_BLOCK, column // SCALED_BLOCK) if weight.blocked else row
            found[row, some] = weight.values[row, some].double() * weight.scale[at].double()
    return found


@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
def test_dequantised(blocked: bool) -> None:
    weight = fp8_weight(200, 300, blocked=blocked)
    assert weight.shape == (200, 300)
    assert weight.blocked == blocked
    assert weight.nbytes == 200 * 300 + 4 * (2 * 3 if blocked else 200)
    expected = exact(weight)
    assert torch.equal(weight.dequantised(torch.float64), expected)
    for dtype in TYPES:
        # A product of 4 and 24 bits rounds to float32 first.
        found = weight.dequantised(dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected.float().to(dtype))


def test_a_quantised_weight() -> None:
    """To the nearest number of the type, and of two scales the smaller one that reaches."""
    weight = normal(1500, 40) * torch.logspace(-5, 3, 1500, device=DEVICE)[:, None]
    weight[7] = 0
    found = reference.quantise_weight(weight.bfloat16())
    assert not found.blocked
    assert found.values.dtype == torch.float8_e4m3fn
    assert found.scale.shape == (1500,)
    for row in (0, 7, 1023, 1024, 1499):
        largest = Fraction(float(weight[row].bfloat16().abs().max()))
        scale = Fraction(float(found.scale[row]))
        assert largest <= 448 * scale
        assert row == 7 or largest > 224 * scale
        assert float(scale).hex().startswith("0x1.0000000000000p")
    given, back = weight.bfloat16().double(), found.dequantised(torch.float64)
    step = torch.maximum(given.abs() / 16, found.scale.double()[:, None] * 2.0**-10)
    assert ((back - given).abs() <= step).all()
    assert torch.equal(found.dequantised(torch.bfloat16).double(), back)
    again = reference.quantise_weight(found.dequantised(torch.bfloat16))
    assert torch.equal(again.dequantised(torch.float64), back)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    weight = normal(1100, 8)
    weight[1050, 3] = number
    with pytest.raises(ValueError, match="infinite numbers or NaN"):
        reference.quantise_weight(weight)


@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
def test_the_reference_computes_with_what_is_dequantised(name: str, blocked: bool) -> None:
    weight, x = fp8_weight(140, 200, blocked=blocked), normal(3, 200)
    product = getattr(reference, name)
    for dtype in (*TYPES, torch.float64):
        given = x.to(dtype)
        assert torch.equal(product(given, weight), product(given, weight.dequantised(dtype)))
