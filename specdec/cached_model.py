"""CachedModel: a model and its own paged cache, in step with the sequences of the running batch.

What the verifier and every drafting model share: taking prompts in (common beginnings once), and
giving rows back.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from specdec.cache import CacheFullError, KVShape, PagedKVCache
from specdec.models.paged import PagedLM, See
from specdec.models.placement import free_memory
from specdec.observation import Tap
from specdec.request import Capacity, Decoding

Join = Callable[[list[Decoding]], Sequence[Decoding]]
MEMORY_SHARE = 0.8  # of the free memory of a GPU that pages may take


class CachedModel:
    """A `PagedLM` with a `PagedKVCache` of its own.

    Args:
        lm: the model.
        prefill_chunk: prompt tokens of a sequence that go through the model at a time.
    """

    def __init__(self, lm: PagedLM, *, prefill_chunk: int = 512) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"cache.prefill_chunk={prefill_chunk}: must be at least 1")
        self.lm = lm
        self.prefill_chunk = prefill_chunk
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
        self.cache = self.lm.new_cache(
            rows=capacity.rows,
            pages=pages_of(capacity, self.lm.kv_shape, self.lm.dtype, self.lm.device),
            page_size=capacity.page_size,
            max_tokens=capacity.max_tokens,
            kv_dtype=capacity.kv_dtype,
        )

    def start(
        self,
        sequences: Sequence[Decoding],
        join: Join | None = None,
        see: See | None = None,
        *,
        logits: bool = True,
        taps: Collection[Tap] = (),
    ) -> list[Decoding]:
        """Open rows and prefill all but the last token of each sequence, in order, until the pool
        is full.

        A prompt that begins like another of the same call waits until the other's pages can be
        shared.

        Args:
            join: as in `Verifier.start`.
            see, logits, taps: as in `PagedLM.prefill`.

        Returns:
            The sequences that found room.

        Raises:
            ValueError: a sequence that the empty pool could not hold.
        """
        started: list[Decoding] = []
        pending = list(sequences)
        while pending:
            wave, rest, pending = self._open(pending)
            taken = join(wave) if join is not None and wave else wave
            if len(taken) < len(wave):
                pending = []
            for sequence in wave:
                if sequence not in taken:
                    self.finish(sequence)
            kept = [(s.row, part) for s, part in zip(wave, rest, strict=True) if s in taken]
            rows, parts = [row for row, _ in kept], [part for _, part in kept]
            self.lm.prefill(
                self.cache,
                rows,
                parts,
                chunk=self.prefill_chunk,
                see=see,
                logits=logits,
                taps=taps,
            )
            started += taken
        return started

    def _open(
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
