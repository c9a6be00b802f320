"""Caches that remember what they should hold: contents that stand for tokens, and a life of rows
with their histories beside it.

Keys and values stand for the tokens up to their position, as those of a causal model do. So a page
that is shared or overwritten wrongly shows in the content, whatever the bookkeeping says.
"""

import hashlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.cache import KVShape, PagedKVCache
from specdec.kernels import reference

SHAPE = KVShape(layers=2, kv_heads=2, key_dim=3, value_dim=2)
ROWS, PAGES, PAGE_SIZE, MAX_TOKENS = 4, 9, 3, 16
GPU_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton kernels
QUANTISED = [torch.float8_e4m3fn, torch.int8]


def new_cache(
    *,
    rows: int = ROWS,
    pages: int = PAGES,
    page_size: int = PAGE_SIZE,
    max_tokens: int = MAX_TOKENS,
    kv_dtype: torch.dtype | None = None,
    kernels: ModuleType = reference,
) -> PagedKVCache:
    return PagedKVCache(
        shape=SHAPE,
        rows=rows,
        pages=pages,
        page_size=page_size,
        max_tokens=max_tokens,
        dtype=torch.float32,
        device=torch.device("cpu" if kernels is reference else GPU_DEVICE),
        kv_dtype=kv_dtype,
        kernels=kernels,
    )


def entries(history: Sequence[int], head_dim: int, salt: int) -> Tensor:
    """[L, HKV, D] of the last token of a history: whole numbers, no two histories alike."""
    count = SHAPE.layers * SHAPE.kv_heads * head_dim
    stamp = hashlib.blake2b(bytes([salt, *history]), digest_size=count).digest()
    return torch.tensor(list(stamp)).view(SHAPE.layers, SHAPE.kv_heads, head_dim).float() - 128


def key_of(history: Sequence[int]) -> Tensor:
    return entries(history, SHAPE.key_dim, 1)


def value_of(history: Sequence[int]) -> Tensor:
    return entries(history, SHAPE.value_dim, 2)


def stacked(history: Sequence[int], of: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """[L, HKV, T, D] of every position of a history."""
    return torch.stack([of(history[: i + 1]) for i in range(len(history))], dim=2)


def read(cache: PagedKVCache, row: int, pool: Tensor, scales: Tensor | None) -> Tensor:
    """[L, HKV, T, D], the committed tokens of a row as attention would find them."""
    position = torch.arange(int(cache.lengths[row]), device=pool.device)
    page = cache.page_table[row, position // cache.page_size].long()
    found = pool[:, page, :, position % cache.page_size].float()
    if scales is not None:
        found *= scales[:, page, :, position % cache.page_size][..., None]
    return found.permute(1, 2, 0, 3)


def as_stored(cache: PagedKVCache, given: Tensor) -> Tensor:
    """What quantised pages make of it."""
    if cache.key_scales is None:
        return given
    numbers, scales = reference.quantise(given, cache.keys.dtype)
    return numbers.float() * scales[..., None]


def assert_holds(cache: PagedKVCache, row: int, history: Sequence[int]) -> None:
    assert cache.committed(row) == len(history) == int(cache.lengths[row])
    if history:
        for pool, scales, of in (
            (cache.keys, cache.key_scales, key_of),
            (cache.values, cache.value_scales, value_of),
        ):
            expected = as_stored(cache, stacked(history, of))
            assert torch.equal(read(cache, row, pool, scales).cpu(), expected)


def write_and_commit(
    cache: PagedKVCache, histories: dict[int, list[int]], new: dict[int, list[int]], seed: int = 0
) -> None:
    """Put each row's new tokens at random scratch rows, the rest filled with noise, and commit."""
    generator = torch.Generator().manual_seed(seed)
    rows, most = list(new), max((len(tokens) for tokens in new.values()), default=0)
    nodes = most + 3
    cache.scratch(len(rows), nodes)
    for scratch in (cache.tree_keys, cache.tree_values):
        scratch.copy_(-torch.rand(scratch.shape, generator=generator))
    path = torch.randint(nodes, (len(rows), most + 1), generator=generator)
    for place, row in enumerate(rows):
        own = torch.randperm(nodes, generator=generator)[: len(new[row])]
        path[place, : len(own)] = own
        for i, node in enumerate(own.tolist()):
            history = histories[row] + new[row][: i + 1]
            cache.tree_keys[:, place, :, node] = key_of(history)
            cache.tree_values[:, place, :, node] = value_of(history)
    length = torch.tensor([len(new[row]) for row in rows])
    device = cache.keys.device
    cache.commit(rows, path.to(device), length.to(device))


def snapshot(cache: PagedKVCache) -> list[object]:
    """All that a failed call must leave alone."""
    return [
        cache.page_table.tolist(),
        cache.lengths.tolist(),
        cache.keys.tolist(),
        cache.values.tolist(),
        None if cache.key_scales is None else cache.key_scales.tolist(),
        None if cache.value_scales is None else cache.value_scales.tolist(),
        cache.free_pages,
    ]


class Life:
    """A cache and the histories of its rows, for tests that tell one story."""

    def __init__(self, **options: Any) -> None:
        self.cache = new_cache(**options)
        self.histories: dict[int, list[int]] = {}

    def open(self, row: int, prompt: list[int], *, tokens: int | None = None) -> int:
        done = self.cache.open(row, tokens=MAX_TOKENS if tokens is None else tokens, prefix=prompt)
        self.histories[row] = prompt[:done]
        return done

    def commit(self, new: dict[int, list[int]]) -> None:
        write_and_commit(self.cache, self.histories, new)
        for row, tokens in new.items():
            self.histories[row] = self.histories[row] + tokens

    def close(self, row: int) -> None:
        self.cache.close(row)
        del self.histories[row]

    def verify(self) -> None:
        self.cache.check()
        for row, history in self.histories.items():
            assert_holds(self.cache, row, history)

    def pages(self, row: int) -> list[int]:
        count = self.cache.allocated(row) // self.cache.page_size
        return self.cache.page_table[row, :count].tolist()
