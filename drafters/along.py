"""What a drafter says at every depth along texts that are known already; nothing is drafted."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, GrowingDrafter
from specdec.observation import Observation
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import ROOT, Acceptance, TokenTree


class AlongText(Drafter):
    """Asks a drafter for the candidates after the next tokens of each text, one pass a level, as
    if they were the nodes of a chain. For recording: its trees are roots.

    Args:
        inner: loaded.

    Attributes:
        texts: tokens by request; without any the inner drafter is not asked.
        asked: by request, how many steps it was asked in, each a token of the text.
        ids, probs: [B, D, K] of the last step.
    """

    on_device = True

    def __init__(self, inner: GrowingDrafter) -> None:
        self.inner, self.name, self.depth = inner, inner.name, inner.depth
        self.observes, self.reads_states = inner.observes, inner.reads_states
        self.page_successors = inner.page_successors
        self.own_model, self.notes = inner.own_model, inner.notes
        self.candidates = inner.candidates
        self.texts: Mapping[int, Sequence[int]] = {}
        self.asked: dict[int, int] = {}
        self.ids: Tensor
        self.probs: Tensor

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        self.inner.prepare(capacity, tree)

    def shareable(self, prefix: Sequence[int]) -> int | None:
        return self.inner.shareable(prefix)

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding] | None:
        return self.inner.start(sequences)

    def prefill(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding] | None:
        return self.inner.prefill(sequences, tokens)

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        self.inner.read(rows, tokens, length, seen)

    def draft(self, context: StepContext) -> TokenTree:
        tree = TokenTree.roots(context.roots)
        if not self.texts:
            return tree
        expand, levels = self.inner.begin(context), self.inner.levels
        following = self._following(context, levels)
        tokens = context.roots[:, None]
        parents = torch.full_like(tokens, ROOT)
        found = []
        for level in range(levels):
            frontier = Frontier(
                level=level,
                first=level,
                tokens=tokens,
                parents=parents,
                alive=torch.ones_like(tokens, dtype=torch.bool),
            )
            found.append(expand(frontier))
            tokens, parents = following[:, level : level + 1], torch.full_like(tokens, level)
        self.ids, self.probs = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return self.inner.end(context, tree, torch.zeros_like(context.roots[:, None]))

    def _following(self, context: StepContext, levels: int) -> Tensor:
        """[B, levels], the next tokens of each text, 0 past its end."""
        parts = []
        for sequence in context.sequences:
            number = sequence.request.id
            place = self.asked[number] = self.asked.get(number, -1) + 1
            rest = list(self.texts[number][place : place + levels])
            parts.append(rest + [0] * (levels - len(rest)))
        return torch.tensor(parts, dtype=torch.int64, device=context.roots.device)

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self.texts:
            self.inner.commit(context, acceptance, seen)

    def finish(self, sequence: Decoding) -> None:
        self.inner.finish(sequence)

    def forget(self) -> None:
        self.inner.forget()
