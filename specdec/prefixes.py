"""Prefixes: beginnings of prompts that several decoders of one target find read already."""

from collections.abc import Sequence

import torch

from specdec.cached_model import cache_of
from specdec.models.paged import PagedLM
from specdec.request import Capacity


class Prefixes:
    """One cache of a target, for decoders that take turns over the same prompts.

    Before their turns the full pages of the prompts are filled, each once, by rows of its own;
    the decoders' rows find them as sequences find pages of equal beginnings. So no decoder pays
    for them and none gains over another: each reads what is left of a page, and its draft model
    all of it. Not for drafters that read the target's states of whole prompts.

    Args:
        lm: the target.
        capacity: of the decoders, which share pages.
        chunk: prompt tokens that go through the model at a time.

    Attributes:
        cache: theirs. The row after those of the decoders stays idle.
    """

    def __init__(self, lm: PagedLM, capacity: Capacity, *, chunk: int = 512) -> None:
        if not capacity.share:
            raise ValueError("capacity.share=False: decoders without shared pages share no prompt")
        self._lm, self.capacity, self._chunk = lm, capacity, chunk
        self._held: dict[int, int] = {}  # pages by row
        self.cache = cache_of(lm, capacity, 2 * capacity.rows + 1)

    def serves(self, lm: PagedLM, capacity: Capacity) -> bool:
        """Whether it is such a decoder's cache."""
        return lm is self._lm and capacity == self.capacity

    @torch.inference_mode()
    def hold(self, prompts: Sequence[Sequence[int]]) -> int:
        """Read the full pages of these prompts, and keep them until `release`. A prompt that would
        leave no room for another to be decoded is left to the decoders, as is what exceeds their
        rows.

        Returns:
            Tokens that were read.
        """
        self.release()
        cache, read = self.cache, 0
        rows, needed = self.capacity.rows, self.capacity.pages_of_a_row
        for number, prompt in enumerate(prompts[:rows]):
            count = (len(prompt) - 1) // cache.page_size * cache.page_size
            if not count:
                continue
            # What is held of a prompt, its sequences need not find: if there are no others left.
            every = len(self._held) == number and number + 1 == len(prompts)
            pages = cache.pages_for(count)
            found = min([pages, *self._held.values()]) if every else 0
            own = pages - cache.shareable(prompt[:count]) // cache.page_size
            if own + needed - found > cache.free_pages:
                continue
            row = rows + 1 + number
            done = cache.open(row, tokens=count, prefix=prompt[:count])
            self._held[row] = pages
            self._read(row, prompt[done:count])
            read += count - done
        return read

    def _read(self, row: int, tokens: Sequence[int]) -> None:
        """Append them to a row."""
        self._lm.prefill(self.cache, [row], [tokens], chunk=self._chunk)

    def release(self) -> None:
        """Give up what is held, and what a decoder that failed has left."""
        for row in self.cache.open_rows:
            self.cache.close(row)
        self._held.clear()

    def settle(self) -> None:
        """A decoder's turn is over: close rows that it has left open, because it failed."""
        for row in self.cache.open_rows:
            if row not in self._held:
                self.cache.close(row)
