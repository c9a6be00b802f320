"""Exact kernels: the bits of a row of a product do not depend on how many rows there are, nor do
those of what stands between products."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from specdec.kernels import exact, reference
from specdec.kernels.gpu import stream
from specdec.kernels.gpu.linear import _chunks
from specdec.models.load import zoo_path
from tests.kernels.attention_cases import BF16, FP16, FP32, ON_GPU, QUANTISED, same
from tests.kernels.exact_cases import plant
from tests.kernels.memory import DEVICE, poisoned_allocations

pytestmark = pytest.mark.usefixtures("ordered_products")
TYPES = [BF16, FP16, FP32] if ON_GPU else [BF16, FP32]
# As many rows as tiles of 16, 32, 64 and 128 take, and in tiles that are not full.
COUNTS = [2, 16, 17, 33, 64, 65, 70] + ([129, 255, 256, 257, 600] if ON_GPU else [])
# A unit in the last place of an interpreter's bfloat16, which is cut off, and of sums in float32.
ROUNDINGS = 4


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def rows_of(kernels: ModuleType, name: str, x: Tensor, weight: Tensor) -> Tensor:
    """[M, parts, outputs] of a product."""
    with poisoned_allocations():
        found: Tensor = getattr(kernels, name)(x, weight)
    return found.transpose(0, 1) if name == "linear" else found[:, None]


def differing(kernels: ModuleType, name: str, x: Tensor, weight: Tensor) -> list[int]:
    """Counts of rows among which the bits of the first or the last are not those it has alone."""
    alone = {row: rows_of(kernels, name, x[row : row + 1], weight)[0] for row in (0, 1)}
    found = []
    for count in COUNTS:
        among = torch.cat([x[:1], x[2:count], x[1:2]])
        rows = rows_of(kernels, name, among, weight)
        if rows.shape[1:] != alone[0].shape or not (
            same(rows[0], alone[0]) and same(rows[-1], alone[1])
        ):
            found.append(count)
    return found


SIZES = [(96, 256), (40, 320), (4096, 4096)] if ON_GPU else [(96, 256), (40, 320)]


@pytest.mark.some(5)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_is_the_same_among_any_others(
    dtype: torch.dtype, name: str, size: tuple[int, int]
) -> None:
    outputs, inputs = size
    x = normal(max(COUNTS), inputs, dtype=dtype)
    assert differing(exact, name, x, normal(outputs, inputs, dtype=dtype) / inputs**0.5) == []


@pytest.mark.some(3)
@pytest.mark.parametrize("rows", [1, 17, 70, 300])
@pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_are_right(dtype: torch.dtype, name: str, rows: int) -> None:
    outputs, inputs = 96, 320
    weight = normal(outputs, inputs, dtype=dtype) / inputs**0.5
    x = normal(rows, inputs, dtype=dtype)
    found = rows_of(exact, name, x, weight).double().sum(1)
    expected = getattr(reference, name)(x.double(), weight.double())
    expected = expected.sum(0) if name == "linear" else expected
    bound = ROUNDINGS * max(torch.finfo(dtype).eps, 2e-7) * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
def test_products_of_no_rows(name: str) -> None:
    found = rows_of(exact, name, normal(0, 64, dtype=FP32), normal(32, 64, dtype=FP32))
    assert found.shape[0] == 0
    assert found.shape[2] == (16 if name == "gated_linear" else 32)


def test_many_splits_whatever_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a GPU so small that a weight is given three programs for each of its multiprocessors. A
    count of splits that looks at rows shows."""
    x, weight = normal(max(COUNTS), 4096, dtype=BF16), normal(96, 4096, dtype=BF16)
    monkeypatch.setattr(stream, "PROGRAMS", 3)
    assert exact.linear(x[:1], weight).shape[0] == 4
    assert differing(exact, "linear", x, weight) == []
    looks = plant(tmp_path, ("stream", "crowded=exact or rows <= 16", "crowded=rows <= 16"))
    monkeypatch.setattr(importlib.import_module(f"{looks.__name__}.stream"), "PROGRAMS", 3)
    assert differing(looks, "linear", x, weight) == [17, 33, 64]


def test_a_split_of_other_columns_shows(tmp_path: Path) -> None:
    """One part, but of a sum that many rows begin elsewhere."""
    x, weight = normal(max(COUNTS), 512, dtype=BF16), normal(96, 512, dtype=BF16)
    parts = "shape = splits, len(x)"
    fault = plant(
        tmp_path,
        ("linear", parts, f"chunk += SPLIT_COLUMNS if len(x) > 16 else 0\n    {parts}"),
    )
    assert differing(exact, "linear", x, weight) == []
    assert differing(fault, "linear", x, weight) == [count for count in COUNTS if count > 16]


