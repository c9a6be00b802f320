"""method=eagle3: EAGLE-3 (Li et al. 2025) with the flags of EAGLE-3.1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from specdec.heads.recurrent import Eagle3Config, Eagle3Head
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from specdec.training.losses import LOSSES
from specdec.training.methods.head import HeadMethod, sizes_of
from specdec.training.methods.recurrent import RecurrentTrainee, check_recurrent
from specdec.training.teacher import chosen_taps
from specdec.training.trainee import Surroundings, check_choice, check_least


@dataclass(frozen=True, kw_only=True)
class Eagle3(HeadMethod):
    """An EAGLE-3 head with the sizes of a layer of its target.

    Args:
        loss: kl, reverse_kl, tv, lk or ce.
        steps: of the training-time test.
        decay: weight of a step beside that of the one before.
        taps: states that it reads; None is chosen by the number of layers.
        layers: decoder layers.
        fc_norm, norm_before_fc, norm_before_residual, norm_output: as of `Eagle3Config`.
        rope_theta: of its rotary positions.
        window: as of `DFlash`.
        draft_vocab: tokens that it can name; None is all.
        tied: whether the output head stays the target's.
        path: as of `HeadMethod`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "eagle3"
    kind: ClassVar[type[Any]] = Eagle3Head
    told: ClassVar[tuple[str, ...]] = ("loss", "steps", "decay", "tied")
    loss: str = "lk"
    steps: int = 5
    decay: float = 0.8
    taps: Sequence[Tap] | None = None
    layers: int = 1
    fc_norm: bool = True
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    rope_theta: float = 10_000.0
    window: int | None = None
    draft_vocab: int | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_recurrent(
            steps=self.steps, decay=self.decay, rope_theta=self.rope_theta, window=self.window
        )
        check_least(layers=self.layers, draft_vocab=self.draft_vocab)

    def check(self, target: PagedLM) -> None:
        chosen_taps(self.taps, target.layers)
        vocab = target.model.config.get_text_config().vocab_size
        if self.draft_vocab is not None and self.draft_vocab > vocab:
            raise ValueError(
                f"method.draft_vocab={self.draft_vocab}: the target has {vocab} tokens; null is "
                f"all of them"
            )
        super().check(target)

    def make(self, surroundings: Surroundings) -> RecurrentTrainee:
        return RecurrentTrainee(self.head(surroundings), surroundings, **self._how())

    def config(self, target: PagedLM) -> Eagle3Config:
        return Eagle3Config(**self._sizes(target))

    def _sizes(self, target: PagedLM) -> dict[str, Any]:
        """Of the head, as `Eagle3Config` has them."""
        return {
            **sizes_of(
                target,
                chosen_taps(self.taps, target.layers),
                layers=self.layers,
                rope_theta=self.rope_theta,
                window=self.window,
            ),
            "vocab_size": self.draft_vocab or target.vocab_size,
            "fc_norm": self.fc_norm,
            "norm_before_fc": self.norm_before_fc,
            "norm_before_residual": self.norm_before_residual,
            "norm_output": self.norm_output,
        }
