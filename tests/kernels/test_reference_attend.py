"""Attention in torch, which defines what the kernels compute, against loops in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.reference_cases import (
    PAGE_SIZE,
    RAGGED,
    Case,
    ancestors_of,
    oracle,
    random_case,
    visible_keys,
)


@pytest.mark.parametrize("kv_heads", [4, 1], ids=["group1", "group4"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 1.5}, {"scale": 0.7}], ids=str)
def test_attention_equals_the_oracle(kv_heads: int, options: dict[str, float]) -> None:
    case = random_case(**RAGGED, kv_heads=kv_heads)
    torch.testing.assert_close(
        case.run(**options), oracle(case, **options), rtol=1e-12, atol=1e-12
    )


def test_grouped_heads_use_their_own_key_heads() -> None:
    case = random_case(**RAGGED, heads=6, kv_heads=2, seed=1)
    torch.testing.assert_close(case.run(), oracle(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[63], [64], [33, 65]])
def test_trees_of_several_words(sizes: list[int]) -> None:
    case = random_case(contexts=[3] * len(sizes), sizes=sizes, heads=2, kv_heads=1, key_dim=4)
    torch.testing.assert_close(case.run(), oracle(case), rtol=1e-12, atol=1e-12)


def test_keys_and_values_of_different_size() -> None:
    case = random_case(**RAGGED, key_dim=6, value_dim=10, seed=2)
    assert case.run().shape == (5, 7, 4, 10)
    torch.testing.assert_close(case.run(), oracle(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_their_share(window: int | None) -> None:
    case = random_case(**RAGGED, seed=3)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    found = case.run(sinks=sinks, window=window)
    torch.testing.assert_close(
        found, oracle(case, sinks=sinks, window=window), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_window_counts_positions_and_not_rows(window: int) -> None:
    """Siblings share a position, so a row's index says nothing about its distance."""
    case = random_case(contexts=[6, 0, 9], sizes=[12, 12, 4], seed=4)
    torch.testing.assert_close(
        case.run(window=window), oracle(case, window=window), rtol=1e-12, atol=1e-12
    )


def test_everything_at_once() -> None:
    case = random_case(**RAGGED, heads=6, kv_heads=3, key_dim=6, value_dim=4, seed=5)
    options = {"window": 5, "softcap": 2.0, "sinks": torch.linspace(-1, 1, 6), "scale": 0.5}
    torch.testing.assert_close(
        case.run(**options), oracle(case, **options), rtol=1e-12, atol=1e-12
    )


def chain_case(*, first: int, queries: int) -> Case:
    """Query i sees scratch rows 0 .. first + i; the rows before `first` come from earlier."""
    rows = first + queries
    case = random_case(contexts=[5, 0, 4], sizes=[rows] * 3, seed=6)
    lengths = torch.tensor(case.contexts)[:, None]
    return replace(
        case,
        query=case.query[:, :, first:],
        positions=lengths + torch.arange(first, rows),
        key_positions=lengths + torch.arange(rows),
        visible=[[set(range(first + i + 1)) for i in range(queries)] for _ in range(3)],
        first=first,
        chain=True,
    )


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_no_ancestors_means_a_causal_chain(first: int, window: int | None) -> None:
    case = chain_case(first=first, queries=4)
    found = case.run(window=window)
    torch.testing.assert_close(found, oracle(case, window=window), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, replace(case, chain=False).run(window=window))


