"""PagedKVCache against a plain Python model that remembers what every row should contain."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec.cache import CacheFullError, PagedKVCache
from specdec.kernels import gpu, reference
from tests.core.cache_life import (
    MAX_TOKENS,
    PAGE_SIZE,
    PAGES,
    QUANTISED,
    ROWS,
    SHAPE,
    Life,
    assert_holds,
    key_of,
    new_cache,
    snapshot,
    value_of,
    write_and_commit,
)

STORES = pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": dtype, "kernels": kernels}
        for dtype in (None, *QUANTISED)
        for kernels in (reference, gpu)
    ],
    ids=lambda options: f"{options['kv_dtype']}-{options['kernels'].__name__.split('.')[-1]}",
)

prompts = st.lists(st.integers(0, 1), max_size=12).map(lambda tail: ([0] * 7 + tail)[-12:])
tokens_lists = st.lists(st.integers(0, 2), max_size=5)


class CacheMachine(RuleBasedStateMachine):
    """Random lives of rows; the model keeps for each open row the tokens it has committed."""

    kv_dtype: torch.dtype | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache(rows=ROWS + 1, kv_dtype=self.kv_dtype)
        self.histories: dict[int, list[int]] = {}
        self.prompts: dict[int, list[int]] = {}  # tokens announced at `open`
        self.announced: list[list[int]] = []  # every prompt there has been
        self.seed = 0

    def closed_rows(self) -> list[int]:
        return [row for row in range(ROWS) if row not in self.histories]

    def pages_of(self, row: int) -> list[int]:
        count = self.cache.allocated(row) // PAGE_SIZE
        return self.cache.page_table[row, :count].tolist()

    @precondition(lambda self: self.closed_rows())
    @rule(
        data=st.data(),
        prompt=st.sampled_from([[0] * 9, [0] * 4 + [1] * 4, [0] * 3 + [1] * 6, [1, 0, 1]])
        | prompts,
        room=st.integers(1, 7),
    )
    def open(self, data: st.DataObject, prompt: list[int], room: int) -> None:
        row = data.draw(st.sampled_from(self.closed_rows()))
        tokens = min(len(prompt) + room, MAX_TOKENS)
        shareable = self.cache.shareable(prompt)
        needed = -(-tokens // PAGE_SIZE) - shareable // PAGE_SIZE
        if needed > self.cache.free_pages:
            before = snapshot(self.cache)
            with pytest.raises(CacheFullError, match=f"{needed} pages needed"):
                self.cache.open(row, tokens=tokens, prefix=prompt)
            assert snapshot(self.cache) == before
            return
        done = self.cache.open(row, tokens=tokens, prefix=prompt)
        assert done == shareable
        assert done % PAGE_SIZE == 0
        somebody = any(history[:done] == prompt[:done] for history in self.histories.values())
        assert done == 0 or somebody
        self.histories[row], self.prompts[row] = prompt[:done], prompt
        if prompt not in self.announced:
            self.announced.append(prompt)
        assert self.cache.allocated(row) >= tokens

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """Rows still in their prompt go on with it, the others take any tokens."""
        rows = data.draw(
            st.lists(st.sampled_from(sorted(self.histories)), min_size=1, max_size=4, unique=True)
        )
        new = {}
        for row in rows:
            rest = self.prompts[row][len(self.histories[row]) :]
            drafted = data.draw(tokens_lists)
            new[row] = rest[: len(drafted)] if rest else drafted
        self.seed += 1
        over = [
            row
            for row in rows
            if len(self.histories[row]) + len(new[row]) > self.cache.allocated(row)
        ]
        if over:
            before = snapshot(self.cache)
            with pytest.raises(RuntimeError, match=f"cache row {over[0]}: .* exceed"):
                write_and_commit(self.cache, self.histories, new, self.seed)
            assert snapshot(self.cache) == before
            return
        self.write(new)

    def write(self, new: dict[int, list[int]]) -> None:
        write_and_commit(self.cache, self.histories, new, self.seed)
        for row, tokens in new.items():
            self.histories[row] = self.histories[row] + tokens

    def prefilling(self) -> list[int]:
        return [row for row in self.histories if len(self.histories[row]) < len(self.prompts[row])]

    @precondition(lambda self: self.prefilling())
    @rule(data=st.data(), leave=st.booleans())
    def finish_prompt(self, data: st.DataObject, leave: bool) -> None:
        row = data.draw(st.sampled_from(self.prefilling()))
        self.write({row: self.prompts[row][len(self.histories[row]) :]})
        if leave:
            self.close_row(row)

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.close_row(data.draw(st.sampled_from(sorted(self.histories))))

    def close_row(self, row: int) -> None:
        self.cache.close(row)
        del self.histories[row], self.prompts[row]

    @invariant()
    def invariants_hold(self) -> None:
        self.cache.check()

    @invariant()
    def contents_are_those_of_the_model(self) -> None:
        for row, history in self.histories.items():
            assert_holds(self.cache, row, history)
        for row in self.closed_rows():
            assert int(self.cache.lengths[row]) == 0

    @invariant()
    def pages_on_offer_hold_what_they_promise(self) -> None:
        """A guest that takes only pages on offer, reads them and leaves without a trace."""
        for prompt in self.announced:
            done = self.cache.shareable(prompt)
            if done:
                assert self.cache.open(ROWS, tokens=done, prefix=prompt) == done
                assert_holds(self.cache, ROWS, prompt[:done])
                self.cache.close(ROWS)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = {page for row in self.histories for page in self.pages_of(row)}
        assert self.cache.free_pages == PAGES - len(held)

    def teardown(self) -> None:
        for row in list(self.histories):
            self.cache.close(row)
        self.cache.check()
        assert self.cache.free_pages == PAGES
        assert self.cache.shareable([0] * 9) == 0


CacheMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLives = CacheMachine.TestCase


class QuantisedMachine(CacheMachine):
    kv_dtype = torch.int8


QuantisedMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLivesOfQuantisedRows = QuantisedMachine.TestCase


@STORES
def test_rows_that_share_a_prompt_diverge(options: dict[str, Any]) -> None:
    life = Life(**options)
    prompt = [1, 2, 0, 1, 2, 2, 1]
    life.open(0, prompt)
    life.commit({0: prompt})
    free = life.cache.free_pages
    for row in (1, 2):
        assert life.cache.shareable(prompt) == life.open(row, prompt, tokens=9) == 6
        assert life.pages(row)[:2] == life.pages(0)[:2]
        assert life.pages(row)[2] != life.pages(0)[2]
        assert life.cache.free_pages == free - row
    life.commit({1: [1, 0, 0], 0: [2], 2: [1, 1]})
    life.verify()
    life.close(0)
    life.verify()
    assert life.open(3, prompt, tokens=7) == 6
    life.close(1)
    life.commit({3: [0], 2: [0]})
    life.verify()


# Scratch and commit


def test_scratch_grows_in_both_directions_and_keeps_its_content() -> None:
    cache = new_cache(rows=2)  # as many rows as there may be sequences, from the start
    cache.scratch(1, 3)
    assert cache.tree_keys.shape == (SHAPE.layers, 2, SHAPE.kv_heads, 3, SHAPE.key_dim)
    assert cache.tree_values.shape == (SHAPE.layers, 2, SHAPE.kv_heads, 3, SHAPE.value_dim)
    keys = cache.tree_keys.normal_().clone()
    values = cache.tree_values.normal_().clone()
    before = cache.tree_keys
    cache.scratch(1, 2)
    assert cache.tree_keys is before
    for batch, nodes in ((2, 7), (4, 1), (5, 9)):
        cache.scratch(batch, nodes)
        assert torch.equal(cache.tree_keys[:, :2, :, :3], keys)
        assert torch.equal(cache.tree_values[:, :2, :, :3], values)
    assert cache.tree_keys.shape[1] == 5
    assert cache.tree_keys.shape[3] == 9


@pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
def test_append_drops_what_has_no_place(kernels: ModuleType) -> None:
    """The end of a row that is full, and all of the idle row and of one that is closed."""
    cache = new_cache(kernels=kernels)
    cache.open(2, tokens=6)
    cache.open(1, tokens=6)
    cache.close(2)
    room = cache.allocated(1)
    cache.scratch(3, room + 2)
    keys, pages = cache.tree_keys.normal_(), cache.keys.clone()
    device = cache.keys.device
    rows = torch.tensor([cache.idle_row, 1, 2], device=device)
    path = torch.arange(room + 2, device=device).expand(3, -1)
    cache.append(rows, path, torch.full((3,), room + 2, device=device))
    assert cache.lengths.tolist() == [0, room, 0, 0, 0]
    own = cache.page_table[1, : room // PAGE_SIZE].long()
    written = cache.keys[:, own].transpose(2, 3).flatten(1, 2).transpose(1, 2)  # [L, HKV, T, D]
    assert torch.equal(written, keys[:, 1, :, :room])
    others = [page for page in range(PAGES) if page not in own.tolist()]
    assert torch.equal(cache.keys[:, others], pages[:, others])
    cache.check()


def test_commit_beyond_the_allocation_writes_nothing_for_any_row() -> None:
    life = Life()
    life.open(0, [], tokens=6)
    life.open(1, [], tokens=4)
    life.commit({0: [1], 1: [1, 2, 0, 2]})
    before = snapshot(life.cache)
    with pytest.raises(RuntimeError, match="cache row 1: 3 tokens more exceed 6 allocated"):
        write_and_commit(life.cache, life.histories, {0: [1, 2], 1: [0, 0, 0]})
    assert snapshot(life.cache) == before
    life.verify()


def test_committing_nothing_changes_nothing() -> None:
    life = Life()
    life.open(0, [], tokens=4)
    life.open(1, [], tokens=4)
    life.commit({0: [1, 2, 0, 2]})
    before = snapshot(life.cache)
    life.commit({1: [], 0: []})
    assert snapshot(life.cache) == before
    life.verify()


def test_nothing_can_be_committed_before_there_is_a_scratch() -> None:
    cache = new_cache()
    cache.open(0, tokens=4)
    before = snapshot(cache)
    for rows in ([], [0]):
        cache.commit(rows, None, torch.zeros(len(rows), dtype=torch.int64))
    assert snapshot(cache) == before
    with pytest.raises(RuntimeError, match="1 tokens to commit, but paths of 0"):
        cache.commit([0], None, torch.ones(1, dtype=torch.int64))


def test_a_scratch_apart_leaves_the_other_as_it_was() -> None:
    cache = new_cache()
    cache.scratch(2, 3)
    kept = cache.tree_keys.normal_(), cache.tree_values.normal_()
    copies = [part.clone() for part in kept]
    with cache.scratch_apart(1, 7):
        assert cache.tree_keys.shape == (SHAPE.layers, 1, SHAPE.kv_heads, 7, SHAPE.key_dim)
        assert cache.tree_values.shape == (SHAPE.layers, 1, SHAPE.kv_heads, 7, SHAPE.value_dim)
        cache.tree_keys += 1
    assert cache.tree_keys is kept[0]
    assert cache.tree_values is kept[1]
    assert all(torch.equal(*both) for both in zip(kept, copies, strict=True))


def test_order_of_rows_is_the_order_of_the_scratch() -> None:
    life = Life()
    for row in range(3):
        life.open(row, [], tokens=9)
    life.commit({2: [2, 0, 2, 2], 0: [0], 1: [1, 1]})
    life.commit({1: [0, 0], 2: [1]})
    life.verify()


@pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
def test_without_a_path_rows_are_taken_in_order(kernels: ModuleType) -> None:
    cache = new_cache(kernels=kernels)
    history = [1, 2, 0, 2]
    cache.open(0, tokens=5)
    cache.open(1, tokens=5)
    cache.scratch(2, 6)
    for node in range(6):
        cache.tree_keys[:, 1, :, node] = key_of(history[: node + 1])
        cache.tree_values[:, 1, :, node] = value_of(history[: node + 1])
    cache.commit([1, 0], None, torch.tensor([0, 4], device=cache.keys.device))
    assert_holds(cache, 0, history)
    assert_holds(cache, 1, [])
    cache.check()
    with pytest.raises(RuntimeError, match="7 tokens to commit, but paths of 6"):
        cache.commit([1, 0], None, torch.tensor([0, 7], device=cache.keys.device))


def test_memory_per_token() -> None:
    assert SHAPE.bytes_per_token(torch.float32) == 2 * 2 * (3 + 2) * 4
    assert SHAPE.bytes_per_token(torch.bfloat16) == 2 * 2 * (3 + 2) * 2
    assert SHAPE.bytes_per_token(torch.int8) == 2 * 2 * (3 + 2 + 2 * 4)
    for kv_dtype in (None, *QUANTISED):
        cache = new_cache(kv_dtype=kv_dtype)
        pool = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        total = sum(part.nbytes for part in pool if part is not None)
        assert total == SHAPE.bytes_per_token(cache.keys.dtype) * PAGES * PAGE_SIZE


# Errors


@pytest.mark.parametrize("setting", ["page_size", "pages", "rows"])
def test_sizes_below_one_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=f"cache.{setting}=0: must be at least 1"):
        new_cache(**{setting: 0})


def test_types_without_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_dtype=torch\.int16: must be None, float8_e4m3fn or"):
        new_cache(kv_dtype=torch.int16)


def test_errors_of_open_change_nothing() -> None:
    life = Life(pages=5)
    life.open(0, [], tokens=7)
    life.commit({0: [1, 1, 1, 1]})
    before = snapshot(life.cache)
    for row, tokens, kind, message in (
        (0, 1, RuntimeError, "cache row 0 is already open"),
        (1, 17, ValueError, "a sequence of 17 tokens exceeds the 16 of a cache row"),
        (1, 16, ValueError, "a sequence of 16 tokens exceeds the 5 pages of the cache"),
        (1, 9, CacheFullError, "3 pages needed, 2 free"),
    ):
        with pytest.raises(kind, match=f"^{message}$"):
            life.cache.open(row, tokens=tokens)
        assert snapshot(life.cache) == before
        life.verify()


# check()


CORRUPTIONS: dict[str, tuple[str, Callable[[PagedKVCache], object]]] = {
    "too_many_committed": (
        "row 0: 10 committed of 9 allocated",
        lambda cache: cache.lengths[0].fill_(10),
    ),
    "negative_committed": ("row 0: -1 committed", lambda cache: cache.lengths[0].fill_(-1)),
    "device_table": (
        "row 1: page table on the device differs",
        lambda cache: cache.page_table[1, 0].add_(1),
    ),
    "device_capacity": (
        "row 1: capacity 7 on the device, 6 allocated",
        lambda cache: cache.capacity[1].add_(1),
    ),
    "busy_idle_row": (
        "the idle row holds tokens",
        lambda cache: cache.lengths[cache.idle_row].add_(1),
    ),
    "pages": ("pages leaked", lambda cache: cache._pages._free.pop()),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_detects(name: str) -> None:
    message, corrupt = CORRUPTIONS[name]
    life = Life()
    prompt = [1, 2, 0, 1, 2]
    life.open(0, prompt, tokens=7)
    life.commit({0: prompt})
    life.open(1, prompt, tokens=6)
    life.commit({1: [1]})
    life.verify()
    corrupt(life.cache)
    with pytest.raises(RuntimeError, match=message):
        life.cache.check()


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan])
def test_check_detects_a_scale_that_is_none(scale: float) -> None:
    cache = new_cache(kv_dtype=torch.int8)
    cache.check()
    assert cache.value_scales is not None
    cache.value_scales[1, 2, 0, 1] = scale
    with pytest.raises(RuntimeError, match="scale is not positive"):
        cache.check()
