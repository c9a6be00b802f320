"""Benchmarks of exact mode and of products, without a GPU: what is compared, what is tried."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.experiments.bench import exact, products
from specdec.experiments.figures import kernels
from specdec.kernels.gpu.stream import RING, padded_rows
from specdec.kernels.layout import Fp8Weight, Weight
from specdec.tree import MOST_LEVELS


def texts(steps: int = 64) -> exact.Texts:
    found = object.__new__(exact.Texts)
    found.lm = SimpleNamespace(vocab_size=50)  # type: ignore[assignment]
    found.options = exact.Options(steps=steps)
    found.random = torch.Generator().manual_seed(1)
    found.lengths = [10]
    found.texts = [list(range(1000, 1000 + 10 + steps + 1))]
    found.salt = torch.randint(exact.MODULUS, (7,), generator=found.random)
    return found


@pytest.mark.parametrize("nodes", [2, 8, 65, 256])
@pytest.mark.parametrize("kept", [0, 3, 31])
def test_trees_hold_the_text_in_order_among_other_tokens(nodes: int, kept: int) -> None:
    some = texts()
    for _ in range(5):
        tokens, parents, path = some._tree(0, kept, nodes)
        assert len(tokens) == len(parents) == nodes
        assert [tokens[node] for node in path] == list(range(1010 + kept, 1010 + kept + len(path)))
        assert [parents[node] for node in path] == [-1, *path[:-1]]
        assert all(token < 50 for node, token in enumerate(tokens) if node not in path)
        depths = [0]
        for node, parent in enumerate(parents[1:], 1):
            assert 0 <= parent < node
            depths.append(depths[parent] + 1)
        assert max(depths) <= MOST_LEVELS
        assert kept + len(path) <= 64  # hashes of so many steps are there


def test_a_hash_is_that_of_all_bits_in_their_places() -> None:
    some = texts()
    logits = torch.randn(3, 7, dtype=torch.bfloat16)
    other = logits.clone()
    other[1, 4] = torch.nextafter(other[1, 4], torch.tensor(9.0, dtype=torch.bfloat16))
    assert (some.hashes(logits) == some.hashes(other)).tolist() == [True, False, True]
    swapped = logits[:, [1, 0, 2, 3, 4, 5, 6]]
    assert not (some.hashes(logits) == some.hashes(swapped)).any()


def test_the_larger_roof_counts() -> None:
    head, body = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 25, bias=False)
    model: Any = torch.nn.ModuleList([head, body])
    model.get_input_embeddings = lambda: head
    model.dtype = torch.bfloat16
    lm: Any = SimpleNamespace(model=model)
    limits = {"read": 200.0, "compute": 1000.0}
    assert exact.roof_of(lm, 1, limits) == pytest.approx(1e6)  # 100 weights of 2 bytes
    assert exact.roof_of(lm, 10, limits) == pytest.approx(2e6)


@pytest.mark.parametrize("kind", ["linear", "gated_linear", "project"])
@pytest.mark.parametrize("rows", [1, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_launches_fit_and_keep_the_splits(kind: str, rows: int, itemsize: int) -> None:
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
    weight: Weight = torch.empty(6144, 4096, dtype=torch.bfloat16, device="meta")
    if itemsize == 1:
        weight = Fp8Weight(weight.to(torch.float8_e4m3fn), torch.empty(6144, device="meta"))
    found = list(products.launches(kind, x, weight))
    assert len(found) == len(set(found))
    assert found
    gated = kind == "gated_linear"
    splits = {blocks.splits for blocks in found}
    assert len(splits) == (3 if itemsize == 1 and kind == "linear" else 1)
    halves, tile = 1 + gated, padded_rows(rows, gated=gated)
    for blocks in found:
        line = halves * blocks.rows * itemsize + tile * 2
        assert line * blocks.columns * blocks.stages <= RING
        assert halves * blocks.rows * tile <= 128 * 32 * blocks.warps


def test_wrong_products_are_told() -> None:
    x, weight = torch.randn(3, 64), torch.randn(10, 64)
    right = x @ weight.T
    products.check("project", right, x, weight)
    products.check("linear", torch.stack([right / 2, right / 2]), x, weight)
    gate, up = right.chunk(2, dim=1)
    products.check("gated_linear", torch.nn.functional.silu(gate) * up, x, weight)
    with pytest.raises(ArithmeticError, match="wrong: relative error"):
        products.check("project", right.roll(1, 0), x, weight)


def test_tables() -> None:
    about: dict[str, Any] = {
        "command": "x",
        "git": {"commit": "a" * 40, "dirty": False},
        "hardware": {"gpu": "G"},
        "versions": {"torch": "1", "triton": "2"},
    }
    us = {"cuBLAS": 3.0, "ours": 2.5, "ours: 64 x 64, 4 warps, 5 stages": 2.25}
    record = {"weight": "down", "rows": 128, "roof_us": 2.0, "us": us, "faults": {}}
    text = kernels.products({**about, "products": [record]})
    assert (
        "| down | bfloat16 | 128 | 2.0 | 3.0 | 2.5 | 0.80 | 2.2: 64 x 64, 4 warps, 5 stages |"
        in text
    )
    record["fp8"] = {"roof_us": 1.0, "us": {"ours": 1.25}, "faults": {"cuBLAS": "no room"}}
    text = kernels.products({**about, "products": [record]})
    assert "| down | fp8 | 128 | 1.0 |  | 1.2 | 0.80 |  |" in text
    assert list(kernels.faults({"products": [record]})) == ["down, fp8, 128 rows: cuBLAS: no room"]
    case = {"us": {"plain": [10.0, 12.0], "exact": [11.0]}, "ratio": 1.0, "roof_us": 5.5}
    settings = {"target": "t", "dtype": "bfloat16", "context": 8}
    result = {**about, "settings": settings, "cases": {"1 x 2": case}, "bits": {"alone": [8, 0]}}
    text = kernels.exact(result)
    assert "| 1 x 2 | 11 | 11 | 1.000 | 0.50 | 0.50 |" in text
    assert "| alone | 8 | 0 |" in text
    bits = {**about, "hardware": {"gpu": "H"}, "bits": {"alone": [9, 0]}}
    text = kernels.exact(result, bits, files=("exact", "exact_bits"))
    assert "| alone | 9 | 0 |" in text
    assert "on one H, and" in text
