"""CachedModel: a model and its own paged cache, in step with the sequences of the running batch.

What the verifier and every drafting model share: taking prompts in (common beginnings once), and
giving rows back.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from specdec.arrivals import Join, Prefill, Shareable
from specdec.cache import CacheFullError, KVShape, PagedKVCache
from specdec.models.paged import PagedLM
from specdec.models.placement import free_memory
from specdec.request import Capacity, Decoding

if TYPE_CHECKING:
    from specdec.prefixes import Prefixes

AT_ONCE = 4096  # tokens of a prompt that are read a pass a step before reading is slowed down
MEMORY_SHARE = 0.8  # of the free memory of a GPU that pages may take


class CachedModel:
    """A `PagedLM` with a `PagedKVCache` of its own.

    Args:
        lm: the model.
        prefixes: whose cache it uses for their capacity; None: it has its own.
    """

    def __init__(self, lm: PagedLM, *, prefixes: "Prefixes | None" = None) -> None:
        self.lm, self._prefixes = lm, prefixes
        self.cache: PagedKVCache
        self._share, self._successors = True, 0
        self._unread: dict[int, list[int]] = {}  # by row, of prompts that are not read whole

    def prepare(self, capacity: Capacity) -> None:
        """Start over with an empty cache; what was before can no longer be decoded.

        Raises:
            ValueError: the memory of the GPU does not hold the pages of one sequence.
        """
        if hasattr(self, "cache"):
            del self.cache  # its memory is free for the new one
        self._share, self._successors = capacity.share, capacity.successors
        self._unread.clear()
        if self._prefixes is not None and self._prefixes.serves(self.lm, capacity):
            self.cache = self._prefixes.cache
            return
        self.cache = cache_of(self.lm, capacity, capacity.rows)

    def start(self, sequences: Sequence[Decoding]) -> list[Decoding]:
        """Rows for these, in order, as far as there is room; `read` reads their prompts.

        Raises:
            ValueError: a sequence that the empty pool could not hold.
        """
        return [*takewhile(self._open, sequences)]

    def wave(
        self, pending: Sequence[Decoding], shareable: Shareable
    ) -> tuple[list[Decoding], list[Decoding]]:
        """As `start`, for those that share nothing with one another but what is in the cache
        already, and what others have of it (`Drafter.shareable`): these, and who is next."""
        wave: list[Decoding] = []
        later: list[Decoding] = []
        page = self.cache.page_size
        for sequence in pending:
            prefix = sequence.tokens[:-1] if self._share else []
            here, there = self.cache.shareable(prefix), shareable(prefix)
            found = here if there is None else min(here, there)
            common = max((_common(prefix, other.tokens[:-1]) for other in wave), default=0)
            if (common - self._successors) // page * page > found:
                later.append(sequence)
            elif self._open(sequence, found):
                sequence.found = found
                wave.append(sequence)
            else:
                return wave, []
        return wave, later

    def _open(self, sequence: Decoding, found: int | None = None) -> bool:
        """Whether there was room for it; `found` as in `Pages.open`."""
        prefix = sequence.tokens[:-1]
        tokens = min(sequence.request.max_tokens, self.cache.max_tokens)
        shared = prefix if self._share else ()
        try:
            done = self.cache.open(sequence.row, tokens=tokens, prefix=shared, found=found)
        except CacheFullError:
            return False
        self._unread[sequence.row] = prefix[done:]
        return True

    def read(self, sequences: Sequence[Decoding], tokens: int, **how: Any) -> list[Decoding]:
        """Read so many tokens more of the prompts of each of these, of which the last one is left
        out.

        Args:
            how: of `PagedLM.prefill`.

        Returns:
            Those whose prompts it has now read whole, and had not before.
        """
        rests = {s.row: self._unread[s.row] for s in sequences if s.row in self._unread}
        parts = {row: rest[:tokens] for row, rest in rests.items() if rest}
        self.lm.prefill(self.cache, list(parts), list(parts.values()), chunk=tokens, **how)
        for row, rest in rests.items():
            self._unread[row] = rest[tokens:]
            if not self._unread[row]:
                del self._unread[row]
        return [s for s in sequences if s.row in rests and self.has_read(s)]

    def has_read(self, sequence: Decoding) -> bool:
        """Whether nothing of a prompt that it has a row for is left to read."""
        return sequence.row not in self._unread

    def finish(self, sequence: Decoding) -> None:
        self._unread.pop(sequence.row, None)
        self.cache.close(sequence.row)


class Reading:
    """Sequences on their way into a model's cache, an `Intake`: rows are opened, then all but the
    last token of each is read, pass by pass. A drafter with a model of its own reads as many
    tokens in the same passes.

    A prompt that begins like another of the same call waits until the other's pages can be shared.
    Beside rows that decode, passes are no wider than one of a single sequence, and what a prompt
    has beyond `AT_ONCE` tokens is read at the rate of `beside`.

    Args:
        model: whose cache it is.
        sequences: in order; those that find no room are never returned.
        join, prefill, shareable: as in `Verifier.start`.
        chunk, beside: `prefill_chunk` and `prefill_beside` of `CacheSettings`.
        how: `see`, `logits` and `taps` of `PagedLM.prefill`.
    """

    def __init__(
        self,
        model: CachedModel,
        sequences: Sequence[Decoding],
        join: Join,
        prefill: Prefill,
        shareable: Shareable,
        *,
        chunk: int,
        beside: int | None,
        **how: Any,
    ) -> None:
        self._model, self._join, self._prefill, self._how = model, join, prefill, how
        self._shareable = shareable
        self._chunk, self._rate = chunk, beside
        self._pending = list(sequences)
        self._wave: list[Decoding] = []  # those that are being read
        self._read, self._paid = 0, 0  # tokens
        self._at_once = AT_ONCE * len(self._pending)
        self._begin()

    @property
    def done(self) -> bool:
        return not self._wave and not self._pending

    def read(self, *, beside: bool = False) -> list[Decoding]:
        chunk, found = self._chunk, list[Decoding]()
        if beside and self._rate is None:
            while not self.done:
                found += self.read()
            return found
        if beside and self._rate is not None:
            self._paid += self._rate if self._read >= self._at_once else 0
            if self._read >= self._at_once + self._paid:
                return []
            chunk = max(1, chunk // len(self._wave))
        self._read += chunk * len(self._wave)
        self._model.read(self._wave, chunk, **self._how)
        drafted = self._prefill(self._wave, chunk)
        found = [s for s in self._wave if self._model.has_read(s) and s in drafted]
        self._wave = [sequence for sequence in self._wave if sequence not in found]
        if not self._wave:
            self._begin()
        return found

    def _begin(self) -> None:
        """Open rows for those that need not wait for the pages of another."""
        wave, self._pending = self._model.wave(self._pending, self._shareable)
        taken = self._join(wave) if wave else wave
        if len(taken) < len(wave):
            self._pending = []
        for sequence in wave:
            if sequence in taken:
                self._wave.append(sequence)
            else:
                self._model.finish(sequence)


def cache_of(lm: PagedLM, capacity: Capacity, rows: int) -> PagedKVCache:
    """An empty one of a model, of the pages that a run has and so many rows; errors as of
    `pages_of`."""
    return lm.new_cache(
        rows=rows,
        pages=pages_of(capacity, lm.kv_shape, lm.dtype, lm.device),
        page_size=capacity.page_size,
        max_tokens=capacity.max_tokens,
        kv_dtype=capacity.kv_dtype,
        successors=capacity.successors,
    )


def pages_of(capacity: Capacity, shape: KVShape, dtype: torch.dtype, device: torch.device) -> int:
    """Pages of a cache for a run; on a GPU no more than fit into its free memory, and further
    requests wait for them.

    Raises:
        ValueError: they would not hold one sequence.
    """
    if capacity.pages is not None or device.type != "cuda":
        return capacity.pool_pages
    free = free_memory(device)
    page = capacity.page_size * shape.bytes_per_token(capacity.kv_dtype or dtype)
    pages, needed = int(free * MEMORY_SHARE) // page, capacity.pages_of_a_row
    if pages < needed:
        raise ValueError(
            f"cache.pages=null: the keys and values of {capacity.max_tokens} tokens take "
            f"{needed * page / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"lower max_new_tokens, or use cache.dtype=fp8_e4m3"
        )
    return min(pages, capacity.pool_pages)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
