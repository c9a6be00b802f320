"""Reading: what an independent pass says of the tokens of texts. One pass serves all who ask:
whether tokens are possible, bets on them, evidence of the verifying pass, and scores where outputs
part from others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.evidence import numbers_of
from specdec.lab.audit import Audit
from specdec.lab.bets import ALARM, Bets, places_of
from specdec.lab.witness import Seen, Witness
from specdec.sampling import SEEDS, SamplingParams, probabilities

Record = Mapping[str, Any]
SAMPLE = 8192  # tokens that are read, prompts included


@dataclass(slots=True)
class Reading:
    """Counts tokens as it reads texts, and bets on them.

    Args:
        witness: reads them.
        sampling: how tokens were chosen.
        audit: is told of what is read.
        noted: places in outputs, by request, and
        scores: [V] what the witness says there, of texts that were read.
    """

    witness: Witness
    sampling: SamplingParams
    audit: Audit | None = None
    noted: Mapping[int, int] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0
    impossible: int = 0
    edge: int = 0
    bets: Bets = field(default_factory=Bets)

    def read(self, texts: Sequence[Record], sample: int = SAMPLE) -> dict[str, Any]:
        """A sample of texts, of so many tokens, prompts included.

        Returns:
            texts, tokens: how many were read.
            impossible: tokens of probability 0: not the most probable one at temperature 0, cut
                by a filter above it.
            edge: tokens that were so as well, but would not be if all tokens more probable were
                less so by no more than rounding (`Witness.units`).
            p_value: how often bets would win as much by chance, and bets: what became of them
                (`Found` of `bets.py`); None at temperature 0 or without tokens.
        """
        for text in _sample(texts, sample):
            self._text(text)
        found = None
        if self.tokens and not self.sampling.greedy:
            found = self.bets.found(ALARM)._asdict()
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "impossible": self.impossible,
            "edge": self.edge,
            "p_value": None if found is None else found.pop("p_value"),
            "bets": found,
        }

    def _text(self, text: Record) -> None:
        request, start, numbers = text["request"], 0, []
        lengths = text.get("accepted_lengths") or [1] * len(text["output_ids"])
        places = np.array(places_of(lengths))
        shares = np.random.default_rng([self.sampling.seed % SEEDS, request]).random(len(places))
        for seen in self.witness.follow(text):
            end = start + len(seen.drawn)
            self._count(seen, shares[start:end], places[start:end])
            if self.audit is not None:
                numbers.append(numbers_of(seen.scores, seen.drawn))
            if start <= self.noted.get(request, -1) < end:
                self.scores[request] = seen.scores[self.noted[request] - start]
            start = end
        if self.audit is not None:
            self.audit.add(text, torch.cat(numbers))
        self.texts, self.tokens = self.texts + 1, self.tokens + start

    def _count(self, seen: Seen, shares: NDArray[np.float64], places: NDArray[np.int64]) -> None:
        law = probabilities(seen.scores, self.sampling)
        cut = law.gather(1, seen.drawn[:, None])[:, 0] == 0
        if cut.any():
            law[cut] = _within_rounding(seen, cut, self.witness, self.sampling)
        legal = law.gather(1, seen.drawn[:, None])[:, 0] > 0
        self.edge += int((cut & legal).sum())
        self.impossible += int((~legal).sum())
        if not self.sampling.greedy:
            kept, said = legal.cpu().numpy(), seen.draft
            draft = None if said is None else probabilities(said[legal], self.sampling)
            self.bets.add(law[legal], seen.drawn[legal], shares[kept], places[kept], draft)


def _sample(texts: Sequence[Record], most: int) -> list[Record]:
    """Texts with output, picked whatever is in them, until there are so many tokens."""
    found, tokens = [], 0
    for place in np.random.default_rng(0).permutation(len(texts)):
        text = texts[place]
        if text["output_ids"] and tokens < most:
            found.append(text)
            tokens += len(text["prompt_ids"]) + len(text["output_ids"])
    return found


def _within_rounding(
    seen: Seen, rows: Tensor, witness: Witness, sampling: SamplingParams
) -> Tensor:
    """Laws of some rows if what stands before the drawn token there is less probable by as much as
    rounding may do."""
    scores, drawn = seen.scores[rows], seen.drawn[rows][:, None]
    before = (scores >= scores.gather(1, drawn)).scatter(1, drawn, False)
    return probabilities(scores - before * witness.bound(scores, drawn[:, 0])[:, None], sampling)
