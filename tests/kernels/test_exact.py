"""Exact kernels: attention is right, and the bits of a query follow from its own prefix alone.

What is right is what `test_attend` says; where a query stands is what `exact_cases` says.
"""

import importlib
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels import exact
from specdec.kernels.exact import attend as exact_attend
from specdec.kernels.exact import pieces
from specdec.kernels.exact.pieces import REACH, TAIL, pieces_before
from specdec.tree import MOST_LEVELS
from tests.kernels.attention_cases import (
    BF16,
    FP16,
    FP32,
    ON_GPU,
    QUANTISED,
    assert_right,
    attend,
    each_dtype,
    error_and_bound,
    random_case,
    random_parents,
    same,
)
from tests.kernels.exact_cases import (
    Row,
    Text,
    alone,
    chained,
    in_tree,
    parted,
    plant,
    random_text,
    scene,
)
from tests.kernels.memory import DEVICE, poisoned_allocations

pytestmark = pytest.mark.usefixtures("ordered_products")
BOTH = [FP16, BF16, FP32] if ON_GPU else [FP16, FP32]
TOKENS = 820

# Right

EDGES = [
    [0, 1, 63, 64, 65],
    [127, 128, 129],
    [191, 192, 193],
    [1023, 1024, 1025],
    [2049, 2047],
]


@pytest.mark.some(2)
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("contexts", EDGES, ids=str)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_contexts_end_anywhere(dtype: torch.dtype, contexts: list[int], page_size: int) -> None:
    """At borders of the tail, of blocks and of pieces; ragged trees and an idle row among them."""
    sizes = [(1, 2, 2, 0)[row % 4] for row in range(len(contexts))]
    case = random_case(contexts=contexts, sizes=sizes, page_size=page_size, dtype=dtype)
    assert_right(case, kernels=exact)


VIEWS: dict[str, dict[str, Any]] = {
    "tree": {"sizes": [4, 2, 4], "reach": 2},
    "path": {"sizes": [65, 40, 65], "reach": 1, "first": 61},
    "wide": {"sizes": [256, 33, 256], "reach": 1000, "first": 252, "spare": 0},
    "level": {"sizes": [40, 33, 36], "first": 37, "spare": 2},
    "chain": {"sizes": [4, 4, 4], "chain": True},
    "later chain": {"sizes": [140] * 3, "chain": True, "first": 136, "spare": 30},
    "long chain": {"sizes": [330] * 3, "chain": True, "first": 327},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3},
    {"window": 64},
    {"window": 200},
    {"softcap": 1.5},
    {"sinks": True},
    {"window": 100, "softcap": 2.0, "sinks": True, "scale": 0.7},
]


@pytest.mark.some(3)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_options_and_views(dtype: torch.dtype, view: str, options: dict[str, Any]) -> None:
    """Windows smaller than a tail, and than a piece; paths as long as may be; chains that reach
    further back into the scratch than a tail."""
    case = random_case(contexts=[150, 0, 330], dtype=dtype, **VIEWS[view])
    if "sinks" in options:
        options = options | {"sinks": torch.tensor([-1.5, 2.5], dtype=dtype, device=DEVICE)}
    assert_right(case, kernels=exact, **options)


SHAPES: list[dict[str, Any]] = [
    *({"group": group, "kv_heads": 2} for group in (1, 3, 7)),
    {"group": 16},
    *({"key_dim": dim} for dim in (64, 80, 128, 256)),
    {"key_dim": 192, "value_dim": 128},
    {"key_dim": 24, "value_dim": 40},
]