# The schedule


def zoo() -> Iterator[tuple[int, int, int, int, int]]:
    for name in ("target", "draft"):
        config = json.loads((Path(zoo_path(name)) / "config.json").read_text())
        hidden, dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        joined = (heads + 2 * kv_heads) * dim
        yield hidden, joined, heads * dim, config["intermediate_size"], config["vocab_size"]


# Hidden size, columns of queries, keys and values, of queries, of the gate, words.
MODELS = {
    "8B": (4096, 6144, 4096, 14336, 128_256),
    "1B": (2048, 3072, 2048, 8192, 128_256),
    "160M": (768, 2304, 768, 3072, 32_000),
    **dict(zip(("target", "draft"), zoo(), strict=True)),
}
ROWS = [*range(1, 300), 320, 511, 512, 513, 1000]


@pytest.mark.parametrize("model", MODELS)
def test_the_schedule_follows_from_the_weight(model: str) -> None:
    """Splits and their columns; and every tile fits its multiprocessor."""
    hidden, joined, queries, gate, words = MODELS[model]
    weights = {
        (joined, hidden, ""),
        (hidden, queries, ""),
        (hidden, gate, ""),
        (2 * gate, hidden, "gated"),
        (words, hidden, "whole"),
    }
    for outputs, inputs, kind in weights:
        divisions = set()
        for rows in ROWS:
            blocks = stream.choose_stream(
                rows=rows,
                outputs=outputs,
                inputs=inputs,
                dtype=BF16,
                whole=kind == "whole",
                gated=kind == "gated",
                exact=True,
            )
            columns, splits = _chunks(inputs, blocks)
            divisions.add((blocks.splits, columns, splits))
            assert columns % blocks.columns == 0
            gated = kind == "gated"
            lines = (1 + gated) * blocks.rows + stream.padded_rows(rows, gated=gated)
            assert blocks.stages * lines * blocks.columns * 2 <= stream.RING
        assert len(divisions) == 1, (outputs, inputs, kind)
        if kind:
            assert divisions.pop()[2] == 1


# Between products


@pytest.mark.some(3)
@pytest.mark.parametrize("stored", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 48])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rotation_and_norms_of_heads(
    dtype: torch.dtype, dim: int, stored: torch.dtype | None
) -> None:
    """A row alone, and among 40 of two sequences."""
    query_heads, kv_heads, nodes = 2, 1, 20
    width = (query_heads + 2 * kv_heads) * dim
    parts = normal(3, 2 * nodes, width, dtype=FP32)
    angles = normal(2, nodes, dim // 2, dtype=FP32) * 3
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query_norm, key_norm = normal(2, dim, dtype=dtype)

    def rotate(parts: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        batch, nodes, _ = cos.shape
        trees = torch.full((2, batch, kv_heads, nodes, dim), float("nan"), dtype=dtype)
        trees = trees.to(DEVICE)
        query = exact.rotate_and_write(
            parts.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            *trees,
            0,
            query_heads=query_heads,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=1e-6,
            stored=stored,
        )
        return query, *trees

    together = rotate(parts, cos, sin)
    for sequence, node in ((0, 0), (0, 3), (1, 18), (1, 19)):
        row = sequence * nodes + node
        here = sequence, slice(node, node + 1)
        single = rotate(parts[:, row : row + 1], cos[here][None], sin[here][None])
        for one, all_of_them in zip(single, together, strict=True):
            assert same(one[0, :, 0], all_of_them[sequence, :, node])


@pytest.mark.some(2)
@pytest.mark.parametrize("splits", [0, 1, 4])
@pytest.mark.parametrize("hidden", [96, 768])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_and_norms_of_rows(dtype: torch.dtype, hidden: int, splits: int) -> None:
    rows = 7
    residual, weight = normal(rows, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    bias = normal(hidden, dtype=dtype, seed=1)
    parts = normal(splits, rows, hidden, dtype=FP32) if splits else None
    together = exact.add_norm(residual, parts, weight, 1e-5, bias)
    for row in range(rows):
        one = slice(row, row + 1)
        part = None if parts is None else parts[:, one].contiguous()
        single = exact.add_norm(residual[one], part, weight, 1e-5, bias)
        assert all(same(a, b[one]) for a, b in zip(single, together, strict=True))
