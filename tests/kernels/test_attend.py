"""Attention kernels against float64, one query and its visible keys at a time.

Every input is surrounded by NaN, and so is every workspace and output; see `attention_cases`.
"""

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import exact, gpu
from tests.kernels.attention_cases import (
    BF16,
    FP16,
    FP32,
    NOWHERE,
    ON_GPU,
    QUANTISED,
    SPLITS,
    Case,
    answer,
    assert_right,
    attend,
    cuts_off,
    each_dtype,
    error_and_bound,
    needs_gpu,
    random_case,
    same,
)
from tests.kernels.memory import DEVICE, poisoned_allocations

# Shapes


EDGES = [[0, 1, 15, 16, 17], [31, 32, 33, 47, 48, 49], [63, 64, 65], [127, 0, 128, 129]]
if ON_GPU:
    EDGES += [[255, 256, 257, 0, 1000], [4095, 4096, 4097]]


@pytest.mark.some(2)
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("contexts", EDGES, ids=str)
@each_dtype
def test_contexts_end_anywhere(dtype: torch.dtype, contexts: list[int], page_size: int) -> None:
    """Ragged trees and an idle row among them."""
    sizes = [(3, 1, 5, 0)[row % 4] for row in range(len(contexts))]
    assert_right(random_case(contexts=contexts, sizes=sizes, page_size=page_size, dtype=dtype))


@pytest.mark.some(2)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@each_dtype
def test_groups_of_query_heads(dtype: torch.dtype, group: int) -> None:
    assert_right(
        random_case(contexts=[20, 70], sizes=[7, 4], group=group, kv_heads=2, dtype=dtype)
    )


DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (24, 40)]


@pytest.mark.some(3)
@pytest.mark.parametrize("nodes", [5, 12, 40] if ON_GPU else [5])
@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS, ids=str)
@each_dtype
def test_head_sizes(dtype: torch.dtype, key_dim: int, value_dim: int, nodes: int) -> None:
    assert_right(
        random_case(
            contexts=[70, 3],
            sizes=[nodes, 2],
            key_dim=key_dim,
            value_dim=value_dim,
            kv_heads=2,
            dtype=dtype,
        )
    )


