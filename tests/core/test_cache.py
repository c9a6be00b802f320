"""PagedKVCache against a plain Python model that remembers what every row should contain.

Keys and values stand for the tokens up to their position, as those of a causal model do. So a page
that is shared, copied or overwritten wrongly shows in the content, whatever the bookkeeping says.
"""

import hashlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from specdec.cache import CacheFullError, KVShape, PagedKVCache
from specdec.cached_model import CachedModel
from specdec.kernels import gpu, reference
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import TreeLayout
from specdec.lab.experiment import CacheSettings
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.request import Capacity

SHAPE = KVShape(layers=2, kv_heads=2, key_dim=3, value_dim=2)
ROWS, PAGES, PAGE_SIZE, MAX_TOKENS = 4, 9, 3, 16
GPU_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton kernels
QUANTISED = [torch.float8_e4m3fn, torch.int8]
STORES = pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": dtype, "kernels": kernels}
        for dtype in (None, *QUANTISED)
        for kernels in (reference, gpu)
    ],
    ids=lambda options: f"{options['kv_dtype']}-{options['kernels'].__name__.split('.')[-1]}",
)


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
        self.unwritten_forks: set[int] = set()  # rows that still hold a page in reserve
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
        # A page filled by a row that has left lives on in a fork that has yet to write to it.
        assert done == 0 or somebody or self.unwritten_forks
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
            if tokens:
                self.unwritten_forks.discard(row)

    def prefilling(self) -> list[int]:
        return [row for row in self.histories if len(self.histories[row]) < len(self.prompts[row])]

    @precondition(lambda self: self.prefilling())
    @rule(data=st.data(), leave=st.booleans())
    def finish_prompt(self, data: st.DataObject, leave: bool) -> None:
        row = data.draw(st.sampled_from(self.prefilling()))
        self.write({row: self.prompts[row][len(self.histories[row]) :]})
        if leave:
            self.close_row(row)

    @precondition(lambda self: self.histories and self.closed_rows())
    @rule(data=st.data(), room=st.integers(0, 6))
    def fork(self, data: st.DataObject, room: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.histories)))
        row = data.draw(st.sampled_from(self.closed_rows()))
        history = self.histories[source]
        tokens = min(len(history) + room, MAX_TOKENS)
        if len(history) > tokens:
            before = snapshot(self.cache)
            with pytest.raises(ValueError, match=f"limit {MAX_TOKENS}"):
                self.cache.fork(source, row, tokens=tokens)
            assert snapshot(self.cache) == before
            return
        needed = -(-tokens // PAGE_SIZE) - len(history) // PAGE_SIZE
        if needed > self.cache.free_pages:
            before = snapshot(self.cache)
            with pytest.raises(CacheFullError, match=f"{needed} pages needed"):
                self.cache.fork(source, row, tokens=tokens)
            assert snapshot(self.cache) == before
            return
        self.cache.fork(source, row, tokens=tokens)
        self.histories[row] = list(history)
        self.prompts[row] = self.prompts[source][: len(history)]
        used = -(-len(history) // PAGE_SIZE)
        assert self.pages_of(row)[:used] == self.pages_of(source)[:used]
        if len(history) % PAGE_SIZE:
            self.unwritten_forks.add(row)

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.close_row(data.draw(st.sampled_from(sorted(self.histories))))

    def close_row(self, row: int) -> None:
        self.cache.close(row)
        del self.histories[row], self.prompts[row]
        self.unwritten_forks.discard(row)

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
        assert self.cache.free_pages == PAGES - len(held) - len(self.unwritten_forks)

    def teardown(self) -> None:
        for row in list(self.histories):
            self.cache.close(row)
        self.cache.check()
        assert self.cache.free_pages == PAGES
        assert self.cache.shareable([0] * 9) == 0


CacheMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLives = CacheMachine.TestCase


class QuantisedMachine(CacheMachine):
    kv_dtype = torch.int8


QuantisedMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLivesOfQuantisedRows = QuantisedMachine.TestCase


class Life:
    """A cache and the histories of its rows, for tests that tell one story."""

    def __init__(self, **options: Any) -> None:
        self.cache = new_cache(**options)
        self.histories: dict[int, list[int]] = {}

    def open(self, row: int, prompt: list[int], *, tokens: int | None = None) -> int:
        done = self.cache.open(row, tokens=MAX_TOKENS if tokens is None else tokens, prefix=prompt)
        self.histories[row] = prompt[:done]
        return done

    def fork(self, source: int, row: int, *, tokens: int) -> None:
        self.cache.fork(source, row, tokens=tokens)
        self.histories[row] = list(self.histories[source])

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


# Prompts


def test_rows_share_the_full_pages_of_a_common_prompt() -> None:
    life = Life()
    prompt = [1, 2, 0, 1, 2, 2, 1]
    assert life.open(0, prompt) == 0
    assert life.cache.shareable(prompt) == 0
    life.commit({0: prompt[:4]})
    assert life.cache.shareable(prompt) == 3
    life.commit({0: prompt[4:]})
    assert life.cache.shareable(prompt) == 6
    assert life.cache.shareable([1, 2, 0, 1, 2, 1, 1]) == 3
    assert life.cache.shareable([2, 1, 2, 0, 1, 2, 2]) == 0
    assert life.cache.shareable(prompt[:5]) == 3

    free = life.cache.free_pages
    assert life.open(1, prompt, tokens=9) == 6
    assert life.pages(1)[:2] == life.pages(0)[:2]
    assert life.pages(1)[2] != life.pages(0)[2]
    assert life.cache.free_pages == free - 1
    life.commit({1: [1, 0, 0]})
    life.verify()

    life.close(0)
    life.verify()
    assert life.cache.shareable(prompt) == 6
    assert life.open(2, prompt, tokens=7) == 6
    life.close(1)
    life.commit({2: [2]})
    life.verify()
    life.close(2)
    assert life.cache.free_pages == PAGES
    assert life.cache.shareable(prompt) == 0


def test_output_tokens_are_not_offered_to_later_prompts() -> None:
    life = Life()
    life.open(0, [1, 2, 0, 1])
    life.commit({0: [1, 2, 0, 1]})
    life.commit({0: [2, 2, 0, 0, 0]})
    assert life.cache.shareable([1, 2, 0, 1, 2, 2, 0, 0, 0]) == 3


def test_equal_pages_under_different_beginnings_are_not_confused() -> None:
    life = Life()
    life.open(0, [0, 0, 0, 1, 1, 1], tokens=6)
    life.open(1, [2, 2, 2, 1, 1, 1], tokens=6)
    life.commit({0: [0, 0, 0, 1, 1, 1], 1: [2, 2, 2, 1, 1, 1]})
    assert life.open(2, [2, 2, 2, 1, 1, 1], tokens=6) == 6
    assert life.pages(2) == life.pages(1)
    life.verify()


def test_two_rows_that_fill_the_same_prompt_at_once_both_survive() -> None:
    """Neither found the other's pages at `open`; closing one must not harm the other."""
    for first in (0, 1):
        life = Life()
        prompt = [1, 1, 2, 0, 2, 1, 0]
        life.open(0, prompt, tokens=8)
        life.open(1, prompt, tokens=8)
        life.commit({0: prompt, 1: prompt})
        life.close(first)
        life.open(2, prompt, tokens=8)
        life.commit({2: prompt[len(life.histories[2]) :]})
        life.verify()


# Forks


@STORES
def test_a_fork_shares_until_it_writes(options: dict[str, Any]) -> None:
    life = Life(**options)
    life.open(0, [1, 2, 0, 1, 2])
    life.commit({0: [1, 2, 0, 1, 2]})
    life.fork(0, 1, tokens=8)
    assert life.pages(1)[:2] == life.pages(0)[:2]
    life.commit({0: [0, 0]})
    life.verify()
    assert life.pages(1)[1] == life.pages(0)[1]
    life.commit({1: [2, 2]})
    assert life.pages(1)[0] == life.pages(0)[0]
    assert life.pages(1)[1] != life.pages(0)[1]
    life.verify()


def test_the_last_fork_takes_over_the_page_its_source_has_left() -> None:
    life = Life()
    life.open(0, [1, 2, 0, 1], tokens=6)
    life.commit({0: [1, 2, 0, 1]})
    life.fork(0, 1, tokens=6)
    shared = life.pages(1)[1]
    life.close(0)
    life.verify()
    free = life.cache.free_pages
    life.commit({1: [2]})
    assert life.pages(1)[1] == shared
    assert life.cache.free_pages == free + 1  # the reserve was not needed
    life.verify()


@STORES
def test_forks_of_forks_diverge(options: dict[str, Any]) -> None:
    life = Life(pages=20, **options)
    life.open(0, [1])
    life.commit({0: [1, 1, 1, 2]})
    life.fork(0, 1, tokens=9)
    life.fork(1, 2, tokens=9)
    life.fork(2, 3, tokens=9)
    for row in range(4):
        life.commit({row: [row % 3, row // 3]})
        life.verify()
    life.close(0)
    life.close(2)
    life.commit({1: [0, 0, 0], 3: [1, 1]})
    life.verify()


def test_a_fork_does_not_overwrite_a_prompt_page_that_is_on_offer() -> None:
    """Its source goes on to fill the borrowed page and offers it, then leaves; the fork, now alone
    with the page, writes something else; a third row asks for the prompt."""
    life = Life()
    prompt = [1, 2, 0, 1, 2, 0]
    life.open(0, prompt, tokens=6)
    life.commit({0: prompt[:4]})
    life.fork(0, 1, tokens=6)
    life.commit({0: prompt[4:]})
    life.close(0)
    life.commit({1: [1, 1]})
    life.verify()
    life.open(2, prompt, tokens=6)
    life.verify()


def test_an_offered_page_that_a_fork_has_borrowed_may_be_shared() -> None:
    """As above, but the third row comes before the fork writes."""
    life = Life()
    prompt = [1, 2, 0, 1, 2, 0]
    life.open(0, prompt, tokens=6)
    life.commit({0: prompt[:4]})
    life.fork(0, 1, tokens=6)
    life.commit({0: prompt[4:]})
    life.close(0)
    life.open(2, prompt, tokens=6)
    life.commit({1: [1, 1]})
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
    """The end of a row that is full, and all of the idle row."""
    cache = new_cache(kernels=kernels)
    cache.open(1, tokens=6)
    room = cache.allocated(1)
    cache.scratch(3, room + 2)
    keys, pages = cache.tree_keys.normal_(), cache.keys.clone()
    device = cache.keys.device
    rows = torch.tensor([cache.idle_row, 1, cache.idle_row], device=device)
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
    life.fork(1, 2, tokens=5)
    before, table = snapshot(life.cache), life.pages(2)
    with pytest.raises(RuntimeError, match="cache row 1: 3 tokens more exceed 6 allocated"):
        write_and_commit(life.cache, life.histories, {2: [1], 0: [1, 2], 1: [0, 0, 0]})
    assert snapshot(life.cache) == before
    assert life.pages(2) == table
    life.verify()


def test_committing_nothing_does_not_end_a_loan() -> None:
    life = Life()
    life.open(0, [], tokens=4)
    life.commit({0: [1, 2, 0, 2]})
    life.fork(0, 1, tokens=5)
    life.commit({1: [], 0: []})
    assert life.pages(1)[:2] == life.pages(0)[:2]
    life.verify()


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


# Quantised pages


@pytest.fixture(scope="module")
def lm() -> PagedLM:
    return load_model("zoo:draft")


def prefilled(
    lm: PagedLM, kv_dtype: torch.dtype | None, rounded: torch.dtype | None
) -> PagedKVCache:
    """A cache with two prompts.

    Args:
        kv_dtype: what its pages hold.
        rounded: what rows are rounded to on their way into the scratch.
    """
    model = CachedModel(lm)
    model.prepare(Capacity(rows=2, max_tokens=40, page_size=4, kv_dtype=kv_dtype))
    model.cache.kv_dtype = rounded
    for row, prompt in enumerate(([5, 9, 2, 77, 31, 8], [4, 4, 1])):
        model.cache.open(row, tokens=40)
        lm.prefill(model.cache, [row], [prompt])
    return model.cache


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_a_model_reads_what_quantised_pages_stand_for(lm: PagedLM, name: str) -> None:
    """The same logits, to the last bit, as over plain pages into which rounded rows go."""
    dtype = CacheSettings(dtype=name).kv_dtype
    quantised, rounded, exact = (
        prefilled(lm, *types) for types in ((dtype, dtype), (None, dtype), (None, None))
    )
    assert quantised.keys.dtype in QUANTISED
    assert quantised.tree_keys.dtype == rounded.keys.dtype == torch.float32
    assert quantised.key_scales is not None
    assert rounded.key_scales is None
    caches = (quantised, rounded, exact)
    for tokens in ([[3], [6]], [[8, 1], [70, 2]]):
        found, expected, other = (lm.extend(cache, [0, 1], tokens) for cache in caches)
        assert torch.equal(found, expected)
        assert not torch.equal(found, other)


@pytest.mark.parametrize(
    ("kv_dtype", "impl"),
    [
        *((kv_dtype, "reference") for kv_dtype in QUANTISED),
        (torch.float8_e4m3fn, "triton"),
        pytest.param(torch.int8, "triton", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_sees_a_node_as_it_will_be_once_committed(
    impl: Literal["reference", "triton"], kv_dtype: torch.dtype
) -> None:
    """A chain in one pass against a pass and a commit for each of its tokens."""
    device = GPU_DEVICE if impl == "triton" else "cpu"
    kernels = Kernels(impl=impl)
    lm = load_model("zoo:draft", Placement(device=device, kernels=kernels))
    tokens = [3, 60, 7]
    chain, offsets = torch.tensor([tokens], device=device), torch.arange(3, device=device)[None]

    def distance(rounded: torch.dtype | None) -> float:
        together = lm.forward(prefilled(lm, kv_dtype, rounded), [0], chain, offsets)
        assert together is not None
        cache = prefilled(lm, kv_dtype, rounded)
        apart = torch.cat([lm.extend(cache, [0], [[token]]) for token in tokens])
        return float((together[0] - apart).norm() / apart.norm())

    assert distance(kv_dtype) < 1e-5  # float32 and another order of sums
    assert distance(None) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_over_quantised_pages(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TreeLayout(
        page_table=torch.tensor([[4, 1], [2, -1]], dtype=torch.int32),
        context_lens=torch.tensor([5, 2], dtype=torch.int32),
        max_context=5,
        positions=torch.tensor([[5, 6, 7], [2, 3, 4]]),
        key_positions=torch.tensor([[5, 6, 7], [2, 3, 4]]),
    )
    query, key, value = (
        torch.randn(2, heads, 3, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    pages = [torch.randn(5, 2, 3, 8, generator=generator) for _ in range(2)]
    (keys, key_scales), (values, value_scales) = (
        reference.quantise(part, torch.int8) for part in pages
    )
    dense = [keys.float() * key_scales[..., None], values.float() * value_scales[..., None]]
    found = reference.tree_attention(
        query,
        keys,
        values,
        key,
        value,
        layout,
        scale=0.5,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    assert found.dtype == dtype
    expected = reference.tree_attention(query, *dense, key, value, layout, scale=0.5)
    assert torch.equal(found, expected)


# Errors


@pytest.mark.parametrize("setting", ["page_size", "pages", "rows"])
def test_sizes_below_one_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=f"cache.{setting}=0: must be at least 1"):
        new_cache(**{setting: 0})


def test_types_without_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_dtype=torch\.int16: must be None, float8_e4m3fn or"):
        new_cache(kv_dtype=torch.int16)
    with pytest.raises(ValueError, match=r"cache\.dtype=fp4: must be auto, fp8_e4m3, int8"):
        CacheSettings(dtype="fp4")


def test_errors_of_open_and_fork_change_nothing() -> None:
    life = Life(pages=5)
    life.open(0, [], tokens=7)
    life.commit({0: [1, 1, 1, 1]})
    before = snapshot(life.cache)
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (RuntimeError, "cache row 0 is already open", lambda: life.cache.open(0, tokens=1)),
        (
            ValueError,
            f"a sequence of {MAX_TOKENS + 1} tokens exceeds the {MAX_TOKENS} of a cache row",
            lambda: life.cache.open(1, tokens=MAX_TOKENS + 1),
        ),
        (
            ValueError,
            "a sequence of 16 tokens exceeds the 5 pages of the cache",
            lambda: life.cache.open(1, tokens=16),
        ),
        (CacheFullError, "3 pages needed, 2 free", lambda: life.cache.open(1, tokens=9)),
        (RuntimeError, "cache row 0 is already open", lambda: life.cache.fork(0, 0, tokens=4)),
        (
            ValueError,
            "4 tokens .*a row of 3",
            lambda: life.cache.fork(0, 1, tokens=3),
        ),
        (
            ValueError,
            f"4 tokens .*a row of {MAX_TOKENS + 1}.* limit {MAX_TOKENS}",
            lambda: life.cache.fork(0, 1, tokens=MAX_TOKENS + 1),
        ),
        (
            CacheFullError,
            "3 pages needed, 2 free",
            lambda: life.cache.fork(0, 1, tokens=12),
        ),
    ]
    for kind, message, call in refusals:
        with pytest.raises(kind, match=message):
            call()
        assert snapshot(life.cache) == before
        life.verify()
    life.fork(0, 1, tokens=9)
    life.verify()
    with pytest.raises(CacheFullError, match="1 pages needed, 0 free"):
        life.cache.open(2, tokens=1)


# check()


def broken_life() -> Life:
    """Three rows: a prompt, one that shares its first page, a fork with a page on loan."""
    life = Life()
    prompt = [1, 2, 0, 1, 2]
    life.open(0, prompt, tokens=7)
    life.commit({0: prompt})
    life.open(1, prompt, tokens=6)
    life.commit({1: [1]})
    life.fork(0, 2, tokens=6)
    life.verify()
    return life


def swap_owner_page(cache: PagedKVCache) -> None:
    """Row 1 gets row 0's last page instead of its own, on the host and on the device."""
    page = cache._rows[0].pages[2]
    mine = cache._rows[1].pages[1]
    cache._rows[1].pages[1] = page
    cache.page_table[1, 1] = page
    cache._references[page] += 1
    cache._references[mine] -= 1
    cache._free.append(mine)


CORRUPTIONS: dict[str, tuple[str, Callable[[PagedKVCache], object]]] = {
    "too_many_committed": (
        "row 0: 10 committed of 9 allocated",
        lambda cache: cache.lengths[0].fill_(10),
    ),
    "negative_committed": (
        "row 0: -1 committed",
        lambda cache: cache.lengths[0].fill_(-1),
    ),
    "device_table": (
        "row 1: page table on the device differs",
        lambda cache: cache.page_table[1, 0].add_(1),
    ),
    "device_capacity": ("row 2: 5 committed of", lambda cache: cache.capacity[2].add_(1)),
    "busy_idle_row": (
        "the idle row holds tokens",
        lambda cache: cache.lengths[cache.idle_row].add_(1),
    ),
    "two_writers": ("may both write to it", swap_owner_page),
    "freed_in_use": (
        "is free and in use",
        lambda cache: cache._free.append(cache._rows[0].pages[0]),
    ),
    "count_too_high": (
        "3 held",
        lambda cache: cache._references.__setitem__(cache._rows[0].pages[0], 4),
    ),
    "count_too_low": (
        "1 references, 2 held",
        lambda cache: cache._references.__setitem__(cache._rows[2].pages[1], 1),
    ),
    "leaked": ("pages leaked", lambda cache: cache._free.pop()),
    "freed_twice": ("pages leaked", lambda cache: cache._free.append(cache._free[0])),
    "offered_page_is_free": (
        "is free and in use",
        lambda cache: cache._shared_key.__setitem__(cache._free[0], (-1, (9, 9, 9))),
    ),
    "offer_without_page": (
        "index of shared prefixes",
        lambda cache: cache._shared.clear(),
    ),
    "offer_of_another_page": (
        "index of shared prefixes",
        lambda cache: cache._shared.update({(7, (9, 9, 9)): cache._rows[0].pages[0]}),
    ),
    "forgotten_reserve": (
        "1 references, 0 held",
        lambda cache: setattr(cache._rows[2], "spare", None),
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_detects(name: str) -> None:
    message, corrupt = CORRUPTIONS[name]
    life = broken_life()
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
