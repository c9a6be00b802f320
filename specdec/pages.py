"""Pages: which pages of a pool each row holds, and which of them later prompts may share.

The host's half of `PagedKVCache`: numbers of pages and tokens, no tensors. A row is one sequence;
of its positions
    [0, committed)           are written,
    [committed, allocated)   belong to the row and are empty.
Full pages never change again, so rows may share those of a common beginning of their prompts,
which are found by exact match and held by reference count; a page that is not full has one row.
What a page holds may depend on tokens after its own (`successors`): these must match too.
A row holds all pages it may ever need from the moment it is opened, so nothing can run out in the
middle of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class CacheFullError(RuntimeError):
    """Too few free pages for a row to be opened now; it may fit when other rows have closed."""


@dataclass(slots=True)
class _Row:
    """An open row."""

    pages: list[int]
    # Tokens of the prompt, whose full pages may be shared.
    prefix: list[int]
    offered: int = 0  # full pages of it that later prompts were offered


class Pages:
    """The pages of a pool and the rows that hold them.

    Args:
        count: pages in the pool.
        size: tokens of a page.
        max_tokens: the longest sequence a row may hold.
        successors: tokens after its own that what a page holds depends on.
    """

    def __init__(self, *, count: int, size: int, max_tokens: int, successors: int = 0) -> None:
        self.count, self.size, self.max_tokens = count, size, max_tokens
        self.successors = successors
        self._rows: dict[int, _Row] = {}
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        # A full page of a prompt, found by what precedes it, its own tokens and their successors.
        # The parent page is alive as long as the child is, so its number identifies the prefix.
        self._shared: dict[tuple[int, tuple[int, ...]], int] = {}
        self._shared_key: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    @property
    def rows(self) -> list[int]:
        """The open ones."""
        return list(self._rows)

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def of(self, row: int) -> list[int]:
        """The pages of an open row, in the order of its positions."""
        return list(self._rows[row].pages)

    def allocated(self, row: int) -> int:
        """Tokens that fit into the pages of an open row."""
        return len(self._rows[row].pages) * self.size

    def open(
        self, row: int, *, tokens: int, prefix: Sequence[int] = (), found: int | None = None
    ) -> int:
        """Give a row all the pages it may need, those that `match` its prefix among them.

        Args:
            tokens: the row will never hold more.
            prefix: the tokens it is about to commit first.
            found: so many of them are to be in pages that it shares; None is all that match.

        Returns:
            How many tokens of the prefix are already committed, a multiple of the page size.

        Raises:
            CacheFullError: too few free pages; nothing has changed.
            RuntimeError: the row is open, or fewer are found.
            ValueError: more tokens than a row or the whole pool can hold.
        """
        if row in self._rows:
            raise RuntimeError(f"cache row {row} is already open")
        needed = self.needed(tokens)
        if tokens > self.max_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the {self.max_tokens} of a cache row"
            )
        if needed > self.count:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the {self.count} pages of the cache"
            )
        shared = self.match(prefix)
        if found is not None:
            if found > len(shared) * self.size:
                raise RuntimeError(
                    f"cache row {row}: {found} tokens to be shared, "
                    f"{len(shared) * self.size} are on offer"
                )
            shared = shared[: found // self.size]
        own = needed - len(shared)
        if own > self.free:
            raise CacheFullError(f"{own} pages needed, {self.free} free")
        pages = shared + [self._free.pop() for _ in range(own)]
        for page in pages:
            self._references[page] += 1
        self._rows[row] = _Row(pages, list(prefix))
        return len(shared) * self.size

    def close(self, row: int) -> None:
        """Give the pages of a row back; those that other rows share live on."""
        for page in self._rows.pop(row).pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
                key = self._shared_key.pop(page, None)
                if key is not None:
                    del self._shared[key]

    def match(self, prefix: Sequence[int]) -> list[int]:
        """The pages on offer that hold the beginning of a prompt, in order."""
        pages: list[int] = []
        for i in range((len(prefix) - self.successors) // self.size):
            page = self._shared.get(self._key(prefix, pages, i))
            if page is None:
                break
            pages.append(page)
        return pages

    def offer(self, row: int, committed: int) -> None:
        """Let later prompts share the pages of a row's own prompt that are full, now that it has
        so many tokens committed."""
        state = self._rows[row]
        full = min(committed, len(state.prefix) - self.successors) // self.size
        for i in range(state.offered, full):
            key = self._key(state.prefix, state.pages, i)
            if key not in self._shared:
                self._shared[key] = state.pages[i]
                self._shared_key[state.pages[i]] = key
        state.offered = full

    def _key(
        self, prefix: Sequence[int], pages: Sequence[int], i: int
    ) -> tuple[int, tuple[int, ...]]:
        parent = pages[i - 1] if i else -1
        return parent, tuple(prefix[i * self.size : (i + 1) * self.size + self.successors])

    def check(self, committed: Mapping[int, int]) -> None:
        """Raise RuntimeError, naming the first violation, unless every invariant holds.

        Args:
            committed: tokens of each open row.
        """
        expected = [0] * self.count
        writers: dict[int, int] = {}  # page -> row that may write to it
        for row, state in self._rows.items():
            if not 0 <= committed[row] <= self.allocated(row):
                raise RuntimeError(
                    f"row {row}: {committed[row]} committed of {self.allocated(row)} allocated"
                )
            for i, page in enumerate(state.pages):
                expected[page] += 1
                if i >= committed[row] // self.size:
                    if page in writers:
                        raise RuntimeError(
                            f"page {page}: rows {writers[page]} and {row} may both write to it"
                        )
                    if page in self._shared_key:
                        raise RuntimeError(f"page {page}: on offer, and row {row} may write to it")
                    writers[page] = row
        for page in self._free:
            if expected[page] or page in self._shared_key:
                raise RuntimeError(f"page {page} is free and in use")
        if expected != self._references:
            wrong = next(p for p in range(self.count) if expected[p] != self._references[p])
            raise RuntimeError(
                f"page {wrong}: {self._references[wrong]} references, {expected[wrong]} held"
            )
        held = sum(count > 0 for count in expected)
        if held + len(set(self._free)) != self.count or len(set(self._free)) != len(self._free):
            raise RuntimeError(f"pages leaked: {held} held, {self.free} free of {self.count}")
        if self._shared != {key: page for page, key in self._shared_key.items()}:
            raise RuntimeError("the index of shared prefixes is inconsistent")
