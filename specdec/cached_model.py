"""CachedModel: a model and its own paged cache, in step with the sequences of the running batch.

What the verifier and every drafting model share: taking prompts in (common beginnings once), and
giving rows back.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from specdec.cache import CacheFullError, KVShape, PagedKVCache
from specdec.models.paged import PagedLM, See
from specdec.models.placement import free_memory
from specdec.observation import Tap
from specdec.request import Capacity, Decoding

if TYPE_CHECKING:
    from specdec.prefixes import Prefixes

Join = Callable[[list[Decoding]], Sequence[Decoding]]
AT_ONCE = 4096  # tokens of a prompt that are read a pass a step before reading is slowed down
MEMORY_SHARE = 0.8  # of the free memory of a GPU that pages may take


class CachedModel:
    """A `PagedLM` with a `PagedKVCache` of its own.

    Args:
        lm: the model.
        prefill_chunk: prompt tokens of a sequence that go through the model at a time.
        prefill_beside: as in `CacheSettings`.
        prefixes: whose cache it uses for their capacity; None: it has its own.
    """

    def __init__(
        self,
        lm: PagedLM,
        *,
        prefill_chunk: int = 512,
        prefill_beside: int | None = None,
        prefixes: "Prefixes | None" = None,
    ) -> None:
        for name, value in {"chunk": prefill_chunk, "beside": prefill_beside}.items():
            if value is not None and value < 1:
                raise ValueError(f"cache.prefill_{name}={value}: must be at least 1")
        self.lm, self._prefixes = lm, prefixes
        self.prefill_chunk, self.prefill_beside = prefill_chunk, prefill_beside
        self.cache: PagedKVCache
        self._share = True

    def prepare(self, capacity: Capacity) -> None:
        """Start over with an empty cache; what was before can no longer be decoded.

        Raises:
            ValueError: the memory of the GPU does not hold the pages of one sequence.
        """
        if hasattr(self, "cache"):
            del self.cache  # its memory is free for the new one
        self._share = capacity.share
        if self._prefixes is not None and self._prefixes.serves(self.lm, capacity):
            self.cache = self._prefixes.cache
            return
        self.cache = self.lm.new_cache(
            rows=capacity.rows,
            pages=pages_of(capacity, self.lm.kv_shape, self.lm.dtype, self.lm.device),
            page_size=capacity.page_size,
            max_tokens=capacity.max_tokens,
            kv_dtype=capacity.kv_dtype,
        )

    def start(self, sequences: Sequence[Decoding]) -> list[Decoding]:
        """Take these in, in order, as far as there is room: those taken, all but the last token of
        each read.

        Raises:
            ValueError: a sequence that the empty pool could not hold.
        """
        reading = Reading(self, sequences)
        found: list[Decoding] = []
        while not reading.done:
            found += reading.read()
        return [sequence for sequence in sequences if sequence in found]

    def open(
        self, pending: list[Decoding]
    ) -> tuple[list[Decoding], list[list[int]], list[Decoding]]:
        """Rows for those that share nothing with one another but what is in the cache already, as
        far as there is room: these, what is to be prefilled of each, and who is next."""
        wave: list[Decoding] = []
        later: list[Decoding] = []
        rest: list[list[int]] = []
        page = self.cache.page_size
        for sequence in pending:
            prefix = sequence.tokens[:-1]
            common = max((_common(prefix, other.tokens[:-1]) for other in wave), default=0)
            if self._share and common // page * page > self.cache.shareable(prefix):
                later.append(sequence)
                continue
            tokens = min(sequence.request.max_tokens, self.cache.max_tokens)
            shared = prefix if self._share else ()
            try:
                done = self.cache.open(sequence.row, tokens=tokens, prefix=shared)
            except CacheFullError:
                return wave, rest, []
            wave.append(sequence)
            rest.append(prefix[done:])
        return wave, rest, later

    def finish(self, sequence: Decoding) -> None:
        self.cache.close(sequence.row)


class Reading:
    """Sequences on their way into a model's cache, an `Intake`: rows are opened, then all but the
    last token of each is read, pass by pass.

    A prompt that begins like another of the same call waits until the other's pages can be shared.
    Beside rows that decode, passes are no wider than one of a single sequence, and what a prompt
    has beyond `AT_ONCE` tokens is read at the rate of `prefill_beside`.

    Args:
        model: whose cache it is.
        sequences: in order; those that find no room are never returned.
        join: as in `Verifier.start`.
        see, logits, taps: as in `PagedLM.prefill`.
    """

    def __init__(
        self,
        model: CachedModel,
        sequences: Sequence[Decoding],
        join: Join | None = None,
        see: See | None = None,
        *,
        logits: bool = True,
        taps: Collection[Tap] = (),
    ) -> None:
        self._model, self._join = model, join
        self._how: dict[str, Any] = {"see": see, "logits": logits, "taps": taps}
        self._pending = list(sequences)
        self._wave: dict[Decoding, list[int]] = {}  # what is still to be read of each
        self._read, self._paid = 0, 0  # tokens
        self._at_once = AT_ONCE * len(self._pending)
        self._begin()

    @property
    def done(self) -> bool:
        return not self._wave and not self._pending

    def read(self, *, beside: bool = False) -> list[Decoding]:
        model, found = self._model, list[Decoding]()
        chunk, rate = model.prefill_chunk, model.prefill_beside
        if beside and rate is None:
            while not self.done:
                found += self.read()
            return found
        if beside and rate is not None:
            self._paid += rate if self._read >= self._at_once else 0
            if self._read >= self._at_once + self._paid:
                return []
            chunk = max(1, chunk // len(self._wave))
        parts = {sequence: rest[:chunk] for sequence, rest in self._wave.items() if rest}
        rows = [sequence.row for sequence in parts]
        model.lm.prefill(model.cache, rows, list(parts.values()), chunk=chunk, **self._how)
        self._read += sum(map(len, parts.values()))
        left = {sequence: rest[chunk:] for sequence, rest in self._wave.items()}
        self._wave = {sequence: rest for sequence, rest in left.items() if rest}
        if not self._wave:
            self._begin()
        return [sequence for sequence, rest in left.items() if not rest]

    def _begin(self) -> None:
        """Open rows for those that need not wait for the pages of another."""
        wave, rest, self._pending = self._model.open(self._pending)
        taken = self._join(wave) if self._join is not None and wave else wave
        if len(taken) < len(wave):
            self._pending = []
        for sequence, part in zip(wave, rest, strict=True):
            if sequence in taken:
                self._wave[sequence] = part
            else:
                self._model.finish(sequence)


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
