"""Calls of attention and of products in the sizes of real models, for `compile_report`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product as product_of
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import exact, gpu
from specdec.kernels.gpu.stream import choose_stream
from specdec.kernels.layout import Fp8Weight, Weight
from tests.kernels.attention_cases import random_case
from tests.kernels.memory import DEVICE


def attend(
    *,
    nodes: int,
    kernels: ModuleType = gpu,
    options: dict[str, Any] | None = None,
    **shape: Any,
) -> None:
    """One call of tree attention, of a model with 128 columns and 4 query heads in a group."""
    case = random_case(
        **{
            "contexts": [200, 130],
            "sizes": [nodes, nodes],
            "group": 4,
            "kv_heads": 2,
            "key_dim": 128,
            "page_size": 64,
            "dtype": torch.bfloat16,
            **shape,
        }
    )
    options = dict(options or {})
    if options.pop("sinks", False):
        options["sinks"] = torch.zeros(case.query.shape[1], dtype=case.query.dtype, device=DEVICE)
    case.attend(kernels=kernels, **options)


def attention_calls() -> dict[str, Callable[[], None]]:
    everything = {"window": 100, "softcap": 30.0, "sinks": True}
    few, many = {"nodes": 8}, {"nodes": 64}
    shapes: dict[str, dict[str, Any]] = {
        f"{nodes} nodes": {"nodes": nodes} for nodes in (1, 8, 16, 64, 256)
    }
    for size in (few, many):
        name = f"{size['nodes']} nodes"
        shapes |= {f"{name}, page {page}": {**size, "page_size": page} for page in (16, 128)}
        shapes |= {f"{name}, dim {dim}": {**size, "key_dim": dim} for dim in (64, 256)}
        shapes |= {f"{name}, group {group}": {**size, "group": group} for group in (1, 8)}
        shapes |= {
            f"{name}, pages of {stored}": {**size, "stored": stored}
            for stored in (torch.float8_e4m3fn, torch.int8)
        }
        shapes[f"{name}, float16"] = {**size, "dtype": torch.float16}
        shapes[f"{name}, every option"] = {**size, "options": everything}
        shapes[f"{name}, shared prefix"] = {
            **size,
            "alike": [0, 2],
            "options": {"shared_prefix": True},
        }
    shapes["float32"] = {**few, "dtype": torch.float32}
    shapes["200 pieces"] = {**few, "options": {"splits": 200}}
    shapes["chain of 256"] = {"nodes": 256, "chain": True}
    shapes["chain of 256, dim 256, window"] = {
        "nodes": 256,
        "chain": True,
        "key_dim": 256,
        "options": {"window": 100},
    }
    return {name: partial(attend, **shape) for name, shape in shapes.items()}


def float8(outputs: int, inputs: int, *, blocked: bool = False) -> Fp8Weight:
    values = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=DEVICE)
    shape = [-(-outputs // 128), -(-inputs // 128)] if blocked else [outputs]
    return Fp8Weight(values, torch.empty(shape, device=DEVICE))


def product(
    name: str,
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    weight: Weight | None = None,
    **change: Any,
) -> Tensor:
    """One product with a weight, with some launch parameters changed."""
    x = torch.empty(rows, inputs, dtype=dtype, device=DEVICE)
    if weight is None:
        weight = torch.empty(outputs, inputs, dtype=dtype, device=DEVICE)
    blocks = choose_stream(
        rows=rows,
        outputs=outputs,
        inputs=inputs,
        dtype=dtype,
        whole=name == "project",
        gated=name == "gated_linear",
        float8=isinstance(weight, Fp8Weight),
    )
    found: Tensor = getattr(gpu, name)(x, weight, blocks=replace(blocks, **change))
    return found


def exact_product(name: str, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(rows, inputs, dtype=dtype, device=DEVICE)
    weight = torch.empty(outputs, inputs, dtype=dtype, device=DEVICE)
    found: Tensor = getattr(exact, name)(x, weight)
    return found


def exact_calls() -> dict[str, Callable[[], object]]:
    """Attention and products of exact mode."""
    everything = {"window": 100, "softcap": 30.0, "sinks": True}
    few, many = {"nodes": 8}, {"nodes": 64}
    shapes: dict[str, dict[str, Any]] = {
        f"{nodes} nodes": {"nodes": nodes} for nodes in (1, 8, 64, 256)
    }
    shapes |= {f"page {page}": {**few, "page_size": page} for page in (16, 128)}
    shapes |= {f"dim {dim}": {**many, "key_dim": dim} for dim in (64, 256)}
    shapes |= {f"group {group}": {**many, "group": group} for group in (1, 8)}
    shapes |= {
        f"pages of {stored}": {**many, "stored": stored}
        for stored in (torch.float8_e4m3fn, torch.int8)
    }
    shapes["every option"] = {**many, "options": everything}
    shapes["shared prefix"] = {**few, "alike": [0, 2], "options": {"shared_prefix": True}}
    shapes["float16"] = {**many, "dtype": torch.float16}
    shapes["float32"] = {**few, "dtype": torch.float32}
    chain = {"nodes": 512, "chain": True}
    shapes["chain of 512"] = chain
    shapes["chain of 512, pages of 16"] = {**chain, "page_size": 16}
    shapes["chain of 512, dim 256, window"] = {
        **chain,
        "key_dim": 256,
        "options": {"window": 100},
    }
    shapes["chain of 512, int8"] = {**chain, "stored": torch.int8}
    found: dict[str, Callable[[], object]] = {
        f"exact: {name}": partial(attend, kernels=exact, **shape) for name, shape in shapes.items()
    }
    weights = {
        "linear": [(6144, 4096), (4096, 14336)],
        "gated_linear": [(28672, 4096)],
        "project": [(128_256, 4096)],
    }
    for kind, sizes in weights.items():
        for (outputs, inputs), rows in product_of(sizes, (1, 64, 128, 256)):
            found[f"exact product: {kind} {outputs} x {inputs}, {rows} rows"] = partial(
                exact_product, kind, rows, outputs, inputs, torch.bfloat16
            )
    found["exact product: float32"] = partial(
        exact_product, "linear", 128, 6144, 4096, torch.float32
    )
    return found


def product_calls() -> dict[str, Callable[[], object]]:
    """The products of an 8B and of a 160M Llama, and every way to read a weight."""
    found: dict[str, Callable[[], object]] = {}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows in (1, 64):
        for outputs, inputs in ((6144, 4096), (4096, 14336), (1152, 768)):
            name = f"product: {outputs} x {inputs}, {rows} rows"
            found[name] = partial(product, "linear", rows, outputs, inputs, bf16)
        for outputs, inputs in ((28672, 4096), (6144, 768)):
            name = f"product: gated {outputs} x {inputs}, {rows} rows"
            found[name] = partial(product, "gated_linear", rows, outputs, inputs, bf16)
        found[f"product: whole, {rows} rows"] = partial(
            product, "project", rows, 128_256, 4096, bf16
        )
        for way, change in {
            "pipeline": {"ring": False},
            "pointers": {"ring": False, "bulk": False, "stages": 4},
        }.items():
            for kind in ("linear", "gated_linear"):
                call = partial(product, kind, rows, 28672, 4096, bf16, **change)
                found[f"product: {kind}, {way}, {rows} rows"] = call
    for rows, (outputs, inputs) in product_of((1, 64, 128, 256), ((6144, 4096), (4096, 14336))):
        found[f"product: float8 {outputs} x {inputs}, {rows} rows"] = partial(
            product, "linear", rows, outputs, inputs, bf16, float8(outputs, inputs)
        )
    for rows, blocked in ((1, False), (128, False), (1, True), (64, True)):
        found[f"product: gated float8, {rows} rows, blocks {blocked}"] = partial(
            product,
            "gated_linear",
            rows,
            28672,
            4096,
            bf16,
            float8(28672, 4096, blocked=blocked),
        )
    found["product: float8, pipeline"] = partial(
        product, "linear", 16, 6144, 4096, fp16, float8(6144, 4096), ring=False
    )
    found["product: float16"] = partial(product, "linear", 16, 6144, 4096, fp16)
    found["product: float32"] = partial(product, "linear", 16, 6144, 4096, fp32)
    found["product: gated float32"] = partial(product, "gated_linear", 16, 6144, 4096, fp32)
    return found
