"""Moves of keys and values by both implementations against loops in plain Python.

Whatever a move must not read holds NaN or an index far out of range, and whatever it may write has
guards around it that are compared along with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.kernels.reference.cache import LARGEST
from tests.kernels.memory import raw
from tests.kernels.test_rounding import stored_by_hand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 512
NOWHERE = 10**9  # an index that must not be followed
QUANTISED = [torch.float8_e4m3fn, torch.int8]
LAYERS, HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM = 2, 3, 4, 8, 5
both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")


class Guarded:
    """Random numbers of a type, with as random a guard before and behind them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = torch.Size(shape).numel()
        numbers = torch.randn(count + 2 * GUARD, generator=generator) * 20
        self.shape, self.memory = shape, numbers.to(dtype).to(DEVICE)
        self.before = self.memory.clone()

    def view(self, memory: Tensor) -> Tensor:
        return memory[GUARD : GUARD + torch.Size(self.shape).numel()].view(self.shape)

    @property
    def tensor(self) -> Tensor:
        return self.view(self.memory)

    def assert_changed_only_by(self, change: Callable[[Tensor], None]) -> None:
        """What `change` does to the tensor is all that has happened to the memory."""
        expected = self.before.clone()
        change(self.view(expected))
        assert torch.equal(raw(self.memory), raw(expected))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sequences in pages: their table, of which only used entries are legal, and lengths."""

    table: list[list[int]]
    start: list[int]
    length: list[int]
    pages: int

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        return self.table[sequence][position // PAGE_SIZE], position % PAGE_SIZE

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As kernels take them: length, page_table, start."""
        return (
            torch.tensor(self.length, device=DEVICE),
            torch.tensor(self.table, dtype=torch.int32, device=DEVICE),
            torch.tensor(self.start, dtype=torch.int32, device=DEVICE),
        )


def rows(*, start: list[int], length: list[int], end: list[int], seed: int = 0) -> Rows:
    """Pages for the positions 0 .. end of each sequence, dealt out in random order."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-tokens // PAGE_SIZE) for tokens in end]
    pages = sum(needed) + 3
    deck = torch.randperm(pages, generator=generator).tolist()
    width = max([*needed, 1]) + 2
    table = [[deck.pop() for _ in range(n)] + [NOWHERE] * (width - n) for n in needed]
    return Rows(table=table, start=start, length=length, pages=pages)


RAGGED = rows(
    start=[0, 3, 4, 7, 5, 11], length=[5, 1, 0, 2, 3, 5], end=[5, 4, 0, 9, 8, 16], seed=3
)
PATHS = [
    [0, 2, 3, 5, 8],
    [0, NOWHERE, NOWHERE, NOWHERE, NOWHERE],
    [NOWHERE] * 5,
    [0, 6, NOWHERE, NOWHERE, NOWHERE],
    [8, 0, 4, NOWHERE, NOWHERE],
    [0, 1, 2, 3, 4],
]
NODES = 9


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pages of keys and of values, with scales if their type takes them."""

    numbers: list[Guarded]
    factors: list[Guarded | None]

    def pages(self) -> list[Tensor]:
        return [part.tensor for part in self.numbers]

    def scales(self) -> list[Tensor | None]:
        return [part and part.tensor for part in self.factors]

    def all(self) -> list[Guarded]:
        return [part for part in (*self.numbers, *self.factors) if part is not None]


def new_pool(pages: int, dtype: torch.dtype) -> Pool:
    leading = (LAYERS, pages, HEADS, PAGE_SIZE)
    quantised = dtype in LARGEST
    return Pool(
        numbers=[Guarded((*leading, dim), dtype, dim) for dim in (KEY_DIM, VALUE_DIM)],
        factors=[Guarded(leading, torch.float32, i) if quantised else None for i in range(2)],
    )


