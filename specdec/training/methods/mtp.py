"""method=mtp: a layer for multi-token prediction, used again at every depth (FastMTP, Cai et al.
2025), which writes through the target's output head."""

from dataclasses import dataclass

from transformers import Qwen3Config

from specdec.heads.recurrent import MTPConfig, MTPHead
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from specdec.training.losses import LOSSES
from specdec.training.methods.head import HeadMethod, sizes_of
from specdec.training.methods.recurrent import RecurrentTrainee, check_recurrent
from specdec.training.teacher import check_taps
from specdec.training.trainee import Surroundings, check_choice


@dataclass(frozen=True, kw_only=True)
class MTP(HeadMethod):
    """An MTP layer of Qwen3's kind with the sizes of a layer of its target, which hands on its
    normed states.

    Args:
        loss: kl, reverse_kl, tv, lk or ce, that of FastMTP.
        steps: of the training-time test.
        decay: weight of a step beside that of the one before; three steps of FastMTP weigh 0.51,
            0.31 and 0.18.
        tap: the state that it reads.
        rope_theta: of its rotary positions.
        path: as of `HeadMethod`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "mtp"
    kind = MTPHead
    loss: str = "lk"
    steps: int = 3
    decay: float = 0.6
    tap: Tap = "normal"
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_recurrent(steps=self.steps, decay=self.decay, rope_theta=self.rope_theta)

    def check(self, target: PagedLM) -> None:
        check_taps([self.tap], target.layers, "method.tap")
        super().check(target)

    def config(self, target: PagedLM) -> MTPConfig:
        rope, taps = self.rope_theta, [self.tap]
        return MTPConfig(**sizes_of(target, taps, layers=1, rope_theta=rope, make=Qwen3Config))

    def make(self, surroundings: Surroundings) -> RecurrentTrainee:
        return RecurrentTrainee(self.head(surroundings), surroundings, **self._how())