@pytest.mark.some(2)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("group", [1, 4] if ON_GPU else [1])
@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256])
@each_dtype
def test_trees_of_any_size(dtype: torch.dtype, nodes: int, group: int, splits: int | None) -> None:
    case = random_case(contexts=[20, 0], sizes=[nodes, nodes // 2], group=group, dtype=dtype)
    assert_right(case, splits=splits)


@pytest.mark.parametrize("first", [0, 4])
def test_no_queries_give_nothing(first: int) -> None:
    case = random_case(contexts=[5, 3], sizes=[first, first], first=first, value_dim=24)
    assert case.attend().shape == (2, 0, 2, 24)


@pytest.mark.parametrize("max_context", [128, 1000])
def test_the_bound_of_contexts_may_be_loose(max_context: int) -> None:
    assert_right(random_case(contexts=[33, 70], sizes=[5, 3], max_context=max_context))


# Who sees what


OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 3},
    {"window": 20},
    {"window": 64},
    {"window": 1000},
    {"scale": 3.0},
    {"softcap": 1.5},
    {"sinks": True},
    {"window": 20, "softcap": 2.0, "sinks": True, "scale": 0.7},
]
VIEWS: dict[str, dict[str, Any]] = {
    "tree": {"sizes": [20, 9, 14], "reach": 3},
    "deep tree": {"sizes": [40, 9, 14], "reach": 1},
    "level": {"sizes": [40, 33, 36], "first": 31, "spare": 2},
    "chain": {"sizes": [20, 20, 20], "chain": True},
    "later chain": {"sizes": [40, 40, 40], "chain": True, "first": 33, "spare": 30},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_options_and_views(
    dtype: torch.dtype, view: str, options: dict[str, Any], splits: int | None
) -> None:
    """Windows smaller than a tree, than a block, and than a context; queries that are the last
    rows of a tree, or of a chain, with scratch rows before and after them."""
    case = random_case(contexts=[66, 0, 21], dtype=dtype, **VIEWS[view])
    if "sinks" in options:
        options = options | {"sinks": torch.tensor([-1.5, 2.5], dtype=dtype, device=DEVICE)}
    assert_right(case, splits=splits, **options)


@pytest.mark.some(3)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("stored", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_without_scores_the_output_is_the_mean_of_what_is_visible(
    dtype: torch.dtype,
    view: str,
    window: int | None,
    stored: torch.dtype | None,
    splits: int | None,
) -> None:
    """A key more or less would change every element by more than the rounding of the result.

    Random numbers hide that: a single key weighs little, and most wrong masks differ in few.
    """
    case = random_case(contexts=[77, 0, 64], dtype=dtype, stored=stored, **VIEWS[view])
    case = replace(case, query=torch.zeros_like(case.query))
    if stored is not None:  # powers of two make products with them exact
        assert case.key_scales is not None
        assert case.value_scales is not None
        case.key_scales.copy_(case.key_scales.log2().floor().exp2())
        case.value_scales.copy_(case.value_scales.log2().floor().exp2())
    rounding = torch.finfo(dtype).eps * (1.0 if cuts_off(dtype) else 0.5)
    torch.testing.assert_close(
        attend(case, window=window, splits=splits).double(),
        answer(case, window=window),
        rtol=1.01 * rounding,
        atol=1e-5,
    )


@pytest.mark.some(1)
@pytest.mark.parametrize("sinks", [None, torch.zeros(1)], ids=["plain", "sinks"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_that_sees_nothing_gives_zeros(sinks: Tensor | None, splits: int) -> None:
    case = random_case(contexts=[0, 40], sizes=[70, 5], group=1)
    case.ancestors[0, 3] = 0
    found = attend(case, sinks=None if sinks is None else sinks.to(DEVICE), splits=splits)
    assert (found[0, 3] == 0).all()
    assert found.isfinite().all()
    assert (found[0, :3] != 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@each_dtype
def test_nan_of_one_sequence_stays_there(dtype: torch.dtype) -> None:
    case = random_case(contexts=[20, 40, 64], sizes=[5, 3, 4], dtype=dtype)
    clean = attend(case)
    case.query[1] = case.key_tree[1] = case.value_tree[1] = math.nan
    found = attend(case)
    assert same(found[[0, 2]], clean[[0, 2]])
    assert found[1].isnan().all()


# Quantised pages


@pytest.mark.some(2)
@pytest.mark.parametrize("stored", QUANTISED, ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64])
@each_dtype
def test_quantised_pages(dtype: torch.dtype, page_size: int, stored: torch.dtype) -> None:
    case = random_case(
        contexts=[0, 47, 64, 129],
        sizes=[3, 1, 0, 2],
        kv_heads=2,
        page_size=page_size,
        stored=stored,
        dtype=dtype,
    )
    assert_right(case, splits=1)
    assert_right(case, splits=2, window=50, softcap=2.0)


@pytest.mark.parametrize("stored", QUANTISED, ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_small_values_in_quantised_pages(page_size: int, stored: torch.dtype) -> None:
    """Their scales are smaller than what float16 can weigh."""
    case = random_case(
        contexts=[70, 129], sizes=[2, 1], page_size=page_size, stored=stored, dtype=FP16
    )
    assert case.value_scales is not None
    small = replace(
        case, value_scales=case.value_scales * 2.0**-12, value_tree=case.value_tree * 2.0**-12
    )
    assert_right(small, splits=1)


# Calls


@each_dtype
def test_layers_share_a_layout(dtype: torch.dtype) -> None:
    """Layers that differ in window, in heads and in type leave nothing behind for the next."""
    shape: dict[str, Any] = {"contexts": [150, 0, 33], "sizes": [3, 2, 3]}
    layers = [
        (random_case(**shape, seed=0, dtype=dtype), None),
        (random_case(**shape, seed=1, dtype=dtype), 40),
        (random_case(**shape, seed=2, dtype=dtype), None),
        (random_case(**shape, seed=3, dtype=dtype, kv_heads=2, group=3), 40),
        (random_case(**shape, seed=4, dtype=FP32), None),
        (random_case(**shape, seed=5, dtype=dtype), None),
    ]
    # Pages may be elsewhere and trees different, but all layers read the same table and bits.
    layers = [
        (replace(case, page_table=layers[0][0].page_table, parents=layers[0][0].parents), window)
        for case, window in layers
    ]
    layout = layers[0][0].layout()
    with poisoned_allocations():
        found = [case.attend(layout, window=window) for case, window in layers]
    for out, (case, window) in zip(found, layers, strict=True):
        error, bound = error_and_bound(out, case, window=window)
        assert error <= bound


def test_inputs_are_left_alone() -> None:
    case = random_case(contexts=[40, 0], sizes=[5, 2], stored=torch.int8)
    before = {name: tensor.clone() for name, tensor in case.tensors().items()}
    attend(case, window=30, softcap=2.0)
    for name, tensor in case.tensors().items():
        assert same(tensor, before[name])


def test_a_call_can_be_repeated() -> None:
    case = random_case(contexts=[140, 33], sizes=[5, 3], dtype=BF16)
    assert same(attend(case), attend(case))


def test_there_are_no_kernels_for_float64() -> None:
    with pytest.raises(ValueError, match=r"no kernels for torch\.float64"):
        random_case(contexts=[4], sizes=[2], dtype=torch.float64).attend()


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `random_case` and options of the call."""
    batch = draw(st.integers(1, 3))
    most = draw(st.sampled_from([1, 3, 17, 34, 70] if ON_GPU else [1, 3, 34]))
    chain = draw(st.booleans())
    sizes = [most, *(most if chain else draw(st.integers(0, most)) for _ in range(batch - 1))]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 5), (1, 8)]))
    shape = {
        "contexts": [draw(st.integers(0, 1200 if ON_GPU else 140)) for _ in range(batch)],
        "sizes": sizes,
        "chain": chain,
        "reach": draw(st.sampled_from([1, 4, 100])),
        "first": draw(st.integers(0, most - 1)),
        "spare": draw(st.sampled_from([0, 1, 40])),
        "kv_heads": kv_heads,
        "group": group,
        "key_dim": draw(st.sampled_from([16, 64])),
        "page_size": draw(st.sampled_from([16, 48, 64])),
        "stored": draw(st.sampled_from([None, None, *QUANTISED])),
        "dtype": draw(st.sampled_from([BF16, FP16, FP32])),
        "seed": draw(st.integers(0, 99)),
    }
    options = {
        "splits": draw(st.sampled_from([1, 1, 4, None])),
        "shared_prefix": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 7, 64, 100])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
    }
    return shape, options


@settings(max_examples=60 if ON_GPU else 4, deadline=None, derandomize=True)
@given(call=calls())
def test_random_calls(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    shape, options = call
    assert_right(random_case(**shape), **options)


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_page_numbers_beyond_32_bits_of_elements(
    page_size: int, stored: torch.dtype | None
) -> None:
    """The same pages at the end of a pool of more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    case = random_case(
        contexts=[70, 150],
        sizes=[9, 3],
        key_dim=128,
        kv_heads=2,
        page_size=page_size,
        stored=stored,
        dtype=BF16,
    )
    few = len(case.key_pages)
    before = 2**31 // case.key_pages[0].numel() + 1

    def far(pool: Tensor) -> Tensor:
        whole = pool.new_zeros(before + few, *pool.shape[1:])
        whole[before:] = pool
        return whole

    real = (case.page_table >= 0) & (case.page_table < NOWHERE)
    moved = replace(
        case,
        key_pages=far(case.key_pages),
        value_pages=far(case.value_pages),
        key_scales=None if case.key_scales is None else far(case.key_scales),
        value_scales=None if case.value_scales is None else far(case.value_scales),
        page_table=torch.where(real, case.page_table + before, case.page_table),
    )
    assert same(moved.attend(), case.attend())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("kernels", [gpu, exact], ids=["gpu", "exact"])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"splits": 5}], ids=str)
@pytest.mark.parametrize("view", ["tree", "chain"])
def test_a_captured_graph_follows_its_inputs(
    view: str, options: dict[str, Any], kernels: ModuleType, shared_prefix: bool
) -> None:
    """Contexts, tables, trees and all numbers change in place; six replays reuse workspaces."""
    options = options | {"shared_prefix": shared_prefix, "kernels": kernels}

    def case_of(seed: int, contexts: list[int], sizes: list[int]) -> Case:
        return random_case(
            contexts=contexts,
            sizes=[40] * 4 if view == "chain" else sizes,
            chain=view == "chain",
            group=4,
            kv_heads=2,
            key_dim=64,
            alike=[0, *([min(contexts) // 16] * 3)],
            max_context=2000,
            dtype=BF16,
            seed=seed,
            deck_seed=seed,
        )

    turns = [
        ([1000, 3, 77, 0], [40, 3, 0, 12]),
        ([0, 0, 0, 0], [40, 40, 1, 0]),
        ([2000, 1999, 1985, 2000], [40, 17, 33, 2]),
        ([1, 2000, 0, 64], [1, 2, 40, 5]),
        ([16, 17, 300, 31], [7, 40, 40, 40]),
        ([1000, 3, 77, 0], [40, 3, 0, 12]),
    ]
    cases = [case_of(turn, *shape) for turn, shape in enumerate(turns)]
    held = case_of(99, [5, 5, 5, 5], [40, 1, 1, 1])
    held.attend(**options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [held.attend(**options) for _ in range(3)]
    for case in cases:
        for name, tensor in held.tensors().items():
            tensor.copy_(case.tensors()[name])
        for out in found:
            out.fill_(math.nan)
        graph.replay()
        expected = case.attend(**options)
        for out in found:
            assert same(out, expected)
        error, bound = error_and_bound(expected, case, window=options.get("window"))
        assert error <= bound


@pytest.mark.gpu
@needs_gpu
def test_streams_do_not_disturb_each_other() -> None:
    cases = [
        random_case(
            contexts=[3000, 100], sizes=[30, 4], kv_heads=4, key_dim=64, seed=seed, dtype=BF16
        )
        for seed in range(2)
    ]
    expected = [case.attend() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append([case.attend() for _ in range(4)])
        torch.cuda.synchronize()
        for outs, right in zip(found, expected, strict=True):
            assert all(same(out, right) for out in outs)