def poisoned_tree(nodes: int, head_dim: int, read: list[list[int]], dtype: torch.dtype) -> Tensor:
    """[L, B + 1, HEADS, nodes, D], a part of a wider tensor that is NaN but where it is read."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = (LAYERS, len(read) + 2, HEADS, nodes + 3, head_dim)
    wide = torch.full(shape, torch.nan, dtype=dtype)
    for sequence, chosen in enumerate(read):
        for node in chosen:
            shape = (LAYERS, HEADS, head_dim)
            wide[:, sequence, :, node] = torch.randn(shape, generator=generator).to(dtype)
    return wide.to(DEVICE)[:, :-1, :, :nodes]


def commit_by_hand(
    target: Tensor,
    tree: Tensor,
    sequences: Rows,
    read: list[list[int]],
    of: Callable[[Tensor], Tensor] = lambda row: row,
) -> None:
    """Put every accepted row, or what `of` makes of it, where it belongs."""
    for sequence, chosen in enumerate(read):
        for step, node in enumerate(chosen):
            page, offset = sequences.place(sequence, sequences.start[sequence] + step)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    target[layer, page, head, offset] = of(tree[layer, sequence, head, node])


# Commit


@pytest.mark.some(5)
@both
@pytest.mark.parametrize("identity", [False, True], ids=["path", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *QUANTISED], ids=str)
def test_commit_puts_every_accepted_row_in_its_place(
    kernels: ModuleType, identity: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.rows, "TILE", 64)  # several programs for each sequence
    read = [
        list(range(count)) if identity else nodes[:count]
        for nodes, count in zip(PATHS, RAGGED.length, strict=True)
    ]
    model = torch.bfloat16 if dtype in LARGEST else dtype
    trees = [poisoned_tree(NODES, dim, read, model) for dim in (KEY_DIM, VALUE_DIM)]
    before = [raw(tree) for tree in trees]
    pool = new_pool(RAGGED.pages, dtype)
    path = None if identity else torch.tensor(PATHS, device=DEVICE)
    kernels.commit_path(*pool.pages(), *trees, path, *RAGGED.tensors(), *pool.scales())
    for pages, scales, tree in zip(pool.numbers, pool.factors, trees, strict=True):
        if scales is None:
            pages.assert_changed_only_by(
                lambda target, tree=tree: commit_by_hand(target, tree, RAGGED, read)
            )
            continue
        pages.assert_changed_only_by(
            lambda target, tree=tree: commit_by_hand(
                target, tree, RAGGED, read, lambda row: reference.quantise(row, dtype)[0]
            )
        )
        scales.assert_changed_only_by(
            lambda target, tree=tree: commit_by_hand(
                target, tree, RAGGED, read, lambda row: reference.quantise(row, dtype)[1]
            )
        )
    assert all(torch.equal(raw(tree), old) for tree, old in zip(trees, before, strict=True))


@both
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", QUANTISED, ids=str)
def test_commit_keeps_what_was_written_as_stored(
    kernels: ModuleType, stored: torch.dtype, model: torch.dtype
) -> None:
    """From the scratch to the pages no number changes, not even of rows that get another scale."""
    sequences = rows(start=[3, 0], length=[9, 9], end=[12, 9])
    generator = torch.Generator().manual_seed(4)
    new = torch.randn(LAYERS, 2, HEADS, 9, KEY_DIM, generator=generator) * 30
    new[..., 0, 0] = 224.0 + 2.0**-3  # alone in its row with a number that rounds to a new scale
    new[..., 0, 1:] *= 2.0**-6
    new = new.to(model).to(DEVICE)
    pool = new_pool(sequences.pages, stored)
    trees = [torch.zeros_like(new), torch.zeros_like(new[..., :VALUE_DIM])]
    for keys, values, layer in zip(*trees, new, strict=True):
        kernels.write_tree(keys, values, layer, -layer[..., :VALUE_DIM], 0, stored)
    kernels.commit_path(*pool.pages(), *trees, None, *sequences.tensors(), *pool.scales())
    for pages, scales, tree in zip(pool.pages(), pool.scales(), trees, strict=True):
        assert scales is not None
        held = pages.cpu().double() * scales.cpu().double()[..., None]
        expected = torch.zeros_like(held)
        commit_by_hand(expected, tree.cpu().double(), sequences, [list(range(9))] * 2)
        used = expected.abs().amax(-1) > 0
        assert int(used.sum()) == LAYERS * HEADS * 18
        assert torch.equal(held[used], expected[used])


@both
def test_commit_of_a_long_prompt(kernels: ModuleType) -> None:
    """More rows than one program moves, from a path that is one row seen by all sequences."""
    lengths = [200, 0, 177]
    sequences = rows(start=[2, 0, 5], length=lengths, end=[202, 0, 182])
    read = [list(range(count)) for count in lengths]
    trees = [poisoned_tree(200, dim, read, torch.float32) for dim in (KEY_DIM, VALUE_DIM)]
    path = torch.arange(200, device=DEVICE).expand(3, -1)
    for chosen in (None, path):
        pool = new_pool(sequences.pages, torch.float32)
        kernels.commit_path(*pool.pages(), *trees, chosen, *sequences.tensors())
        for pages, tree in zip(pool.numbers, trees, strict=True):
            pages.assert_changed_only_by(
                lambda target, tree=tree: commit_by_hand(target, tree, sequences, read)
            )


def test_kernels_refuse_pages_they_cannot_address() -> None:
    pool = new_pool(RAGGED.pages, torch.float32)
    keys, values = pool.pages()
    tree = torch.zeros(LAYERS, 6, HEADS, NODES, KEY_DIM, device=DEVICE)
    path = torch.tensor(PATHS, device=DEVICE)
    with pytest.raises(ValueError, match="must be contiguous"):
        gpu.commit_path(keys.mT, values, tree, tree, path, *RAGGED.tensors())
    with pytest.raises(ValueError, match="stride 2 must be dense"):
        gpu.commit_path(keys, values, tree[..., ::2], tree, path, *RAGGED.tensors())


# Compaction


@st.composite
def accepted_paths(draw: st.DrawFn) -> tuple[Rows, list[list[int]], int]:
    """Random trees behind contexts of any length, and a path down each."""
    nodes, starts, paths = draw(st.integers(1, 12)), [], []
    for _ in range(2):
        parents = [-1, *(draw(st.integers(0, i - 1)) for i in range(1, nodes))]
        path = [draw(st.integers(0, nodes - 1))]
        while path[0]:
            path.insert(0, parents[path[0]])
        paths.append(path[: draw(st.integers(0, len(path)))])
        starts.append(draw(st.integers(0, 2 * PAGE_SIZE)))
    sequences = rows(
        start=starts,
        length=[len(path) for path in paths],
        end=[start + nodes for start in starts],
        seed=draw(st.integers(0, 9)),
    )
    return sequences, paths, nodes


# Scratch


@pytest.mark.some(3)
@both
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("stored", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_rows_go_into_the_scratch(
    kernels: ModuleType,
    first: int,
    stored: torch.dtype | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values as they leave one joint projection, of which they are parts."""
    monkeypatch.setattr(gpu.rows, "TILE", 64)
    batch, nodes = 3, 7
    joint = torch.randn(
        batch, nodes, 2 * HEADS, KEY_DIM, generator=torch.Generator().manual_seed(0)
    )
    joint = joint.to(dtype).to(DEVICE)
    key = joint[:, :, :HEADS].transpose(1, 2)
    value = joint[:, :, HEADS:, :VALUE_DIM].transpose(1, 2)
    pool = [
        Guarded((batch + 2, HEADS, nodes + 6, dim), dtype, dim) for dim in (KEY_DIM, VALUE_DIM)
    ]
    kernels.write_tree(pool[0].tensor, pool[1].tensor, key, value, first, stored)
    for scratch, new in zip(pool, (key, value), strict=True):

        def change(target: Tensor, new: Tensor = new) -> None:
            for sequence in range(batch):
                for head in range(HEADS):
                    for node in range(nodes):
                        row = new[sequence, head, node]
                        if stored is not None:
                            row = torch.tensor(stored_by_hand(row, stored)).to(row)
                        target[sequence, head, first + node] = row

        scratch.assert_changed_only_by(change)


