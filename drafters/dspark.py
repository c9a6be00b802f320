"""drafter=dspark: a block head whose candidates depend on the parent."""

from typing import Any

import torch
from torch import Tensor

from specdec.drafters.dflash import DFlash
from specdec.drafters.growth import Expand, Frontier
from specdec.heads.spark import SparkHead
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Tap
from specdec.protocols import StepContext


class DSpark(DFlash):
    """Drafts with a head of DSpark, in the layouts of DeepSpec, SpecForge and speculators: one
    pass answers all levels, and the token of each node corrects what its level says of its
    children.

    Args:
        confidence: the chance of acceptance that the head states for a node's children is a factor
            of their probabilities where the tree policy decides, so that trees go where it is
            sure. What is drawn, and what rules are told, are the probabilities themselves.
        path, taps, depth, candidates, rope_theta, widen, vocabulary, quantize: those of
            `HeadDrafter`.

    Raises:
        ValueError: as `DFlash`; with `confidence` a head that states none.
    """

    kind = "dspark"
    head: SparkHead

    def __init__(
        self,
        *,
        path: str,
        taps: list[Tap] | None = None,
        depth: int | None = None,
        candidates: int = 64,
        rope_theta: float | None = None,
        widen: bool = True,
        vocabulary: int | str | None = None,
        quantize: Quantize = "none",
        confidence: bool = False,
    ) -> None:
        super().__init__(
            path=path,
            taps=taps,
            depth=depth,
            candidates=candidates,
            rope_theta=rope_theta,
            widen=widen,
            vocabulary=vocabulary,
            quantize=quantize,
        )
        self.confidence = confidence
        if confidence:  # compositions do not ask for it
            self.composable, self.mend = False, "leave out its confidence=true"
        self._normal: Tensor  # [B, levels, D] of the last block

    def _use(self, head: Any, target: PagedLM) -> None:
        if self.confidence and head.confidence_head is None:
            raise ValueError(
                f"drafter.confidence=true: drafter.path={self.path} has no confidence head; leave "
                f"it out"
            )
        super()._use(head, target)

    def begin(self, context: StepContext) -> Expand:
        normal, every = self._block(context)  # [B, levels, D] and [B, levels, VD]
        self._normal = normal
        states: list[Tensor] = []  # [B, F, r] that the nodes of each level leave

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            level = slice(frontier.level, frontier.level + 1)
            state = None
            if states:
                known = torch.cat(states, dim=1)
                index = frontier.parents[..., None].expand(-1, -1, known.shape[2])
                state = known.gather(1, index)
            logits, left = self.head.corrected(
                every[:, level], normal[:, level], frontier.tokens, state
            )
            if left is not None:
                states.append(left)
            ids, probs = self.candidates_after(
                context, logits.contiguous(), frontier.level, self.head.drafts
            )
            return self._named(ids), probs

        return expand

    def sureness(self, frontier: Frontier) -> Tensor | None:
        if not self.confidence:
            return None
        level = slice(frontier.level, frontier.level + 1)
        return self.head.confidence(self._normal[:, level], frontier.tokens).sigmoid()
