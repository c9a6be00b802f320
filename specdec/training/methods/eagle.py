"""method=eagle: the head of EAGLE and EAGLE-2 (Li et al. 2024), which reads the target's last
state and writes through the target's output head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.heads.recurrent import EagleConfig, EagleHead
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from specdec.training.batches import Seen
from specdec.training.losses import LOSSES, sequence_means
from specdec.training.methods.head import HeadMethod, sizes_of
from specdec.training.methods.recurrent import RecurrentTrainee, check_recurrent
from specdec.training.teacher import check_taps
from specdec.training.trainee import Lesson, Surroundings, check_choice

EAGLE1 = "eagle1"
TOKEN_WEIGHT = 0.1  # of the loss of tokens beside that of states, in EAGLE's own training


@dataclass(frozen=True, kw_only=True)
class Eagle(HeadMethod):
    """A head of EAGLE-1 with the sizes of a layer of its target.

    Args:
        loss: kl, reverse_kl, tv, lk or ce; or eagle1, which is that of its authors: the next
            state, by SmoothL1, and a tenth of KL.
        steps: of the training-time test; 1 in EAGLE-1, 3 in HASS (Zhang et al. 2025).
        decay: weight of a step beside that of the one before.
        tap: the state that it reads.
        bias: of its fc.
        rope_theta: of its rotary positions.
        window: as of `DFlash`.
        path: as of `HeadMethod`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "eagle"
    kind = EagleHead
    loss: str = "kl"
    steps: int = 5
    decay: float = 0.8
    tap: Tap = "normal"
    bias: bool = True
    rope_theta: float = 10_000.0
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, (*LOSSES, EAGLE1))
        check_recurrent(
            steps=self.steps, decay=self.decay, rope_theta=self.rope_theta, window=self.window
        )

    def check(self, target: PagedLM) -> None:
        check_taps([self.tap], target.layers, "method.tap")
        super().check(target)

    def config(self, target: PagedLM) -> EagleConfig:
        rope, taps = self.rope_theta, [self.tap]
        sizes = sizes_of(target, taps, layers=1, rope_theta=rope, window=self.window)
        return EagleConfig(bias=self.bias, **sizes)

    def make(self, surroundings: Surroundings) -> RecurrentTrainee:
        head, how = self.head(surroundings), self._how()
        if self.loss == EAGLE1:
            return Regression(head, surroundings, **{**how, "loss": "kl"})
        return RecurrentTrainee(head, surroundings, **how)


class Regression(RecurrentTrainee):
    """A head that learns the target's next state beside the next token."""

    def also(
        self, lesson: Lesson, outputs: Sequence[Tensor], masks: Sequence[Tensor], seen: Seen
    ) -> Lesson:
        wanted = seen.all_states[:, 1:]
        found = torch.stack([_of_states(*one, wanted) for one in zip(outputs, masks, strict=True)])
        weights = self.weights / self.weights.sum()
        figures = {f"states/depth_{i + 1}": one.detach() for i, one in enumerate(found)}
        return replace(
            lesson,
            loss=TOKEN_WEIGHT * lesson.loss + (weights * found).sum(),
            figures={**lesson.figures, **figures},
        )


def _of_states(output: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """SmoothL1, mean over numbers and slots of a sequence, then over sequences."""
    slots = F.smooth_l1_loss(output.float(), wanted.float(), reduction="none").mean(-1)
    means, any_ = sequence_means(slots, mask)
    return means.sum() / any_.sum().clamp(min=1)
