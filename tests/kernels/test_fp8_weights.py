"""Weights in float8: what they are dequantised to, how they are made, and products with them
against float64."""

from dataclasses import replace
from fractions import Fraction
from itertools import product as product_of
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import exact, gpu, reference
from specdec.kernels.gpu import widen
from specdec.kernels.gpu.linear import _chunks
from specdec.kernels.gpu.stream import (
    EXACT,
    RING,
    STREAM_ROWS,
    Stream,
    choose_stream,
    padded_rows,
)
from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight
from tests.kernels.memory import DEVICE, poisoned_allocations

ON_GPU = DEVICE.type == "cuda"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest result: rounding of sums to float32, and of results to their type (Triton's
# interpreter truncates bfloat16: a whole unit each time).
ROUNDINGS = 4

names = pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
scales = pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
types = pytest.mark.parametrize("dtype", TYPES, ids=str)


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


def exact_numbers(weight: Fp8Weight) -> Tensor:
    """In float64, scale by scale."""
    found = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
    for row in range(weight.shape[0]):
        for column in range(0, weight.shape[1], SCALED_BLOCK):
            some = slice(column, column + SCALED_BLOCK)
            at = (row // SCALED_BLOCK, column // SCALED_BLOCK) if weight.blocked else row
            found[row, some] = weight.values[row, some].double() * weight.scale[at].double()
    return found


@scales
def test_dequantised(blocked: bool) -> None:
    weight = fp8_weight(200, 300, blocked=blocked)
    assert weight.shape == (200, 300)
    assert weight.blocked == blocked
    assert weight.nbytes == 200 * 300 + 4 * (2 * 3 if blocked else 200)
    expected = exact_numbers(weight)
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


@scales
@names
def test_the_reference_computes_with_what_is_dequantised(name: str, blocked: bool) -> None:
    weight, x = fp8_weight(140, 200, blocked=blocked), normal(3, 200)
    product = getattr(reference, name)
    for dtype in (*TYPES, torch.float64):
        given = x.to(dtype)
        assert torch.equal(product(given, weight), product(given, weight.dequantised(dtype)))


# Kernels


def check(
    kernels: ModuleType, name: str, x: Tensor, weight: Fp8Weight, blocks: Stream | None = None
) -> None:
    """A product is that of float64, as far as numbers of its type can tell."""
    how = {} if blocks is None else {"blocks": blocks}
    with poisoned_allocations():
        found: Tensor = getattr(kernels, name)(x, weight, **how)
    expected = getattr(reference, name)(x.double(), exact_numbers(weight))
    if name == "linear":
        found, expected = found.double().sum(0), expected.sum(0)
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    sums = 3e-8 * x.shape[1] ** 0.5  # of so many numbers in float32
    bound = ROUNDINGS * max(torch.finfo(x.dtype).eps, 2e-7, sums) * scale
    assert not found.numel() or float((found.double() - expected).abs().max()) <= bound


def blocks_for(name: str, x: Tensor, weight: Fp8Weight, processors: int = 132) -> Stream:
    return choose_stream(
        rows=len(x),
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        dtype=x.dtype,
        whole=name == "project",
        gated=name == "gated_linear",
        float8=True,
        processors=processors,
    )


# Rows, outputs and inputs: of tiles and blocks that are not full, of rows no copy engine can read.
SHAPES = [(1, 96, 384), (5, 130, 192), (33, 66, 100), (65, 64, 64)]
LARGE = [(16, 320, 4096), (64, 3000, 1152), (100, 260, 512), (128, 512, 256), (200, 520, 384)]
SHAPES += [*LARGE, (300, 260, 4096), (600, 260, 512)] if ON_GPU else []


@pytest.mark.some(12)
@scales
@types
@names
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(name: str, dtype: torch.dtype, blocked: bool, shape: tuple[int, ...]) -> None:
    rows, outputs, inputs = shape
    weight, x = fp8_weight(outputs, inputs, blocked=blocked), normal(rows, inputs).to(dtype)
    if rows <= STREAM_ROWS:  # in the interpreter torch computes, unless blocks are given
        check(gpu, name, x, weight, blocks_for(name, x, weight))
    check(gpu, name, x, weight)


@pytest.mark.some(2)
@scales
@types
@given(data=st.data())
@settings(max_examples=30 if ON_GPU else 3, deadline=None)
def test_any_shape_and_division(blocked: bool, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, outputs = data.draw(st.integers(1, 40)), 2 * data.draw(st.integers(1, 100))
    inputs = data.draw(st.sampled_from([1, 8, 64, 80, 128, 200, 400]))
    blocks = Stream(
        rows=data.draw(st.sampled_from([64, 128] if ON_GPU else [16, 64])),
        columns=data.draw(st.sampled_from([32, 64, 128, 256])),
        splits=data.draw(st.integers(1, 4)),
        stages=data.draw(st.integers(2, 4)),
        bulk=data.draw(st.booleans()),
        ring=data.draw(st.booleans()) and dtype != torch.float32,
    )
    name = data.draw(st.sampled_from(["linear", "project", "gated_linear"]))
    gate = name == "gated_linear"
    of_x = padded_rows(rows, gated=gate, blocked=blocked) * dtype.itemsize
    room = RING // (blocks.columns * ((1 + gate) * blocks.rows + of_x))
    assume(room >= 2)  # a multiprocessor has no more memory
    blocks = replace(blocks, stages=min(blocks.stages, room))
    weight = fp8_weight(outputs, inputs, blocked=blocked)
    check(gpu, name, normal(rows, inputs).to(dtype), weight, blocks)


@types
def test_every_number_of_the_type(dtype: torch.dtype) -> None:
    """Times one, in each column of a fragment: to the last bit."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes[codes & 127 == 127] = 0  # NaN
    values = torch.stack([codes.roll(shift) for shift in range(64)])  # [64, 256]
    weight = Fp8Weight(values.view(torch.float8_e4m3fn), torch.ones(64, device=DEVICE))
    x = torch.zeros(256, 256, dtype=dtype, device=DEVICE).fill_diagonal_(1)
    for some in (slice(0, 7), slice(3, 67), slice(0, 256)) if ON_GPU else (slice(0, 7),):
        parts = gpu.linear(x[some], weight, blocks=blocks_for("linear", x[some], weight))
        assert torch.equal(parts.sum(0), weight.values.float().T[some])


@pytest.mark.some(2)
@scales
@types
def test_made_wide_for_torch(blocked: bool, dtype: torch.dtype) -> None:
    """The kernel, also from the middle of a weight on; and products by pieces of a weight."""
    weight = fp8_weight(150, 200, blocked=blocked)
    # The interpreter truncates.
    unit = 2.0**-7 if dtype == torch.bfloat16 and not ON_GPU else 0.0
    for some in (slice(0, 130), slice(128, 400)):
        found = widen.widened(weight, dtype, some)
        assert torch.allclose(found, weight.dequantised(dtype)[some], rtol=unit, atol=0)
    x = normal(7, 200).to(dtype)
    found, expected = widen.wide_mm(x, weight), reference.project(x, weight)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@names
def test_no_rows(name: str) -> None:
    check(gpu, name, normal(0, 64), fp8_weight(32, 64))


def test_sums_of_a_block_are_those_of_128_columns() -> None:
    weight, x = fp8_weight(40, 512, blocked=True), normal(2, 512).half()
    blocks = Stream(rows=16, columns=128, stages=2, splits=2, bulk=False, ring=False)
    expected = gpu.linear(x, weight, blocks=blocks)
    for columns in (32, 256):
        assert torch.equal(
            gpu.linear(x, weight, blocks=replace(blocks, columns=columns)), expected
        )
    check(gpu, "project", x, weight, replace(blocks, columns=256, splits=1))


def test_what_cannot_be_read_is_refused() -> None:
    turned = Fp8Weight(fp8_weight(512, 32).values.T, fp8_weight(32, 32).scale)
    with pytest.raises(ValueError, match="must be contiguous"):
        gpu.project(normal(2, 512), turned, blocks=EXACT)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.some(3)
@scales
@names
@pytest.mark.parametrize("size", [(96, 512), *([(6144, 4096)] if ON_GPU else [])], ids=str)
@types
def test_exact_rows_are_the_same_among_any_others(
    dtype: torch.dtype, size: tuple[int, int], name: str, blocked: bool
) -> None:
    outputs, inputs = size
    weight, x = fp8_weight(outputs, inputs, blocked=blocked), normal(600, inputs).to(dtype)
    check(exact, name, x[:20], weight)

    def rows_of(some: Tensor) -> Tensor:
        found: Tensor = getattr(exact, name)(some, weight)
        return found.transpose(0, 1) if name == "linear" else found

    first, last = rows_of(x[:1])[0], rows_of(x[1:2])[0]
    for count in [2, 17, 33, 70] + ([16, 64, 65, 128, 129, 256, 600] if ON_GPU else []):
        rows = rows_of(torch.cat([x[:1], x[2:count], x[1:2]]))
        assert torch.equal(rows[0], first)
        assert torch.equal(rows[-1], last)


def test_the_schedule_follows_from_the_weight() -> None:
    """Splits and their columns, on any GPU; and every tile fits its multiprocessor."""
    shapes = [(6144, 4096), (4096, 4096), (4096, 14336), (10240, 8192), (8192, 28672), (768, 640)]
    for (outputs, inputs), kind in product_of(shapes, ("linear", "project", "gated_linear")):
        weight = Fp8Weight(torch.empty(outputs, inputs, device="meta"), torch.empty(0))
        divisions = set()
        counts = (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1000)
        for rows, processors in product_of(counts, (78, 114, 132, 148)):
            x = torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta")
            blocks = blocks_for(kind, x, weight, processors)
            columns, splits = _chunks(inputs, blocks, float8=True)
            divisions.add((columns, splits))
            gated = kind == "gated_linear"
            line = (1 + gated) * blocks.rows + 2 * padded_rows(rows, gated=gated)
            assert blocks.stages * line * blocks.columns <= RING
            assert blocks.rows % (16 * blocks.warps) == 0
        assert len(divisions) == 1, (outputs, inputs, kind)


@pytest.mark.parametrize("processors", [114, 132, 148])
def test_programs_of_a_split_product_run_at_the_same_time(processors: int) -> None:
    """None waits for another to end, by shared memory: 228 KB, of which each takes one more."""
    for outputs, inputs in [
        (6144, 4096),
        (4096, 4096),
        (4096, 14336),
        (3072, 4096),
        (8192, 28672),
    ]:
        weight = Fp8Weight(torch.empty(outputs, inputs, device="meta"), torch.empty(0))
        for rows in (1, 16, 17, 33, 64):
            x = torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta")
            blocks = blocks_for("linear", x, weight, processors)
            line = blocks.rows + 2 * padded_rows(rows)
            taken = 1024 + 8 * blocks.stages + blocks.stages * line * blocks.columns
            programs = -(-outputs // blocks.rows) * _chunks(inputs, blocks, float8=True)[1]
            assert programs <= processors * (228 * 1024 // taken), (outputs, inputs, rows)
