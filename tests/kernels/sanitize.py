"""Run every kernel once over small inputs, for NVIDIA's compute-sanitizer: it sees an access that
goes astray even where the result does not show it.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize

Ends with status 1 after naming the calls whose results were wrong.
"""

import os
import sys
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor is an allocation of its own

import torch
from torch import Tensor

from specdec.kernels import exact, gpu, reference
from tests.kernels.attention_cases import error_and_bound, random_case
from tests.kernels.compile_report import accept, judge, move, process, structure
from tests.kernels.memory import DEVICE, bits

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
# Shape of a case, options of the call.
ATTENTION: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sizes": [1, 1, 1]}, {}),
    ({"sizes": [5, 0, 2]}, {"splits": 1}),
    ({"sizes": [5, 0, 2], "page_size": 64}, {"splits": 7}),
    ({"sizes": [5, 3, 2], "page_size": 128}, {}),
    ({"sizes": [33, 7, 20], "page_size": 48, "group": 3}, {}),
    ({"sizes": [33, 7, 20], "page_size": 64, "group": 4}, {"splits": 2}),
    ({"sizes": [65, 129, 1], "group": 1}, {}),
    ({"sizes": [16, 9, 2], "page_size": 64, "group": 16}, {"window": 50}),
    ({"sizes": [9, 9, 9], "key_dim": 80}, {"softcap": 3.0}),
    ({"sizes": [9, 9, 9], "key_dim": 192, "value_dim": 128}, {}),
    ({"sizes": [3, 20, 9], "key_dim": 256, "kv_heads": 1}, {"window": 3}),
    ({"sizes": [40, 33, 36], "first": 31, "spare": 2}, {}),
    ({"sizes": [40, 40, 40], "chain": True}, {"window": 30}),
    ({"sizes": [40, 40, 40], "chain": True, "first": 33, "spare": 3}, {"splits": 3}),
    ({"sizes": [9, 2, 2], "stored": FP8, "page_size": 64}, {"window": 50, "softcap": 3.0}),
    ({"sizes": [33, 2, 2], "stored": torch.int8, "page_size": 48}, {"splits": 3}),
    ({"sizes": [9, 2, 2], "dtype": torch.float32}, {"splits": 3}),
    ({"sizes": [33, 2, 2], "dtype": torch.float16, "page_size": 64}, {}),
    ({"sizes": [5, 3, 2], "alike": [0, 17, 0]}, {"shared_prefix": True}),
    ({"sizes": [5, 3, 40], "page_size": 64, "alike": [0, 4, 4]}, {"shared_prefix": True}),
]


EXACT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sizes": [1, 1, 1]}, {}),
    ({"sizes": [5, 0, 2], "page_size": 64}, {}),
    ({"sizes": [33, 7, 20], "page_size": 48, "group": 3}, {"window": 50, "softcap": 3.0}),
    ({"sizes": [256, 9, 2], "page_size": 128, "reach": 100}, {}),
    ({"sizes": [9, 9, 9], "key_dim": 192, "value_dim": 128}, {}),
    ({"sizes": [40, 33, 36], "first": 31, "spare": 2}, {}),
    ({"sizes": [200] * 3, "chain": True}, {"window": 100}),
    ({"sizes": [200] * 3, "chain": True, "first": 33, "stored": torch.int8}, {}),
    ({"sizes": [9, 2, 2], "stored": FP8, "page_size": 64}, {}),
    ({"sizes": [9, 2, 2], "dtype": torch.float32}, {}),
    ({"sizes": [5, 3, 40], "page_size": 64, "alike": [0, 4, 4]}, {"shared_prefix": True}),
]


def attention_is_right(
    shape: dict[str, Any], options: dict[str, Any], kernels: ModuleType = gpu
) -> bool:
    case = random_case(
        **{
            "contexts": [310, 290, 260],
            "kv_heads": 2,
            "key_dim": 128,
            "dtype": torch.bfloat16,
            **shape,
        }
    )
    alone: dict[str, Any] = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in case.tensors().items()
    }
    case = replace(case, **alone)  # guards would hide an access that strays a little
    found = case.attend(kernels=kernels, **options)
    answered = {name: options[name] for name in ("window", "softcap") if name in options}
    error, bound = error_and_bound(found, case, **answered)
    return error <= bound


def exact_product_is_right(name: str, rows: int, dtype: torch.dtype) -> bool:
    """To a few roundings of the type; with tiles that are not full."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1000, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(136, 1000, generator=generator) / 32).to(DEVICE, dtype)
    found = getattr(exact, name)(x, weight).double()
    expected = getattr(reference, name)(x.double(), weight.double())
    if name == "linear":
        found, expected = found.sum(0), expected.sum(0)
    bound = 8 * max(torch.finfo(dtype).eps, 2e-7) * float(expected.abs().max())
    return float((found - expected).abs().max()) <= bound


def all_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(bits(a.cpu()), bits(b)) for a, b in pairs)


def acceptance_is_right(rule: str, dtype: torch.dtype) -> bool:
    path, length, token = (tensor.tolist() for tensor in accept(rule, dtype))
    return path[0] == list(range(16)) and length == [16, 0] and token == [16, 0]


def judgement_is_right(support: int, dtype: torch.dtype, repeats: bool) -> bool:
    """To a few more bits than rounding takes; no coin is so near."""
    found = judge(support, dtype, repeats)
    expected = judge(support, dtype, repeats, reference, CPU)
    return all_equal(found[:2], expected[:2]) and all(
        torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(found[2:], expected[2:], strict=True)
    )


def main() -> None:
    if DEVICE.type != "cuda":
        sys.exit("tests.kernels.sanitize: needs an NVIDIA GPU")
    right = {
        f"{shape} {options}": attention_is_right(shape, options) for shape, options in ATTENTION
    }
    for shape, options in EXACT:
        right[f"exact {shape} {options}"] = attention_is_right(shape, options, exact)
    for name, rows in product(("linear", "project", "gated_linear"), (1, 33, 129, 300)):
        for dtype in (torch.bfloat16, torch.float32):
            good = exact_product_is_right(name, rows, dtype)
            right[f"exact {name} of {rows} rows, {dtype}"] = good
    for nodes in (1, 33, 256):
        right[f"structure of {nodes}"] = all_equal(
            structure(nodes, gpu), structure(nodes, reference, CPU)
        )
    for stored in (None, FP8, torch.int8):
        right[f"pages of {stored}"] = all_equal(move(stored, gpu), move(stored, reference, CPU))
    for dtype in (torch.bfloat16, torch.float32):
        right[f"process {dtype}"] = all_equal(process(dtype, gpu), process(dtype, reference, CPU))
    for rule in gpu.RULES:
        for dtype in (torch.bfloat16, torch.float32):
            right[f"{rule} {dtype}"] = acceptance_is_right(rule, dtype)
    for support in (5, 64, 1024):
        for dtype, repeats in ((torch.bfloat16, False), (torch.float32, True)):
            name = f"judgement of {support} candidates, {dtype}"
            right[name] = judgement_is_right(support, dtype, repeats)
    torch.cuda.synchronize()
    wrong = [name for name, good in right.items() if not good]
    print(f"{len(right)} calls, {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