@pytest.mark.some(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_heads(dtype: torch.dtype, shape: dict[str, Any]) -> None:
    case = random_case(contexts=[200, 3], sizes=[3, 2], dtype=dtype, **shape)
    assert_right(case, kernels=exact)


@each_dtype
def test_rows_that_begin_anywhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys next to a query come by one load if rows are aligned, else by two: the same bits."""
    case = random_case(contexts=[200, 3], dtype=dtype, **VIEWS["path"] | {"sizes": [65, 40]})
    found = attend(case, kernels=exact)
    monkeypatch.setattr(exact_attend, "_aligned", lambda rows: False)
    assert same(found, attend(case, kernels=exact))


@pytest.mark.some(2)
@pytest.mark.parametrize("view", ["tree", "later chain"])
@pytest.mark.parametrize("stored", QUANTISED, ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_quantised_pages(
    dtype: torch.dtype, page_size: int, stored: torch.dtype, view: str
) -> None:
    case = random_case(
        contexts=[0, 147, 264], page_size=page_size, stored=stored, dtype=dtype, **VIEWS[view]
    )
    assert_right(case, kernels=exact, window=150, softcap=2.0)


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(
    ("contexts", "alike", "page_size"),
    [
        ([300, 272, 256, 410], [0, 16, 16, 16], 16),
        ([300, 33, 290, 570, 600, 0], [0, 0, 0, 16, 34, 0], 16),
        ([350, 350, 350], [0, 6, 6], 64),
        ([50, 60, 0], [0, 2, 0], 16),
    ],
    ids=str,
)
def test_rows_that_share_pages(
    dtype: torch.dtype, contexts: list[int], alike: list[int], page_size: int
) -> None:
    """By all, by some, in a page that is not full, hardly at all."""
    sizes = [(2, 1, 2, 0)[row % 4] for row in range(len(contexts))]
    case = random_case(
        contexts=contexts, alike=alike, sizes=sizes, page_size=page_size, dtype=dtype
    )
    assert_right(case, kernels=exact, shared_prefix=True)
    assert_right(case, kernels=exact, shared_prefix=True, window=70)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    case = random_case(contexts=[0, 40], sizes=[5, 5], group=1)
    case.ancestors[0, 3] = 0
    found = attend(case, kernels=exact, sinks=torch.zeros(1, device=DEVICE))
    assert (found[0, 3] == 0).all()
    assert found.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_of_one_sequence_stays_there() -> None:
    case = random_case(contexts=[20, 140, 204], sizes=[2, 2, 1])
    clean = attend(case, kernels=exact)
    case.query[1] = case.key_tree[1] = case.value_tree[1] = math.nan
    found = attend(case, kernels=exact)
    assert same(found[[0, 2]], clean[[0, 2]])
    assert found[1].isnan().all()


def test_no_queries_give_nothing() -> None:
    case = random_case(contexts=[5, 3], sizes=[4, 4], first=4, value_dim=24)
    assert case.attend(kernels=exact).shape == (2, 0, 2, 24)


def test_layers_share_a_layout() -> None:
    """Layers that differ in window, heads and type leave nothing behind for the next."""
    shape: dict[str, Any] = {"contexts": [210], "sizes": [2]}
    layers = [
        (random_case(**shape, dtype=FP16), None),
        (random_case(**shape, seed=1, dtype=FP16), 40),
        (random_case(**shape, seed=3, dtype=FP16, kv_heads=2, group=1), 40),
        (random_case(**shape, seed=4, dtype=FP32), None),
    ]
    first = layers[0][0]
    layers = [
        (replace(case, page_table=first.page_table, parents=first.parents), window)
        for case, window in layers
    ]
    layout = first.layout()
    with poisoned_allocations():
        found = [case.attend(layout, kernels=exact, window=window) for case, window in layers]
    for out, (case, window) in zip(found, layers, strict=True):
        error, bound = error_and_bound(out, case, window=window)
        assert error <= bound
        assert same(out, attend(case, kernels=exact, window=window))


# Equal bits


@pytest.mark.some(2)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("page_size", "stored"), [(16, None), *((48, s) for s in QUANTISED)])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_a_token_is_the_same_in_every_place(
    dtype: torch.dtype, page_size: int, stored: torch.dtype | None, options: dict[str, Any]
) -> None:
    text = random_text(TOKENS, dtype, stored=stored)
    if "sinks" in options:
        options = options | {"sinks": torch.tensor([-1.5, 2.5], dtype=dtype, device=DEVICE)}
    for position in (211, 320) if ON_GPU else (320,):
        assert parted(text, position, options, page_size=page_size, stored=stored) == []


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_every_token_of_a_chunk(dtype: torch.dtype) -> None:
    """As prefill computes them: 200 of them, or fewer at a time."""
    text = random_text(300, dtype, group=1)
    at_once = 200 if ON_GPU else 20
    chunk = scene([chained(text, 60, 200)], first=200 - at_once, chain=True)
    found = chunk.attend(kernels=exact)[0]
    for begin, count in ((260 - at_once, at_once // 2), (260 - at_once // 2, at_once // 2 - 1)):
        half = scene([chained(text, begin, count)], chain=True).attend(kernels=exact)[0]
        place = begin - (260 - at_once)
        assert same(half, found[place : place + count])
    assert same(alone(text, 259), found[-1])


def test_every_node_of_a_path_in_a_wide_tree() -> None:
    """Which stands anywhere in the tree, its keys wherever it likes."""
    generator = torch.Generator().manual_seed(1)
    text = random_text(200, FP32, group=1)
    parents = random_parents(40, 40, 3, generator)
    row = in_tree(text, 190, parents, 37)
    found = scene([row], page_size=32).attend(kernels=exact)[0]
    chain = scene([chained(text, row.context, 191 - row.context)], chain=True)
    expected = chain.attend(kernels=exact)[0]
    nodes = [node for node, token in enumerate(row.tokens) if token >= 0]
    assert len(nodes) >= 8
    assert same(found[nodes], expected)


@pytest.mark.parametrize("context", [2300, 5000] if ON_GPU else [2300])
def test_pieces_of_many_keys(context: int) -> None:
    text = random_text(context + 2, FP16, group=1)
    expected = alone(text, context)
    tree = in_tree(text, context, [-1, 0, 1, 0, 3, 4], 5)
    assert same(scene([tree], first=5, page_size=128).attend(kernels=exact)[0, 0], expected)


@pytest.mark.parametrize("processors", [1, 132])
def test_however_work_is_divided(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between more or fewer programs, and with partial results of a few nodes at a time."""
    case = random_case(contexts=[600, 130], sizes=[2, 1])
    expected = attend(case, kernels=exact)
    monkeypatch.setattr(pieces, "processors", lambda device: processors)
    monkeypatch.setattr(exact_attend, "WORKSPACE", 1 if processors == 1 else 2**29)
    assert same(attend(case, kernels=exact), expected)
    assert same(attend(case.rows([1, 0]), kernels=exact), expected[[1, 0]])


@st.composite
def places(draw: st.DrawFn) -> tuple[Text, int, list[Row], int, int, dict[str, Any]]:
    """A text, a position; rows among which it stands, in which, its scratch row; how."""
    text = random_text(TOKENS, draw(st.sampled_from(BOTH)), seed=draw(st.integers(0, 3)))
    position = draw(st.integers(0, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chain = draw(st.booleans())
    batch = draw(st.integers(1, 3 if ON_GPU else 2))
    if chain:
        node = draw(st.integers(0, min(position, 199)))
        nodes = node + 1 + draw(st.integers(0, 2))
        target = chained(text, position - node, nodes)
        others = [
            chained(text.fork(5), draw(st.integers(0, 300)), nodes) for _ in range(batch - 1)
        ]
    else:
        nodes, reach = draw(st.integers(2, 40)), draw(st.sampled_from([1, 2, 5, 40]))
        node = draw(st.integers(0, min(nodes - 1, position)))
        grown = [random_parents(nodes, nodes, reach, generator) for _ in range(batch)]
        target = in_tree(text, position, grown[0], node)
        others = [in_tree(text.fork(5), 300, parents, nodes - 1) for parents in grown[1:]]
    row = draw(st.integers(0, batch - 1))
    rows = [*others[:row], target, *others[row:]]
    how = {
        "chain": chain,
        "first": draw(st.integers(0 if ON_GPU else max(0, node - 1), node)),
        "page_size": draw(st.sampled_from([16, 48, 64, 128])),
        "deck_seed": draw(st.integers(0, 9)),
        "max_context": draw(st.sampled_from([None, 2000])),
    }
    return text, position, rows, row, node, how


@settings(max_examples=100 if ON_GPU else 4, deadline=None, derandomize=True)
@given(place=places())
def test_a_token_is_the_same_anywhere(
    place: tuple[Text, int, list[Row], int, int, dict[str, Any]],
) -> None:
    text, position, rows, row, node, how = place
    found = scene(rows, **how).attend(kernels=exact)[row, node - how["first"]]
    assert same(found, alone(text, position))


# Faults


BLOCK_OF = "piece_start(piece{}) // BLOCK_N"
SHIFTED = (
    "(piece_start(piece{0}) + (context // 64 % 2) * tl.where(piece{0} > 0, 64, 0)) // BLOCK_N"
)
# Of each: places that show it, and what is changed.
FAULTS: dict[str, tuple[set[str], list[tuple[str, str, str]]]] = {
    "a border of pieces that follows what is committed": (
        {"tree", "batch"},
        [("context", BLOCK_OF.format(end), SHIFTED.format(end)) for end in ("", " + 1")],
    ),
    "a merge in the order in which a batch arrives": (
        {"batch"},
        [("merge", "(base + i) * step", "((base + i + sequence) % pieces) * step")],
    ),
    "slots of the tail counted from the context": (
        {"tree", "short chain"},
        [
            ("tail", "+ tl.arange(0, SLOTS)\n", "+ (tl.arange(0, SLOTS) + context * 8) % SLOTS\n"),
            ("tail", "index = begin + offs", "index = begin + (offs + context * 8) % SLOTS"),
        ],
    ),
    "a tail that begins where the committed tokens want it": (
        {"tree", "chain"},
        [
            (module, "tail_begin(position)", "tail_begin(tl.minimum(position, context))")
            for module in ("tail", "context")
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, tmp_path: Path) -> None:
    """The result is right still; but not the same in every place."""
    shows, edits = FAULTS[fault]
    kernels = plant(tmp_path, *edits)
    assert_right(random_case(contexts=[320, 260], sizes=[2, 2]), kernels=kernels)
    text = random_text(400, FP32)
    assert set(parted(text, 322, kernels=kernels, only=shows)) == shows


def test_partial_results_are_added_up_in_their_order(tmp_path: Path) -> None:
    """2**24 + 1 - 2**24 + 1 is 1 in float32 from the left, and 2 from the right."""
    numbers = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0], device=DEVICE) * 4
    backwards = plant(tmp_path, ("merge", "(base + i) * step", "(pieces - 1 - base - i) * step"))
    for kernels, expected in ((exact, 1.0), (backwards, 2.0)):
        merge = importlib.import_module(f"{kernels.__name__}.attend").merge
        out = torch.empty(1, 1, 1, 16, device=DEVICE)
        spans = torch.tensor([[0, 4]], dtype=torch.int32, device=DEVICE)
        weights = torch.zeros(4, 1, 1, device=DEVICE)
        partial = numbers[:, None, None, None].expand(4, 1, 1, 16).contiguous()
        merge(out, partial, weights, None, spans=spans, most=4, always=True)
        assert (out == expected).all()


# Where pieces begin


@triton.jit
def borders_kernel(positions_ptr, until_ptr, start_ptr, tail_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    position = tl.load(positions_ptr + offs, mask=mask, other=0)
    until = pieces.pieces_until(position)
    tl.store(until_ptr + offs, until, mask=mask)
    tl.store(start_ptr + offs, pieces.piece_start(until), mask=mask)
    tl.store(tail_ptr + offs, pieces.tail_begin(position), mask=mask)


def test_borders_of_pieces() -> None:
    """On the device as on the host, by a list that is counted through."""
    near = [2**power + step for power in range(12, 21) for step in range(-130, 131)]
    numbers = sorted({*range(5001), *near})
    positions = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    until, start, tail = (torch.full_like(positions, -1) for _ in range(3))
    grid = (triton.cdiv(len(numbers), 4096),)
    borders_kernel[grid](positions, until, start, tail, len(numbers), BLOCK=4096)
    borders = [0]
    while borders[-1] <= numbers[-1]:
        unit = 128 << max((borders[-1] // 128).bit_length() - 4, 0)
        borders.append(borders[-1] + unit)
    assert borders[:19] == [128 * piece for piece in range(17)] + [2304, 2560]
    expected = torch.bucketize(torch.tensor(numbers), torch.tensor(borders)).tolist()
    assert [pieces_before(number) for number in numbers] == expected
    assert until.tolist() == expected
    assert start.tolist() == [borders[count] for count in expected]
    for begin, end in pairwise(borders):
        assert 0 < end - begin <= max(128, begin / 8)
    tails = [max(number - REACH, 0) // 64 * 64 for number in numbers]
    assert tail.tolist() == tails
    assert max(n - t for n, t in zip(numbers, tails, strict=True)) < TAIL
    assert min(n - t for n, t in zip(numbers, tails, strict=True) if t) == REACH
    assert REACH >= MOST_LEVELS  # so that the root of a tree is in the tail of every node
