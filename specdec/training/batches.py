"""Batches: sequences of the corpus and of the target's own text, in equal or other parts.

A sequence of T slots has T + 2 tokens: slot t is the pair of token t + 1 with the state at token
t, and is about token t + 2, for which the target's logits are those at token t + 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.training.corpus import Corpus, Ids

EXTRA = 2  # tokens that a sequence has more than slots


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to learn from.

    Args:
        tokens: [B, T + 2] int64.
        mask: [B, T] bool, the slots that count: all of a corpus, of own text those about tokens
            that the target has written.
    """

    tokens: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        if device.type != "cuda":
            return self
        tokens, mask = (
            x.pin_memory().to(device, non_blocking=True) for x in (self.tokens, self.mask)
        )
        return Batch(tokens=tokens, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A batch, and what the target makes of it.

    Args:
        tokens: [B, T + 2] int64.
        mask: [B, T] bool.
        all_states: [B, T + 1, taps * H], at tokens 0 .. T.
        logits: [B, T, V], after tokens 1 .. T.
    """

    tokens: Tensor
    mask: Tensor
    all_states: Tensor
    logits: Tensor

    @property
    def states(self) -> Tensor:
        """[B, T, taps * H], of the slots."""
        return self.all_states[:, :-1]

    @property
    def labels(self) -> Tensor:
        """[B, T], the tokens that slots are about."""
        return self.tokens[:, EXTRA:]

    @property
    def next_tokens(self) -> Tensor:
        """[B, T], the tokens after those whose states are seen."""
        return self.tokens[:, 1 : 1 - EXTRA]


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """Own text: one text a row, padded.

    Args:
        rows: [N, T + 2] ids.
        spans: [N, 2], where what the target wrote begins and ends in each.
    """

    rows: Ids
    spans: Ids

    def batch(self, which: Ids) -> tuple[Ids, Ids]:
        """Tokens [B, T + 2] and masks [B, T] of these rows."""
        rows, spans = self.rows[which], self.spans[which]
        about = np.arange(EXTRA, rows.shape[1])
        return rows, (about >= spans[:, :1]) & (about < spans[:, 1:])


class Batches:
    """An endless stream of batches, all of it a function of the state of its generator.

    Args:
        slots: T.
        size: sequences of a batch.
        share: of them own text.
        seed: of the generator.
    """

    def __init__(
        self,
        corpus: Corpus,
        own: OwnRows | None,
        *,
        slots: int,
        size: int,
        share: float,
        seed: int,
    ) -> None:
        self.corpus, self.own, self.width = corpus, own, slots + EXTRA
        self.own_size = round(size * share) if own is not None else 0
        self.corpus_size = size - self.own_size
        self.generator = torch.Generator().manual_seed(seed)

    def _drawn(self, below: int, count: int) -> Ids:
        found: Ids = torch.randint(below, (count,), generator=self.generator).numpy()
        return found

    def next(self) -> Batch:
        """The next batch, on the CPU."""
        begin = self._drawn(len(self.corpus.tokens) - self.width + 1, self.corpus_size)
        tokens = self.corpus.tokens[begin[:, None] + np.arange(self.width)].astype(np.int64)
        mask = np.ones((self.corpus_size, self.width - EXTRA), bool)
        if self.own is not None and self.own_size:
            rows, marks = self.own.batch(self._drawn(len(self.own.rows), self.own_size))
            tokens = np.concatenate([tokens, rows.astype(np.int64)])
            mask = np.concatenate([mask, marks])
        return Batch(tokens=torch.from_numpy(tokens), mask=torch.from_numpy(mask))
