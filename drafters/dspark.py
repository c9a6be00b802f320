"""drafter=dspark: a block head whose candidates depend on the parent."""

from typing import Any

import torch
from torch import Tensor

from specdec.drafters.dflash import DFlash
from specdec.drafters.growth import Expand, Frontier
from specdec.drafters.logits import candidates_of
from specdec.heads.spark import SparkHead
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from specdec.protocols import StepContext, TreePolicy


class DSpark(DFlash):
    """Drafts with a head of DSpark, in the layouts of DeepSpec, SpecForge and speculators: one
    pass answers all levels, and the token of each node corrects what its level says of its
    children.

    Args:
        confidence: the chance of acceptance that the head states for a node's children is a factor
            of their probabilities, so that trees go where it is sure. They do not sum to 1 then,
            so that above temperature 0 it needs `tree.children=top_k`.
        path, taps, depth, candidates, rope_theta, widen: those of `HeadDrafter`.

    Raises:
        ValueError: as `DFlash`; children that are to be sampled with `confidence`, or a head that
            states none.
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
        confidence: bool = False,
    ) -> None:
        super().__init__(
            path=path,
            taps=taps,
            depth=depth,
            candidates=candidates,
            rope_theta=rope_theta,
            widen=widen,
        )
        self.confidence = confidence

    def check(self, tree: TreePolicy) -> None:
        super().check(tree)
        if self.confidence and tree.children != "top_k":
            raise ValueError(
                f"tree.children={tree.children}: with drafter.confidence=true probabilities do "
                f"not sum to 1, so no child can be drawn from them; use top_k"
            )

    def _use(self, head: Any, target: PagedLM) -> None:
        if self.confidence and head.confidence_head is None:
            raise ValueError(
                f"drafter.confidence=true: drafter.path={self.path} has no confidence head; leave "
                f"it out"
            )
        super()._use(head, target)

    def begin(self, context: StepContext) -> Expand:
        normal, every = self._block(context)  # [B, levels, D] and [B, levels, VD]
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
            ids, probs = candidates_of(
                context,
                logits.contiguous(),
                self.tree,
                frontier.level,
                candidates=self.candidates,
                vocab=self.head.drafts,
            )
            if self.confidence:
                sure = self.head.confidence(normal[:, level], frontier.tokens).sigmoid()
                probs = probs * sure[..., None]
            return self._named(ids), probs

        return expand
