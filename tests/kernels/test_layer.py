"""Products, norms and rotations of a decoder layer, by both implementations, against float64.

Memory a kernel is to fill holds NaN beforehand, and so does what it must not read.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from specdec.kernels import gpu, reference
from specdec.kernels.gpu.linear import gate
from specdec.kernels.gpu.stream import (
    EXACT,
    RING,
    STREAM_ROWS,
    Stream,
    choose_stream,
    few_enough,
    padded_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = [torch.float8_e4m3fn, torch.int8]
# Of the largest result: rounding of inputs' products to float32, and of each result that is
# rounded to a type (Triton's interpreter truncates bfloat16: a whole unit each time).
ROUNDINGS = 4

both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
types = pytest.mark.parametrize("dtype", TYPES, ids=str)
one_part = pytest.mark.parametrize("splits", [1, 3])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of `expected` in float64, as far as numbers of a type can tell."""
    assert found.shape == expected.shape
    bound = ROUNDINGS * max(torch.finfo(dtype).eps, 2e-7) * max(1.0, expected.abs().max().item())
    assert (found.double() - expected).abs().max().item() <= bound


# Products


def products(kernels: ModuleType) -> dict[str, Callable[..., Tensor]]:
    return {
        "linear": lambda x, weight, **how: kernels.linear(x, weight, **how).double().sum(0),
        "project": kernels.project,
        "gated_linear": kernels.gated_linear,
    }


def check_product(
    kernels: ModuleType, name: str, x: Tensor, weight: Tensor, blocks: Stream | None = None
) -> None:
    if blocks is None and kernels is gpu and len(x) <= STREAM_ROWS:
        blocks = choose_stream(
            rows=len(x),
            outputs=len(weight),
            inputs=x.shape[1],
            dtype=x.dtype,
            whole=name == "project",
            gated=name == "gated_linear",
        )
    how = {} if blocks is None else {"blocks": blocks}
    expected = products(reference)[name](x.double(), weight.double())
    assert_close(products(kernels)[name](x, weight, **how), expected, x.dtype)


@pytest.mark.some(15)
@both
@types
@pytest.mark.parametrize("name", ["linear", "project", "gated_linear"])
@pytest.mark.parametrize("shape", [(1, 96, 384), (5, 130, 192), (33, 66, 100), (65, 64, 64)])
def test_products(
    kernels: ModuleType, dtype: torch.dtype, name: str, shape: tuple[int, int, int]
) -> None:
    rows, outputs, inputs = shape
    weight = normal(outputs, inputs, dtype=dtype) / inputs**0.5
    check_product(kernels, name, normal(rows, inputs, dtype=dtype), weight)