@pytest.mark.parametrize("window", [None, 3])
def test_later_queries_alone_give_what_all_give(window: int | None) -> None:
    """The last rows of a tree as queries, with `first` > 0, as when trees grow level by level."""
    whole = random_case(contexts=[5, 9], sizes=[10, 7], seed=7)
    part = replace(
        whole,
        query=whole.query[:, :, 6:],
        positions=whole.positions[:, 6:],
        visible=[nodes[6:] for nodes in whole.visible],
        first=6,
    )
    torch.testing.assert_close(
        part.run(window=window), whole.run(window=window)[:, 6:], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        part.run(window=window), oracle(part, window=window), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_torch_in_the_same_type(dtype: torch.dtype) -> None:
    case = random_case(**RAGGED, key_dim=16, value_dim=16, dtype=dtype, seed=8)
    exact = oracle(case)
    found = case.run()
    assert found.dtype == dtype
    theirs = torch.empty_like(found)
    batch, heads, queries, _ = case.query.shape
    for sequence in range(batch):
        for head in range(heads):
            for node in range(queries):
                keys, values = visible_keys(case, sequence, head // 2, node, None)
                theirs[sequence, node, head] = torch.nn.functional.scaled_dot_product_attention(
                    case.query[sequence, head, node][None], keys.to(dtype), values.to(dtype)
                )[0]
    error = (found.double() - exact).abs().max()
    assert float(error) <= 2 * float((theirs.double() - exact).abs().max())
    # Computed in float32, so nothing is lost but the rounding of the output.
    rounding = 0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * rounding, atol=1e-6)


def test_float32_is_computed_in_float32_and_float64_in_float64() -> None:
    case = random_case(**RAGGED, seed=9)
    exact = oracle(case)
    single = case.to(torch.float32).run()
    assert single.dtype == torch.float32
    assert 1e-12 < float((single.double() - exact).abs().max()) < 1e-5
    assert case.run().dtype == torch.float64


@pytest.mark.some(3)
@pytest.mark.parametrize("part", ["query", "keys"])
def test_without_scores_the_output_is_the_mean_of_what_is_visible(part: str) -> None:
    case = random_case(**RAGGED, seed=10)
    if part == "query":
        case = replace(case, query=torch.zeros_like(case.query))
    else:
        case = replace(
            case,
            key_pages=torch.zeros_like(case.key_pages),
            key_tree=torch.zeros_like(case.key_tree),
        )
    found = case.run()
    for sequence in range(5):
        for node in range(7):
            _, values = visible_keys(case, sequence, 1, node, None)
            torch.testing.assert_close(found[sequence, node, 3], values.mean(0))


def test_physical_page_numbers_do_not_matter() -> None:
    case = random_case(**RAGGED, seed=11).to(torch.float32)
    pages = case.key_pages.shape[0]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(order)
    place[order] = torch.arange(pages)
    table = torch.where(case.page_table < 0, -1, place[case.page_table.clamp(min=0).long()])
    moved = replace(
        case,
        key_pages=case.key_pages[order],
        value_pages=case.value_pages[order],
        page_table=table.int(),
    )
    assert not torch.equal(moved.page_table, case.page_table)
    assert torch.equal(moved.run(), case.run())


@pytest.mark.parametrize("contexts", [[0, 1, 4, 9, 11], [9], [0]], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_nan_in_what_is_not_theirs_never_leaks(contexts: list[int], window: int | None) -> None:
    """Pages nobody holds, the empty end of a last page, and table entries past the context."""
    case = random_case(contexts=contexts, sizes=[5, 1, 3, 7, 2][: len(contexts)], seed=12)
    clean = case.run(window=window)
    used = torch.zeros(case.key_pages.shape[0], PAGE_SIZE, dtype=torch.bool)
    for sequence, context in enumerate(contexts):
        for position in range(context):
            page = int(case.page_table[sequence, position // PAGE_SIZE])
            used[page, position % PAGE_SIZE] = True
    poison = ~used[:, None, :, None]
    unused_page = int((~used.any(1)).nonzero()[0])
    dirty = replace(
        case,
        key_pages=case.key_pages.masked_fill(poison, math.nan),
        value_pages=case.value_pages.masked_fill(poison, math.nan),
        page_table=case.page_table.masked_fill(case.page_table < 0, unused_page),
    )
    assert torch.equal(dirty.run(window=window), clean)


@pytest.mark.parametrize("contexts", [[5, 2], [5]], ids=str)
def test_max_context_is_only_a_bound(contexts: list[int]) -> None:
    """A bound larger than any context, with NaN in the pages between."""
    case = random_case(contexts=contexts, sizes=[4, 2][: len(contexts)], seed=13)
    clean = case.run()
    key_pages, value_pages = case.key_pages.clone(), case.value_pages.clone()
    extra = [p for p in range(len(key_pages)) if p not in set(case.page_table.flatten().tolist())]
    for row, context in enumerate(contexts):
        if context % PAGE_SIZE:
            page = int(case.page_table[row, context // PAGE_SIZE])
            value_pages[page, :, context % PAGE_SIZE :] = math.nan
            key_pages[page, :, context % PAGE_SIZE :] = math.nan
    key_pages[extra] = value_pages[extra] = math.nan
    table = torch.nn.functional.pad(case.page_table, (0, 1), value=-1)
    loose = replace(
        case,
        key_pages=key_pages,
        value_pages=value_pages,
        page_table=table.masked_fill(table < 0, extra[0]).int(),
    )
    torch.testing.assert_close(loose.run(max_context=10), clean, rtol=1e-12, atol=1e-12)


def test_nan_in_scratch_of_another_sequence_never_leaks() -> None:
    case = random_case(contexts=[5, 2, 0], sizes=[4, 4, 4], seed=14)
    clean = case.run()
    key_tree, value_tree = case.key_tree.clone(), case.value_tree.clone()
    key_tree[1] = value_tree[1] = math.nan
    found = replace(case, key_tree=key_tree, value_tree=value_tree).run()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])
    assert found[1].isnan().all()


@pytest.mark.parametrize("batch", [1, 2])
def test_scratch_rows_that_no_query_sees_may_hold_anything(batch: int) -> None:
    """Rows of earlier levels that have no descendants among the queries."""
    case = random_case(contexts=[5, 2][:batch], sizes=[8, 8][:batch], seed=15)
    part = replace(
        case,
        query=case.query[:, :, 7:],
        positions=case.positions[:, 7:],
        visible=[nodes[7:] for nodes in case.visible],
        first=7,
    )
    key_tree, value_tree = case.key_tree.clone(), case.value_tree.clone()
    for sequence in range(batch):
        unseen = sorted(set(range(8)) - part.visible[sequence][0])
        assert unseen
        key_tree[sequence, :, unseen] = value_tree[sequence, :, unseen] = math.nan
    dirty = replace(part, key_tree=key_tree, value_tree=value_tree)
    torch.testing.assert_close(dirty.run(), part.run(), rtol=1e-12, atol=1e-12)


@pytest.mark.some(1)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["plain", "sinks"])
def test_a_query_that_sees_nothing_gives_zeros(batch: int, sinks: Tensor | None) -> None:
    case = random_case(contexts=[0, 6][:batch], sizes=[3, 3][:batch], seed=16)
    case.visible[0][2] = set()
    found = case.run(sinks=sinks)
    assert (found[0, 2] == 0).all()
    assert found.isfinite().all()
    assert (found[0, :2] != 0).any()


def test_removing_a_subtree_leaves_the_others_unchanged() -> None:
    """A root with two branches; the second is cut off, and the rest must not notice."""
    case = random_case(contexts=[5], sizes=[6], seed=17)
    #     0 - 1 - 2
    #      \- 3 - 4 - 5
    parents = [-1, 0, 1, 0, 3, 4]
    visible = [[set(ancestors_of(parents, node)) for node in range(6)]]
    positions = torch.tensor([[5, 6, 7, 6, 7, 8]])
    whole = replace(case, visible=visible, positions=positions, key_positions=positions)
    cut = replace(
        whole,
        query=whole.query[:, :, :3],
        key_tree=whole.key_tree[:, :, :3],
        value_tree=whole.value_tree[:, :, :3],
        positions=positions[:, :3],
        key_positions=positions[:, :3],
        visible=[visible[0][:3]],
    )
    torch.testing.assert_close(whole.run()[:, :3], cut.run(), rtol=1e-13, atol=1e-13)
    changed = replace(
        whole,
        key_tree=whole.key_tree.index_fill(2, torch.tensor([3, 4, 5]), 9.0),
        value_tree=whole.value_tree.index_fill(2, torch.tensor([3, 4, 5]), 9.0),
    )
    assert torch.equal(changed.run()[:, :3], whole.run()[:, :3])
    assert not torch.equal(changed.run()[:, 3:], whole.run()[:, 3:])


def test_inputs_are_left_alone() -> None:
    case = random_case(**RAGGED, seed=18)
    names = ("query", "key_pages", "value_pages", "key_tree", "value_tree", "page_table")
    before = {name: getattr(case, name).clone() for name in names}
    case.run(window=3, softcap=2.0, sinks=torch.zeros(4))
    for name, tensor in before.items():
        assert torch.equal(getattr(case, name), tensor)
