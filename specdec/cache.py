"""PagedKVCache: keys and values of committed tokens in shared pages, and of draft nodes in a
scratch.

Pages hold committed tokens only. A row of the cache is one sequence; of its positions
    [0, committed)           are written and readable,
    [committed, allocated)   belong to the row and are empty.
Which pages those are, and which rows share them, is the business of `specdec.pages`.

Draft nodes keep their keys and values in the scratch, once per node however many branches pass
through it; `commit` copies an accepted path to the pages. How much of a row is committed is known
to the device alone, so that a step need not wait for it. Pages may hold a quantised type; rows
are then rounded to it before they enter the scratch (`write_tree`), so that a model sees a node as
it will be once it is committed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.reference.cache import LARGEST
from specdec.pages import CacheFullError as CacheFullError
from specdec.pages import Pages


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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PageView:
    """Some pages of each of B rows, which attention reads as if they were all: keys hold their
    positions in themselves, so a page may be left out of the table.

    Args:
        page_table: [B, C] int32.
        lengths: [B] int32, committed tokens in these pages.
        left_out: [B] int32, those in other pages, whole ones.
        most: no length exceeds it.
    """

    page_table: Tensor
    lengths: Tensor
    left_out: Tensor
    most: int


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
        exact: what it holds was computed with `Kernels.exact`.
        successors: as in `Pages`.

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
        exact: bool = False,
        successors: int = 0,
    ) -> None:
        for name, value in {"page_size": page_size, "pages": pages, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"cache.{name}={value}: must be at least 1")
        if kv_dtype is not None and kv_dtype not in LARGEST:
            raise ValueError(f"kv_dtype={kv_dtype}: must be None, float8_e4m3fn or int8 of torch")
        self.shape, self.page_size, self.max_tokens = shape, page_size, max_tokens
        self.pages, self.idle_row = pages, rows
        self.kv_dtype = kv_dtype
        self._kernels, self.exact = kernels, exact
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
        self._pages = Pages(
            count=pages, size=page_size, max_tokens=max_tokens, successors=successors
        )
        columns = self.pages_for(max_tokens)
        self.page_table = torch.zeros(rows + 1, columns, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows + 1, dtype=torch.int32, device=device)  # committed tokens
        self.capacity = torch.zeros_like(self.lengths)  # allocated tokens
        no_scratch = (shape.layers, 0, shape.kv_heads, 0)
        self.tree_keys = self._like.new_zeros(*no_scratch, shape.key_dim)  # [L, B, HKV, M, D]
        self.tree_values = self._like.new_zeros(*no_scratch, shape.value_dim)
        self._outgrown: list[tuple[Tensor, Tensor]] = []

    def pages_for(self, tokens: int) -> int:
        return self._pages.needed(tokens)

    @property
    def free_pages(self) -> int:
        return self._pages.free

    @property
    def open_rows(self) -> list[int]:
        return self._pages.rows

    def committed(self, row: int) -> int:
        """Waits for the device."""
        return int(self.lengths[row])

    def allocated(self, row: int) -> int:
        return self._pages.allocated(row)

    # Rows

    def open(
        self, row: int, *, tokens: int, prefix: Sequence[int] = (), found: int | None = None
    ) -> int:
        """Give a row all the pages it may need; arguments, result and errors are those of
        `Pages.open`."""
        done = self._pages.open(row, tokens=tokens, prefix=prefix, found=found)
        pages = torch.tensor(self._pages.of(row), dtype=torch.int32)
        self.page_table[row, : len(pages)] = pages.to(self.page_table.device)
        self.capacity[row] = self.allocated(row)
        self.lengths[row] = done
        return done

    def shareable(self, prefix: Sequence[int]) -> int:
        """Tokens of `prefix` that `open` would find committed."""
        return len(self._pages.match(prefix)) * self.page_size

    def close(self, row: int) -> None:
        """Give the row's pages back; pages that other rows share live on."""
        self._pages.close(row)
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
        self.append(torch.tensor(rows, device=self.keys.device), path, length, max(counts))
        for row, count in zip(rows, counts, strict=True):
            self._pages.offer(row, committed[row] + count)

    def append(
        self, rows: Tensor, path: Tensor | None, length: Tensor, most: int | None = None
    ) -> None:
        """As `commit`, but waits for nothing: what exceeds the pages of a row is dropped, and
        later prompts share no page of it before it is offered.

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

    def offer(self, rows: Sequence[int]) -> None:
        """Let later prompts share what these rows hold of their own prompts. Waits for the
        device."""
        committed = self.lengths.tolist()
        for row in rows:
            self._pages.offer(row, committed[row])

    def view(self, rows: Tensor, *, sink: int, window: int) -> PageView:
        """The first pages of each row and its last ones. Waits for nothing.

        Args:
            rows: [B] int64 on the device.
            sink, window: tokens at the beginning and at the end, of which none is left out; with
                them come the others of their pages.
        """
        size, columns = self.page_size, self.page_table.shape[1]
        first, last = self.pages_for(sink), self.pages_for(window) + 1  # a window may begin in one
        lengths = self.lengths.index_select(0, rows)
        left_out = ((lengths - window).clamp(min=0) // size - first).clamp(min=0)  # pages
        column = torch.arange(min(first + last, columns), device=rows.device)
        place = column + torch.where(column < first, 0, left_out[:, None])
        table = self.page_table.index_select(0, rows)
        return PageView(
            page_table=table.gather(1, place.clamp(max=columns - 1)),
            lengths=lengths - left_out * size,
            left_out=left_out * size,
            most=min((first + last) * size, self.max_tokens),
        )

    def check(self) -> None:
        """Raise RuntimeError, naming the first violation, unless every invariant of the cache
        holds."""
        if int(self.lengths[self.idle_row]) or int(self.capacity[self.idle_row]):
            raise RuntimeError("the idle row holds tokens")
        committed = {row: self.committed(row) for row in self._pages.rows}
        self._pages.check(committed)
        for row in committed:
            if int(self.capacity[row]) != self.allocated(row):
                raise RuntimeError(
                    f"row {row}: capacity {int(self.capacity[row])} on the device, "
                    f"{self.allocated(row)} allocated"
                )
            pages = self._pages.of(row)
            if self.page_table[row, : len(pages)].tolist() != pages:
                raise RuntimeError(f"row {row}: page table on the device differs from the host's")
        for scales in (self.key_scales, self.value_scales):
            if scales is not None and not bool((scales > 0).all()):
                raise RuntimeError("a scale is not positive")