@types
@given(data=st.data())
@settings(max_examples=20 if DEVICE == "cuda" else 5, deadline=None)
def test_products_of_any_shape_and_division(dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    outputs = 2 * data.draw(st.integers(1, 80))
    inputs = data.draw(st.sampled_from([1, 8, 40, 64, 72, 128, 200]))
    wide = DEVICE == "cuda"  # the ring and its tiles are for the tensor cores
    blocks = Stream(
        rows=data.draw(st.sampled_from([64, 128] if wide else [16, 64])),
        columns=data.draw(st.sampled_from([32, 64])),
        splits=data.draw(st.integers(1, 4)),
        stages=data.draw(st.integers(2, 4)),
        bulk=data.draw(st.booleans()),
        ring=data.draw(st.booleans()) and dtype != torch.float32,
    )
    name = data.draw(st.sampled_from(["linear", "project", "gated_linear"]))
    gate = name == "gated_linear"
    tiles = (1 + gate) * blocks.rows + padded_rows(rows, gated=gate)
    room = RING // (blocks.columns * tiles * dtype.itemsize)  # a multiprocessor has no more memory
    blocks = replace(blocks, stages=min(blocks.stages, room))
    weight = normal(outputs, inputs, dtype=dtype) / inputs**0.5
    check_product(gpu, name, normal(rows, inputs, dtype=dtype), weight, blocks)


@types
def test_parts_of_a_product(dtype: torch.dtype) -> None:
    x, weight = normal(3, 256, dtype=dtype), normal(64, 256, dtype=dtype)
    blocks = replace(
        choose_stream(rows=3, outputs=64, inputs=256, dtype=dtype, whole=False),
        columns=64,
        splits=3,  # 4 iterations: two, two and none, so that two are left
        stages=2,
    )
    parts = gpu.linear(x, weight, blocks=blocks)
    assert parts.shape == (2, 3, 64)
    assert parts.dtype == torch.float32
    for part, begin in zip(parts, (0, 128), strict=True):
        columns = slice(begin, begin + 128)
        expected = x[:, columns].double() @ weight[:, columns].double().T
        assert_close(part, expected, torch.float32)


@both
def test_products_of_no_rows(kernels: ModuleType) -> None:
    x, weight = normal(0, 64), normal(32, 64)
    assert kernels.linear(x, weight).sum(0).shape == (0, 32)
    assert kernels.project(x, weight).shape == (0, 32)
    assert kernels.gated_linear(x, weight).shape == (0, 16)


def test_rows_of_x_may_lie_apart() -> None:
    x, weight = normal(4, 200)[::2, :128], normal(32, 128)
    check_product(gpu, "project", x, weight)


def test_a_weight_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        gpu.project(normal(2, 32), normal(32, 16).T, blocks=EXACT)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gate_of_parts(dtype: torch.dtype) -> None:
    parts = normal(3, 5, 2 * 70)
    expected = parts.double().sum(0)
    expected = torch.nn.functional.silu(expected[:, :70]) * expected[:, 70:]
    assert_close(gate(parts, dtype), expected, dtype)


def test_launch_parameters_fit_the_shape() -> None:
    for dtype in TYPES:
        for rows in (1, 16, 17, 33, STREAM_ROWS):
            for outputs, inputs in (
                *((6144, 4096), (4096, 14336), (28672, 4096), (57344, 8192), (10240, 8192)),
                *((3072, 2048), (1152, 768), (768, 100), (32, 32)),
            ):
                for options in (
                    {"whole": True},
                    {"whole": False},
                    {"whole": False, "gated": True},
                ):
                    stream = choose_stream(
                        rows=rows, outputs=outputs, inputs=inputs, dtype=dtype, **options
                    )
                    lines = stream.rows * (2 if options.get("gated") else 1) + padded_rows(rows)
                    size = stream.stages * lines * stream.columns * dtype.itemsize
                    assert size <= 220 * 1024
                    assert stream.splits >= 1
                    assert stream.splits == 1 or not (options["whole"] or options.get("gated"))
                    assert stream.splits * stream.columns < 2 * max(inputs, stream.columns)
                    if stream.ring:
                        assert stream.rows % (16 * stream.warps) == 0


def test_up_to_16_rows_are_divided_alike() -> None:
    for outputs, inputs in ((6144, 4096), (4096, 14336), (768, 3072)):
        shape: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "whole": False}
        chosen = {choose_stream(rows=rows, dtype=torch.bfloat16, **shape) for rows in (1, 5, 16)}
        assert len(chosen) == 1


def test_many_rows_are_left_to_cublas_where_it_is_faster() -> None:
    """Of the weights of an 8B: those that were measured to be, between 65 and 300 rows."""
    weights = {"qkv": (6144, 4096), "output": (4096, 4096), "head": (128_256, 4096)}
    weights |= {"down": (4096, 14336), "gate": (28672, 4096)}
    ours = {
        name: [
            rows
            for rows in (64, 80, 96, 128, 160, 192, 224, 256, 300)
            if few_enough(rows, outputs, inputs, gated=name == "gate")
        ]
        for name, (outputs, inputs) in weights.items()
    }
    assert ours == {
        "qkv": [64, 96, 128],
        "output": [64, 96, 128],
        "head": [64],
        "down": [64, 96, 128, 160, 192, 224, 256],
        "gate": [64, 96, 128, 224, 256],
    }


# Residual stream


