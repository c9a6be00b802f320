"""PagedKVCache: keys and values of committed tokens in shared pages, and of draft nodes in a
scratch.

Pages hold committed tokens only. A row of the cache is one sequence; of its positions
    [0, committed)           are written and readable,
    [committed, allocated)   belong to the row and are empty.
Full pages never change again, so rows may share them: the common beginning of two prompts
(`open`), or all of a row's history (`fork`). A page is shared by reference count; the partly
filled last page of a forked row is copied when the fork first writes to it. A row holds all pages
it may ever need from the moment it is opened, so nothing can run out in the middle of a step.

Draft nodes keep their keys and values in the scratch, once per node however many branches pass
through it; `commit` copies an accepted path to the pages. How much of a row is committed is known
to the device alone, so that a step need not wait for it. Pages may hold a quantised type; rows
are then rounded to it before they enter the scratch (`write_tree`), so that a model sees a node as
it will be once it is committed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.reference.cache import LARGEST


class CacheFullError(RuntimeError):
    """Too few free pages for a row to be opened now; it may fit when other rows have closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Keys and values of one token in one model: [layers, kv_heads, key_dim] and [layers,
    kv_heads, value_dim]."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """What a token takes in pages of this type, the scales of a quantised one included."""
        scales = 2 * torch.float32.itemsize if dtype in LARGEST else 0
        numbers = (self.key_dim + self.value_dim) * dtype.itemsize
        return self.layers * self.kv_heads * (numbers + scales)


@dataclass(slots=True)
class _Row:
    """Host-side state of an open row."""

    pages: list[int]
    borrowed: int | None = (
        None  # index in `pages` of a partial page that belongs to the row forked from
    )
    spare: int | None = None  # the page a borrowed one is copied to on the first write
    prefix: list[int] = field(
        default_factory=list
    )  # tokens of the prompt, whose full pages may be shared


class PagedKVCache:
    """Keys and values of up to `rows` sequences in a pool of pages.

    Args:
        shape: layers, heads and head sizes.
        rows: sequences held at a time. Row number `rows` is always idle: it holds nothing, and
            what is appended to it is dropped.
        pages: pages in the pool.
        page_size: tokens of a page.
        max_tokens: the longest sequence a row may hold.
        dtype, device: of keys and values.
        kv_dtype: what the pages hold them as, float8_e4m3fn or int8, with a scale for each token
            and head; None for `dtype`, which the scratch keeps in any case.
        kernels: the implementation that moves them, `specdec.kernels.reference` or `gpu`.

    Raises:
        ValueError: a size below 1, or another `kv_dtype`.
    """

    def __init__(
        self,
        *,
        shape: KVShape,
        rows: int,
        pages: int,
        page_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        kernels: ModuleType = reference,
    ) -> None:
        for name, value in {"page_size": page_size, "pages": pages, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"cache.{name}={value}: must be at least 1")
        if kv_dtype is not None and kv_dtype not in LARGEST:
            raise ValueError(f"kv_dtype={kv_dtype}: must be None, float8_e4m3fn or int8 of torch")
        self.shape, self.page_size, self.max_tokens = shape, page_size, max_tokens
        self.pages, self.idle_row = pages, rows
        self.kv_dtype = kv_dtype
        self._kernels = kernels
        self._like = torch.empty(0, dtype=dtype, device=device)
        # Zeros, not empty: a stray NaN in a page nobody has written would survive a weight of
        # zero.
        pool = (shape.layers, pages, shape.kv_heads, page_size)
        stored = self._like.to(dtype if kv_dtype is None else kv_dtype)
        self.keys = stored.new_zeros(*pool, shape.key_dim)  # [L, pages, HKV, S, D]
        self.values = stored.new_zeros(*pool, shape.value_dim)
        self.key_scales: Tensor | None = None  # [L, pages, HKV, S] float32, of quantised pages
        self.value_scales: Tensor | None = None
        if kv_dtype is not None:
            self.key_scales = torch.ones(pool, dtype=torch.float32, device=device)
            self.value_scales = torch.ones_like(self.key_scales)
        columns = self.pages_for(max_tokens)
        self.page_table = torch.zeros(rows + 1, columns, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows + 1, dtype=torch.int32, device=device)  # committed tokens
        self.capacity = torch.zeros_like(self.lengths)  # allocated tokens
        no_scratch = (shape.layers, 0, shape.kv_heads, 0)
        self.tree_keys = self._like.new_zeros(*no_scratch, shape.key_dim)  # [L, B, HKV, M, D]
        self.tree_values = self._like.new_zeros(*no_scratch, shape.value_dim)
        self._outgrown: list[tuple[Tensor, Tensor]] = []
        self._rows: dict[int, _Row] = {}
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        # A full page of a prompt, found by what precedes it and its own tokens. The parent page is
        # alive as long as the child is, so its number identifies the whole prefix.
        self._shared: dict[tuple[int, tuple[int, ...]], int] = {}
        self._shared_key: dict[int, tuple[int, tuple[int, ...]]] = {}

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def committed(self, row: int) -> int:
        """Waits for the device."""
        return int(self.lengths[row])

    def allocated(self, row: int) -> int:
        return len(self._rows[row].pages) * self.page_size

    # Rows

    def open(self, row: int, *, tokens: int, prefix: Sequence[int] = ()) -> int:
        """Give a row all the pages it may need, the full pages of `prefix` that other rows hold
        among them.

        Args:
            tokens: the row will never hold more.
            prefix: the tokens it is about to commit first.

        Returns:
            How many tokens of the prefix are already committed, a multiple of the page size.

        Raises:
            CacheFullError: too few free pages; nothing has changed.
            RuntimeError: the row is open.
            ValueError: more tokens than a row or the whole pool can hold.
        """
        if row in self._rows:
            raise RuntimeError(f"cache row {row} is already open")
        needed = self.pages_for(tokens)
        if tokens > self.max_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the {self.max_tokens} of a cache row"
            )
        if needed > self.pages:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the {self.pages} pages of the cache"
            )
        shared = self._match(prefix)
        if needed - len(shared) > len(self._free):
            raise CacheFullError(f"{needed - len(shared)} pages needed, {len(self._free)} free")
        for page in shared:
            self._references[page] += 1
        pages = shared + [self._take() for _ in range(needed - len(shared))]
        self._rows[row] = _Row(pages, prefix=list(prefix))
        self._publish_row(row)
        done = len(shared) * self.page_size
        self.lengths[row] = done
        return done

    def shareable(self, prefix: Sequence[int]) -> int:
        """Tokens of `prefix` that `open` would find committed."""
        return len(self._match(prefix)) * self.page_size

    def fork(self, source: int, row: int, *, tokens: int) -> None:
        """Open a row with the same committed tokens as `source`, sharing every page that holds
        some.

        Args:
            tokens: the new row will never hold more.

        Raises:
            CacheFullError: too few free pages for what the new row may write; nothing has changed.
            RuntimeError: the row is open.
            ValueError: fewer tokens than `source` holds, or more than a row can.
        """
        if row in self._rows:
            raise RuntimeError(f"cache row {row} is already open")
        parent, committed = self._rows[source], self.committed(source)
        if not committed <= tokens <= self.max_tokens:
            raise ValueError(
                f"{committed} tokens do not fit a row of {tokens}, limit {self.max_tokens}"
            )
        used, full = self.pages_for(committed), committed // self.page_size
        own = (
            self.pages_for(tokens) - full
        )  # the partial page counts: it is copied when written to
        if own > len(self._free):
            raise CacheFullError(f"{own} pages needed, {len(self._free)} free")
        shared = parent.pages[:used]
        for page in shared:
            self._references[page] += 1
        partial = used > full
        child = _Row(
            shared + [self._take() for _ in range(own - partial)],
            borrowed=full if partial else None,
            spare=self._take() if partial else None,
            prefix=parent.prefix[:committed],
        )
        self._rows[row] = child
        self._publish_row(row)
        self.lengths[row] = committed

    def close(self, row: int) -> None:
        """Give the row's pages back; pages that other rows share live on."""
        state = self._rows.pop(row)
        for page in state.pages if state.spare is None else [*state.pages, state.spare]:
            self._release(page)
        self.lengths[row] = 0
        self.capacity[row] = 0

    # Tokens

    def scratch(self, batch: int, nodes: int) -> None:
        """Make `tree_keys` and `tree_values` at least [L, batch, HKV, nodes, D]; what they hold
        stays.

        A scratch that was too small is kept: graphs captured over it go on using it.
        """
        _, had_batch, _, had_nodes, _ = self.tree_keys.shape
        if had_batch >= batch and had_nodes >= nodes:
            return
        if had_nodes and self.keys.is_cuda:
            self._outgrown.append((self.tree_keys, self.tree_values))
        batch, nodes = max(batch, had_batch, self.idle_row), max(nodes, had_nodes)
        keys, values = self._new_scratch(batch, nodes)
        keys[:, :had_batch, :, :had_nodes] = self.tree_keys
        values[:, :had_batch, :, :had_nodes] = self.tree_values
        self.tree_keys, self.tree_values = keys, values

    @contextmanager
    def scratch_apart(self, batch: int, nodes: int) -> Iterator[None]:
        """A scratch for the time being: that of draft nodes need not grow for a prompt."""
        kept = self.tree_keys, self.tree_values
        self.tree_keys, self.tree_values = self._new_scratch(batch, nodes)
        try:
            yield
        finally:
            self.tree_keys, self.tree_values = kept

    def _new_scratch(self, batch: int, nodes: int) -> tuple[Tensor, Tensor]:
        leading = (self.shape.layers, batch, self.shape.kv_heads, nodes)
        return (
            self._like.new_zeros(*leading, self.shape.key_dim),
            self._like.new_zeros(*leading, self.shape.value_dim),
        )

    def commit(self, rows: Sequence[int], path: Tensor | None, length: Tensor) -> None:
        """Append the accepted scratch rows of each sequence to its pages. Waits for the device.

        Args:
            rows: [B], the cache row of each sequence of the scratch.
            path: [B, A] int64, scratch rows in order; None for the rows 0, 1, ...
            length: [B] int, how many of them to append; 0 appends nothing.

        Raises:
            RuntimeError: a row would outgrow its pages or its path; nothing has been written.
        """
        counts, committed = length.tolist(), self.lengths.tolist()
        most = self.tree_keys.shape[3] if path is None else path.shape[1]
        if max(counts, default=0) > most:
            raise RuntimeError(f"{max(counts)} tokens to commit, but paths of {most}")
        for row, count in zip(rows, counts, strict=True):
            if committed[row] + count > self.allocated(row):
                raise RuntimeError(
                    f"cache row {row}: {count} tokens more exceed {self.allocated(row)} allocated"
                )
        if not any(counts):
            return
        for row, count in zip(rows, counts, strict=True):
            if count:
                self._own_last_page(row)
        self.append(torch.tensor(rows, device=self.keys.device), path, length, max(counts))
        for row, count in zip(rows, counts, strict=True):
            self._offer(row, committed[row], committed[row] + count)

    def append(
        self, rows: Tensor, path: Tensor | None, length: Tensor, most: int | None = None
    ) -> None:
        """As `commit`, for rows that share no partly filled page: waits for nothing, and what
        exceeds the pages of a row is dropped.

        Args:
            rows: [B] int64 on the device.
            most: no length exceeds this; None if it is not known.
        """
        lengths = self.lengths.index_select(0, rows)
        length = torch.minimum(length.int(), self.capacity.index_select(0, rows) - lengths)
        # Without a path, rows that nobody commits need not be looked at.
        end = most if path is None else None
        self._kernels.commit_path(
            self.keys,
            self.values,
            self.tree_keys[:, :, :, :end],
            self.tree_values[:, :, :, :end],
            path,
            length,
            self.page_table.index_select(0, rows),
            lengths,
            self.key_scales,
            self.value_scales,
        )
        self.lengths.index_add_(0, rows, length)

    # Pages

    def _offer(self, row: int, before: int, after: int) -> None:
        """Offer pages of the prompt that are full now to later rows."""
        state = self._rows[row]
        last = min(after, len(state.prefix)) // self.page_size
        for i in range(before // self.page_size, last):
            key = self._key(state.prefix, state.pages, i)
            if key not in self._shared:
                self._shared[key] = state.pages[i]
                self._shared_key[state.pages[i]] = key

    def _key(
        self, prefix: Sequence[int], pages: Sequence[int], i: int
    ) -> tuple[int, tuple[int, ...]]:
        parent = pages[i - 1] if i else -1
        return parent, tuple(prefix[i * self.page_size : (i + 1) * self.page_size])

    def _match(self, prefix: Sequence[int]) -> list[int]:
        pages: list[int] = []
        for i in range(len(prefix) // self.page_size):
            page = self._shared.get(self._key(prefix, pages, i))
            if page is None:
                break
            pages.append(page)
        return pages

    def _own_last_page(self, row: int) -> None:
        """Before a write: copy the partial page a fork shares, unless everybody else has left
        it."""
        state = self._rows[row]
        if state.borrowed is None or state.spare is None:
            return
        page = state.pages[state.borrowed]
        if self._references[page] > 1:
            for pool in (self.keys, self.values, self.key_scales, self.value_scales):
                if pool is not None:
                    pool[:, state.spare] = pool[:, page]
            state.pages[state.borrowed] = state.spare
            self._publish_row(row)
            self._release(page)
        else:
            self._withdraw(page)  # its owner may have filled and offered it before leaving
            self._release(state.spare)
        state.borrowed = state.spare = None

    def _publish_row(self, row: int) -> None:
        state = self._rows[row]
        pages = torch.tensor(state.pages, dtype=torch.int32)
        self.page_table[row, : len(pages)] = pages.to(self.page_table.device)
        self.capacity[row] = len(pages) * self.page_size

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)
            self._withdraw(page)

    def _withdraw(self, page: int) -> None:
        """Offer a page to later prompts no longer."""
        key = self._shared_key.pop(page, None)
        if key is not None:
            del self._shared[key]

    def check(self) -> None:
        """Raise RuntimeError, naming the first violation, unless every invariant of the cache
        holds."""
        expected = [0] * self.pages
        writers: dict[int, int] = {}  # page -> row that may write to it
        if int(self.lengths[self.idle_row]) or int(self.capacity[self.idle_row]):
            raise RuntimeError("the idle row holds tokens")
        for row, state in self._rows.items():
            committed = self.committed(row)
            if not 0 <= committed <= self.allocated(row) == int(self.capacity[row]):
                raise RuntimeError(
                    f"row {row}: {committed} committed of {self.allocated(row)} allocated"
                )
            if self.page_table[row, : len(state.pages)].tolist() != state.pages:
                raise RuntimeError(f"row {row}: page table on the device differs from the host's")
            for i, page in enumerate(state.pages):
                expected[page] += 1
                if i >= committed // self.page_size and i != state.borrowed:
                    if page in writers:
                        raise RuntimeError(
                            f"page {page}: rows {writers[page]} and {row} may both write to it"
                        )
                    writers[page] = row
            if state.spare is not None:
                expected[state.spare] += 1
                writers[state.spare] = row
        for page in self._free:
            if expected[page] or page in self._shared_key:
                raise RuntimeError(f"page {page} is free and in use")
        if expected != self._references:
            wrong = next(p for p in range(self.pages) if expected[p] != self._references[p])
            raise RuntimeError(
                f"page {wrong}: {self._references[wrong]} references, {expected[wrong]} held"
            )
        held = sum(count > 0 for count in expected)
        if held + len(set(self._free)) != self.pages or len(set(self._free)) != len(self._free):
            raise RuntimeError(
                f"pages leaked: {held} held, {len(self._free)} free of {self.pages}"
            )
        if self._shared != {key: page for page, key in self._shared_key.items()}:
            raise RuntimeError("the index of shared prefixes is inconsistent")
        for scales in (self.key_scales, self.value_scales):
            if scales is not None and not bool((scales > 0).all()):
                raise RuntimeError("a scale is not positive")