# On a GPU


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, *QUANTISED], ids=str)
def test_a_captured_commit_follows_paths_lengths_and_tables(dtype: torch.dtype) -> None:
    read = [nodes[:count] for nodes, count in zip(PATHS, RAGGED.length, strict=True)]
    trees = [poisoned_tree(NODES, dim, read, torch.bfloat16) for dim in (KEY_DIM, VALUE_DIM)]
    pool = new_pool(RAGGED.pages, dtype)
    inputs = [torch.tensor(PATHS, device=DEVICE), *RAGGED.tensors()]
    gpu.commit_path(*pool.pages(), *trees, *inputs, *pool.scales())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.commit_path(*pool.pages(), *trees, *inputs, *pool.scales())
    generator = torch.Generator().manual_seed(0)
    for turn in range(4):
        order = torch.randperm(len(PATHS), generator=generator)
        for tensor in inputs:  # sequences change places, their trees too
            tensor.copy_(tensor[order.to(DEVICE)].clone())
        for tree in trees:
            tree[:, : len(PATHS)] = tree[:, order.to(DEVICE)].clone()
        if turn == 3:
            inputs[1].zero_()
        expected = new_pool(RAGGED.pages, dtype)
        for part, other in zip(pool.all(), expected.all(), strict=True):
            part.memory.copy_(other.memory)
        graph.replay()
        gpu.commit_path(*expected.pages(), *trees, *inputs, *expected.scales())
        for part, other in zip(pool.all(), expected.all(), strict=True):
            assert torch.equal(raw(part.memory), raw(other.memory))
            assert torch.equal(raw(part.memory), raw(part.before)) == (turn == 3)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_page_numbers_beyond_32_bits_of_elements(dtype: torch.dtype) -> None:
    """The last page of a pool of more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    page_size, head_dim, last = 16, 128, 2**20 + 5
    scales: list[Any] = [None, None]
    pool = [
        torch.zeros(1, last + 1, 1, page_size, head_dim, dtype=dtype, device=DEVICE)
        for _ in range(2)
    ]
    if dtype in LARGEST:
        scales = [torch.zeros(1, last + 1, 1, page_size, device=DEVICE) for _ in range(2)]
    tree = torch.randn(1, 1, 1, 4, head_dim, dtype=torch.bfloat16, device=DEVICE)
    table = torch.tensor([[last]], dtype=torch.int32, device=DEVICE)
    start = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    length = torch.tensor([3], device=DEVICE)
    path = torch.tensor([[0, 2, 3]], device=DEVICE)
    gpu.commit_path(*pool, tree, -tree, path, length, table, start, *scales)
    for pages, factors, sign in zip(pool, scales, (1, -1), strict=True):
        row = sign * tree[0, 0, 0, [0, 2, 3]]
        expected = (row, None) if factors is None else reference.quantise(row, dtype)
        assert torch.equal(pages[0, last, 0, 2:5], expected[0])
        assert pages.count_nonzero() == expected[0].count_nonzero()
        if factors is not None:
            assert torch.equal(factors[0, last, 0, 2:5], expected[1])
