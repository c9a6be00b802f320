"""What training of all recurrent heads has in common: the training-time test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.export import save_head
from specdec.heads.layered import LayeredHead
from specdec.training.batches import Seen
from specdec.training.judge import Judge
from specdec.training.test_time import unroll
from specdec.training.trainee import (
    Drafts,
    Lesson,
    Surroundings,
    check_decay,
    check_least,
    rooted,
)


class RecurrentTrainee(Drafts):
    """A recurrent head on its way.

    Args:
        head: filled, with its names.
        steps: of the training-time test.
        decay: weight of a step beside that of the one before.
        tied: whether the output head stays the target's.
    """

    def __init__(
        self,
        head: LayeredHead,
        surroundings: Surroundings,
        *,
        loss: str,
        steps: int,
        decay: float,
        tied: bool = True,
    ) -> None:
        target = surroundings.target
        embedding: Any = target.model.get_input_embeddings()
        head.embed_tokens.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
        self.module: nn.Module = head.to(target.device)
        head.lm_head.weight.requires_grad_(not tied)
        self.head, self.taps, self.steps = head, head.config.taps, steps
        self.architecture, self.tied = type(target.model).__name__, tied
        self.weights = decay ** torch.arange(steps, device=target.device)
        self.judge = Judge.of(surroundings, loss, head.names)
        self._unroll: Callable[..., list[Tensor]] = unroll
        if surroundings.compiled:
            self._unroll = torch.compile(unroll, dynamic=False)

    def matrices(self) -> list[nn.Parameter]:
        inside = (self.head.layers, getattr(self.head, "fc", None))
        return [
            parameter
            for part in inside
            if part is not None
            for parameter in part.parameters()
            if parameter.ndim == 2 and parameter.requires_grad
        ]

    def lesson(self, seen: Seen) -> Lesson:
        outputs = self._unroll(self.head, seen.states, seen.next_tokens, self.steps)
        slots = torch.arange(seen.mask.shape[1], device=seen.mask.device)
        masks = [seen.mask & (slots >= step) for step in range(self.steps)]
        wanted, labels = [seen.logits] * self.steps, [seen.labels] * self.steps
        heads = [self.head.lm_head] * self.steps
        judged = self.judge.judged(heads, outputs, wanted, labels, masks)
        return self.also(judged.lesson(self.weights), outputs, masks, seen)

    def also(
        self, lesson: Lesson, outputs: list[Tensor], masks: list[Tensor], seen: Seen
    ) -> Lesson:
        """More that a kind of head learns by.

        Args:
            outputs: [B, T, D] of each step.
            masks: [B, T], the slots that count in each.
        """
        return lesson

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        outputs = unroll(self.head, seen.states, seen.next_tokens, depth)
        found = [
            self.judge.chances(self.head.lm_head, one, seen.logits, seen.labels) for one in outputs
        ]
        agrees, overlap = zip(*found, strict=True)
        return rooted(agrees), rooted(overlap)

    def save(self, folder: Path, target_name: str) -> None:
        save_head(
            self.head,
            folder,
            target_name=target_name,
            architecture=self.architecture,
            tied=self.tied and self.head.names is None,
        )


def check_recurrent(
    *, steps: int, decay: float, rope_theta: float, window: int | None = None
) -> None:
    """Raise ValueError for a setting of recurrent heads that is out of range."""
    check_least(steps=steps)
    check_decay(decay)
    if window is not None and window < steps:
        raise ValueError(f"method.window={window}: must hold method.steps={steps}, or be null")
    if not rope_theta > 0:
        raise ValueError(f"method.rope_theta={rope_theta}: must be above 0")