@both
@types
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 768), (7, 100)])
def test_add_norm(
    kernels: ModuleType,
    dtype: torch.dtype,
    with_bias: bool,
    splits: int,
    shape: tuple[int, int],
) -> None:
    residual, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    parts = normal(splits, *shape) if splits else None
    bias = normal(shape[1], dtype=dtype, seed=1) if with_bias else None
    before = residual.clone()
    total, normed = kernels.add_norm(residual, parts, weight, 1e-5, bias)
    assert torch.equal(residual, before)
    assert total.dtype == normed.dtype == dtype
    expected = reference.add_norm(
        residual.double(),
        None if parts is None else parts.double(),
        weight.double(),
        1e-5,
        None if bias is None else bias.double(),
    )
    for found, exact in zip((total, normed), expected, strict=True):
        assert_close(found, exact, dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_norm_rounds_as_transformers_does(kernels: ModuleType, dtype: torch.dtype) -> None:
    """A product is rounded before it is added; exact for numbers of few bits."""
    residual = torch.tensor([[1.0, 2048.0]], dtype=dtype, device=DEVICE)
    parts = torch.tensor([[[2048.0, 0.5]], [[1.0, 0.5]]], device=DEVICE)
    total, _ = kernels.add_norm(residual, parts, torch.ones(2, dtype=dtype, device=DEVICE), 0.0)
    product = torch.tensor([2049.0, 1.0], device=DEVICE).to(dtype)
    assert torch.equal(total[0], residual[0] + product)


# Rotation


def halves(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, both halves alike."""
    angles = normal(*shape[:-1], shape[-1] // 2, seed=seed) * 3
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def trees(batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Of keys and values: views of something larger, NaN throughout."""
    memory = torch.full((2, batch, rows, heads, dim + 8), float("nan"), dtype=dtype, device=DEVICE)
    return list(memory[..., :dim].transpose(2, 3))


@pytest.mark.some(3)
@both
@types
@one_part
@pytest.mark.parametrize("extras", ["none", "bias", "bias and norms", "norms"])
@pytest.mark.parametrize("dim", [64, 128, 48])
def test_rotate_and_write(
    kernels: ModuleType, dtype: torch.dtype, splits: int, extras: str, dim: int
) -> None:
    batch, nodes, query_heads, kv_heads, first, rows = 2, 3, 4, 2, 2, 8
    width = (query_heads + 2 * kv_heads) * dim
    parts = normal(splits, batch * nodes, width)
    cos, sin = halves(batch, nodes, dim, dtype=dtype)
    options: dict[str, Any] = {}
    if "bias" in extras:
        options["bias"] = normal(width, dtype=dtype)
    if "norms" in extras:
        options["query_norm"], options["key_norm"] = normal(2, dim, dtype=dtype)
    key_tree, value_tree = trees(batch + 1, kv_heads, rows, dim, dtype)
    query = kernels.rotate_and_write(
        parts, cos, sin, key_tree, value_tree, first, query_heads=query_heads, eps=1e-6, **options
    )
    assert query.dtype == dtype
    assert query.transpose(1, 2).is_contiguous()
    written = slice(first, first + nodes)
    exact = [
        torch.zeros(tree.shape, dtype=torch.float64, device=DEVICE)
        for tree in trees(batch, kv_heads, rows, dim, dtype)
    ]
    expected = reference.rotate_and_write(
        parts.double(),
        cos.double(),
        sin.double(),
        *exact,
        first,
        query_heads=query_heads,
        eps=1e-6,
        **{name: tensor.double() for name, tensor in options.items()},
    )
    assert_close(query, expected, dtype)
    for tree, right in zip((key_tree, value_tree), exact, strict=True):
        assert_close(tree[:batch, :, written], right[:, :, written], dtype)
        untouched = torch.ones(tree.shape[:3], dtype=torch.bool, device=DEVICE)
        untouched[:batch, :, written] = False
        assert tree[untouched].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_more_rows_than_a_grid_has_in_its_second_dimension() -> None:
    """A prefill of hundreds of sequences has as many."""
    batch, nodes, dim = 600, 512, 16
    parts = normal(1, batch * nodes, 3 * dim)
    cos, sin = halves(batch, nodes, dim, dtype=torch.bfloat16)
    found = [
        (kernels.rotate_and_write(parts, cos, sin, *made, 0, query_heads=1), *made)
        for kernels in (reference, gpu)
        for made in [trees(batch, 1, nodes, dim, torch.bfloat16)]
    ]
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs.double(), torch.bfloat16)


@pytest.mark.some(3)
@both
@types
@pytest.mark.parametrize("stored", [None, *QUANTISED], ids=str)
def test_what_is_written_is_what_write_tree_writes(
    kernels: ModuleType, dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    """Bit for bit, after quarter turns, which are exact."""
    batch, nodes, query_heads, kv_heads, dim = 2, 5, 2, 2, 16
    heads = query_heads + 2 * kv_heads
    numbers = normal(batch * nodes, heads * dim, dtype=dtype) * 4
    parts = torch.stack([numbers.float(), torch.zeros_like(numbers, dtype=torch.float32)])
    turned = torch.arange(batch * nodes * dim, device=DEVICE).view(batch, nodes, dim) % 16 % 2
    turned = torch.cat([turned[..., : dim // 2]] * 2, dim=-1).to(dtype)
    found = trees(batch, kv_heads, nodes, dim, dtype)
    query = kernels.rotate_and_write(
        parts, 1 - turned, turned, *found, 0, query_heads=query_heads, stored=stored
    )
    joined = numbers.view(batch, nodes, heads, dim)
    far = torch.cat([-joined[..., dim // 2 :], joined[..., : dim // 2]], dim=-1)
    rotated = torch.where(turned[:, :, None] == 1, far, joined)
    expected = trees(batch, kv_heads, nodes, dim, dtype)
    keys = rotated[:, :, query_heads : query_heads + kv_heads].transpose(1, 2)
    values = joined[:, :, query_heads + kv_heads :].transpose(1, 2)
    reference.write_tree(*expected, keys, values, 0, stored)
    assert torch.equal(query, rotated[:, :, :query_heads].transpose(1, 2))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# All of a layer


@both
@pytest.mark.parametrize("nodes", [1, 6])
def test_a_layer_as_in_transformers(kernels: ModuleType, nodes: int) -> None:
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).to(DEVICE)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        torch.nn.init.normal_(norm.weight)
    batch = 2
    hidden = normal(batch, nodes, 96)
    positions = torch.arange(nodes, device=DEVICE).repeat(batch, 1)
    cos, sin = LlamaRotaryEmbedding(config).to(DEVICE)(hidden, positions)
    mask = torch.full((nodes, nodes), float("-inf"), device=DEVICE).triu(1)[None, None]
    attention, mlp, eps = layer.self_attn, layer.mlp, config.rms_norm_eps
    with torch.no_grad():
        expected = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
        expected = expected[0] if isinstance(expected, tuple) else expected
        qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        tree = trees(batch, 2, nodes, 16, torch.float32)
        x, normed = kernels.add_norm(hidden.view(-1, 96), None, layer.input_layernorm.weight, eps)
        query = kernels.rotate_and_write(
            kernels.linear(normed, qkv), cos, sin, *tree, 0, query_heads=6
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            query, *tree, attn_mask=mask, scale=attention.scaling, enable_gqa=True
        )
        out = out.transpose(1, 2).reshape(batch * nodes, -1)
        product = kernels.linear(out, attention.o_proj.weight)
        x, normed = kernels.add_norm(x, product, layer.post_attention_layernorm.weight, eps)
        product = kernels.linear(kernels.gated_linear(normed, gate_up), mlp.down_proj.weight)
        x, normed = kernels.add_norm(x, product, layer.input_layernorm.weight, eps)
        assert torch.allclose(x.view(batch, nodes, -1), expected, atol=1e-5, rtol=1e-5)
        expected = layer.input_layernorm(expected).view(-1, 96)
        assert torch.allclose(normed, expected, atol=1e-5, rtol=1e-5)
