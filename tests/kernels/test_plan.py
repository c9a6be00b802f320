"""Attention in pieces: right however work is divided, and whatever pages rows share. Whose bits do
not depend on that either are in `test_exact`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.attention_cases import (
    ON_GPU,
    Case,
    assert_right,
    attend,
    each_dtype,
    error_and_bound,
    line_of,
    needs_gpu,
    random_case,
    same,
)
from tests.kernels.memory import DEVICE


@pytest.mark.some(2)
@pytest.mark.parametrize("splits", [1, 2, 3, 7, None])
@pytest.mark.parametrize("view", ["tree", "later chain"])
@each_dtype
def test_any_number_of_pieces_gives_the_same(
    dtype: torch.dtype, view: str, splits: int | None
) -> None:
    """Of a context of many blocks, of one, and of none; more pieces than blocks."""
    tree = (
        {"sizes": [6, 1, 3]} if view == "tree" else {"sizes": [5] * 3, "first": 1, "chain": True}
    )
    case = random_case(contexts=[200, 0, 30], dtype=dtype, **tree)
    assert_right(case, splits=splits)
    sinks = torch.tensor([0.5, -1.0], device=DEVICE)
    assert_right(case, splits=splits, window=90, sinks=sinks)


@pytest.mark.some(1)
@pytest.mark.parametrize("splits", [16, 17, 40])
@each_dtype
def test_many_pieces(dtype: torch.dtype, splits: int) -> None:
    """More than the merge looks at together, or just as many."""
    case = random_case(contexts=[1400, 1000], sizes=[1, 2], group=1, dtype=dtype)
    assert_right(case, splits=splits)


@each_dtype
def test_pieces_of_several_row_blocks(dtype: torch.dtype) -> None:
    """The partial results of a padded last block, and of heads, lie side by side."""
    assert_right(random_case(contexts=[90], sizes=[35], group=4, dtype=dtype), splits=2)
    case = random_case(contexts=[90, 10], sizes=[9, 4], group=3, kv_heads=3, dtype=dtype)
    assert_right(case, splits=2)


@each_dtype
def test_siblings_may_stand_in_any_order(dtype: torch.dtype) -> None:
    #     0 - 1 - 3
    #      \- 2 - 4     becomes  0 - 2 - 4, 0 - 1 - 5, 4 - 3
    #           \- 5
    case = random_case(contexts=[37], sizes=[6], dtype=dtype)
    parents, order = [-1, 0, 0, 1, 2, 2], [0, 2, 1, 5, 3, 4]
    renamed = [order.index(parents[node]) if node else -1 for node in order]

    def grow(case: Case, tree: list[int]) -> Case:
        lines = [line_of(tree, node) for node in range(6)]
        words = [[sum(1 << row for row in line)] for line in lines]
        positions = torch.tensor([[37 + len(line) - 1 for line in lines]], device=DEVICE)
        return replace(
            case,
            parents=[tree],
            positions=positions,
            key_positions=positions,
            ancestors=torch.tensor([words], dtype=torch.int32, device=DEVICE),
        )

    moved = grow(
        replace(
            case,
            query=case.query[:, :, order],
            key_tree=case.key_tree[:, :, order],
            value_tree=case.value_tree[:, :, order],
        ),
        renamed,
    )
    back = torch.tensor([order.index(node) for node in range(6)], device=DEVICE)
    for options in ({}, {"window": 2}):
        found = attend(moved, **options)[:, back]
        error, bound = error_and_bound(found, grow(case, parents), **options)
        assert error <= bound


@pytest.mark.parametrize("page_size", [16, 64])
@each_dtype
def test_physical_page_numbers_do_not_matter(dtype: torch.dtype, page_size: int) -> None:
    cases = [
        random_case(
            contexts=[100, 0, 65],
            sizes=[5, 3, 1],
            page_size=page_size,
            deck_seed=deck,
            dtype=dtype,
        )
        for deck in range(2)
    ]
    assert not torch.equal(cases[0].page_table, cases[1].page_table)
    assert same(attend(cases[0]), attend(cases[1]))


SHARING: dict[str, dict[str, Any]] = {
    "all": {"contexts": [300, 272, 256, 410], "alike": [0, 16, 16, 16]},
    "neighbours": {"contexts": [300, 33, 290, 570, 600, 0], "alike": [0, 0, 0, 16, 34, 0]},
    "much": {"contexts": [600, 620], "alike": [0, 35]},
    "forks": {"contexts": [310, 310, 310], "alike": [0, 5, 5], "page_size": 64},
    "too little": {"contexts": [50, 60, 0], "alike": [0, 2, 0]},
}


@pytest.mark.some(2)
@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("group", [1, 8] if ON_GPU else [1])
@each_dtype
def test_rows_that_share_pages(
    dtype: torch.dtype, group: int, sharing: str, splits: int | None
) -> None:
    """Prefixes shared by all, by some neighbours and to different lengths, and hardly at all;
    forks share a page that is not full."""
    shape = SHARING[sharing]
    sizes = [(2, 3, 1, 0)[row % 4] for row in range(len(shape["contexts"]))]
    case = random_case(**shape, sizes=sizes, group=group, dtype=dtype)
    assert_right(case, shared_prefix=True, splits=splits)
    assert_right(case, shared_prefix=True, splits=splits, window=70)


KINDS = [(16, None), (48, torch.float8_e4m3fn), (64, torch.int8), (128, None)]
if ON_GPU:
    KINDS += [(48, None), (64, None), (128, torch.float8_e4m3fn)]


@pytest.mark.some(2)
@pytest.mark.parametrize(("page_size", "stored"), KINDS, ids=str)
@each_dtype
def test_shared_pages_of_any_kind(
    dtype: torch.dtype, page_size: int, stored: torch.dtype | None
) -> None:
    pages = 512 // page_size + 1
    tokens = pages * page_size
    case = random_case(
        contexts=[tokens, tokens + 9],
        sizes=[4, 4],
        alike=[0, pages],
        page_size=page_size,
        group=1,
        kv_heads=2,
        stored=stored,
        dtype=dtype,
    )
    sinks = torch.tensor([-1.5, 2.5], device=DEVICE)
    assert_right(case, shared_prefix=True, splits=1, softcap=2.0, sinks=sinks)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("nodes", [1, 16, 64])
@each_dtype
def test_long_contexts(dtype: torch.dtype, nodes: int, page_size: int) -> None:
    assert_right(
        random_case(
            contexts=[9000, 20000],
            sizes=[nodes, nodes],
            group=4,
            kv_heads=2,
            key_dim=128,
            page_size=page_size,
            dtype=dtype,
        )
    )
