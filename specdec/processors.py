"""What `generate` does to a model's logits before it chooses tokens by them: repetition penalty,
biases, forbidden tokens, least lengths. `specdec.models.generation` reads which of them a model
asks for.

Applied to every node of a tree by its own path, before a rule sees the logits; so it is the
processed distribution that speculation, plain decoding and the check of a run are about.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from specdec.batch import send
from specdec.kernels.layout import words
from specdec.request import Decoding
from specdec.tree import Acceptance, TokenTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """What is done to logits, in this order; none of it by default.

    Args:
        vocab: tokens that logits are of.
        bias: what is added to the logits of tokens; minus infinity forbids one.
        repetition_penalty: what the logits of tokens are divided by, multiplied if they are
            negative, that prompt or output have (CTRL, Keskar et al. 2019).
        begin_suppress: tokens that an output does not begin with.
        ends: tokens that an output does not end with before it has
        min_new_tokens: so many tokens, and
        min_length: with the prompt so many.
    """

    vocab: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    begin_suppress: Collection[int] = ()
    ends: Collection[int] = ()
    min_new_tokens: int = 0
    min_length: int = 0

    def __bool__(self) -> bool:
        return bool(self.bias) or self.repetition_penalty != 1.0 or bool(self._earliest)

    @property
    def _earliest(self) -> dict[int, tuple[int, int]]:
        """New tokens, and tokens in all, that there must be before each of these may come."""
        ends = self.ends if max(self.min_new_tokens, self.min_length) > 0 else ()
        both = dict.fromkeys(ends, (self.min_new_tokens, self.min_length))
        for token in self.begin_suppress:
            new, total = both.get(token, (0, 0))
            both[token] = max(new, 1), total
        return both

    def tables(self, device: torch.device) -> dict[str, Tensor | None]:
        """The last arguments of `kernels.process_logits`."""
        bias = not_before = None
        if self.bias:
            bias = torch.zeros(self.vocab)
            bias[list(self.bias)] = torch.tensor(list(self.bias.values()))
        if self._earliest:
            not_before = torch.zeros(2, self.vocab, dtype=torch.int32)
            counts = torch.tensor(list(self._earliest.values()), dtype=torch.int32)
            not_before[:, list(self._earliest)] = counts.T
        return {
            name: None if table is None else table.to(device)
            for name, table in (("bias", bias), ("not_before", not_before))
        }

    def of_text(
        self, logits: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], start: int
    ) -> Tensor:
        """Processed logits that the tokens of an output are chosen by, one prefix at a time: the
        definition, for checks.

        Args:
            logits: [n, V], of the tokens from `start` on.

        Returns:
            [n, V] float32 (float64 for float64 logits).
        """
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        scores = logits.to(wide, copy=True)
        if not self:
            return scores
        for token, amount in self.bias.items():
            scores[:, token] += amount
        earliest, known = self._earliest, torch.zeros_like(scores[0], dtype=torch.bool)
        known[[*prompt_ids, *output_ids[:start]]] = True
        for new, row in enumerate(scores, start):
            if new > start:
                known[output_ids[new - 1]] = True
            penalised = torch.where(
                row < 0, row * self.repetition_penalty, row / self.repetition_penalty
            )
            row.copy_(penalised.where(known, row))
            for token, (least_new, least) in earliest.items():
                if new < least_new or len(prompt_ids) + new < least:
                    row[token] = -torch.inf
        return scores


NO_PROCESSORS = Processors()


class Processing:
    """Processors at work: for every cache row what its sequence has, on the device, where it
    stays, so that a step may be captured in a CUDA graph.

    Args:
        processors: some.
        rows: sequences at most; the row after them is the idle one.
        kernels: the module that computes.
    """

    def __init__(
        self, processors: Processors, *, rows: int, device: torch.device, kernels: ModuleType
    ) -> None:
        self.kernels = kernels
        self._settings = {
            "penalty": processors.repetition_penalty,
            **processors.tables(device),
        }
        self._seen = torch.zeros(
            rows + 1, words(processors.vocab), dtype=torch.int32, device=device
        )
        self._counts = torch.zeros(rows + 1, 2, dtype=torch.int32, device=device)

    def join(self, sequences: Sequence[Decoding]) -> None:
        """These sequences are decoded from now on; nothing waits for the copy."""
        for sequence in sequences:
            bits = np.zeros(32 * self._seen.shape[1], dtype=bool)
            bits[sequence.tokens] = True
            packed = torch.from_numpy(np.packbits(bits, bitorder="little").view("<i4"))
            send(packed, self._seen[sequence.row])
            new, total = len(sequence.output_ids), len(sequence.tokens)
            send(torch.tensor([new, total], dtype=torch.int32), self._counts[sequence.row])

    def process(self, rows: Tensor, tree: TokenTree, logits: Tensor) -> Tensor:
        """[B, N, V], the processed logits of trees whose cache rows are [B]."""
        processed: Tensor = self.kernels.process_logits(
            logits, tree.tokens, tree.parents, rows, self._seen, self._counts, **self._settings
        )
        return processed

    def advance(self, rows: Tensor, tree: TokenTree, acceptance: Acceptance) -> None:
        """So much of the trees is kept."""
        self.kernels.note_tokens(
            self._seen, self._counts, rows, acceptance.new_tokens(tree), acceptance.length
        )
