"""method=dspark: a block head whose logits are corrected by the token before (DSpark, deepseek-ai/
DeepSpec `modeling/dspark`), and that learns how much of what it says is accepted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.heads.spark import Markov, SparkConfig, SparkHead
from specdec.models.paged import PagedLM
from specdec.training.blocks import corrected
from specdec.training.losses import DSPARK, LOSSES, sequence_means
from specdec.training.methods.dflash import DFlash, DFlashTrainee
from specdec.training.trainee import Lesson, Surroundings, check_choice, check_least


@dataclass(frozen=True, kw_only=True)
class DSpark(DFlash):
    """A DSpark head with the sizes of layers of its target, whose every slot names the next token.

    Args:
        loss: as of `DFlash`; or dspark, that of its authors: a tenth of CE, the rest L1.
        block: slots of a block, as many as the levels it drafts.
        rank: of the correction.
        markov: vanilla, gated or rnn, how it is made of the token before.
        confidence: whether a head learns, by cross-entropy, the chance that a draft is kept.
        anchors, decay, taps, layers, rope_theta, window, path: as of `DFlash`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "dspark"
    losses = (*LOSSES, DSPARK)
    least = 1
    kind = SparkHead
    block: int = 7
    rank: int = 64
    markov: Markov = "vanilla"
    confidence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(rank=self.rank)
        check_choice("markov", self.markov, get_args(Markov))

    def make(self, surroundings: Surroundings) -> "DSparkTrainee":
        return DSparkTrainee(self.head(surroundings), surroundings, **self._how())

    def config(self, target: PagedLM) -> SparkConfig:
        return SparkConfig(
            **self._sizes(target),
            shifted=True,
            rank=self.rank,
            markov=self.markov,
            confidence=self.confidence,
            confidence_markov=self.confidence,
        )


class Corrected(nn.Module):
    """Logits of what `blocks.corrected` returns [..., D + r]."""

    def __init__(self, head: SparkHead) -> None:
        super().__init__()
        found: Any = head.markov_head
        self.lm_head, self.correction, self.width = head.lm_head, found.markov_w2, head.width

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(x[..., : self.width])
        return logits + self.correction(x[..., self.width :])


class DSparkTrainee(DFlashTrainee):
    """A DSpark head on its way."""

    reads = staticmethod(corrected)
    head: SparkHead

    def __init__(self, head: SparkHead, surroundings: Surroundings, **how: Any) -> None:
        super().__init__(head, surroundings, **how)
        self.output = Corrected(head)

    def also(
        self,
        lesson: Lesson,
        outputs: Tensor,
        before: Tensor,
        kept: Sequence[Tensor],
        inside: Sequence[Tensor],
    ) -> Lesson:
        """The confidence head learns the overlap, which is the chance of acceptance."""
        head = self.head
        if head.confidence_head is None:
            return lesson
        said = head.confidence(outputs[..., : head.width].flatten(1, 2), before.flatten(1))
        losses = []
        for level, one in enumerate(said.view_as(before).unbind(2)):
            off = F.binary_cross_entropy_with_logits(one, kept[level], reduction="none")
            means, any_ = sequence_means(off, inside[level])
            losses.append(means.sum() / any_.sum().clamp(min=1))
        found = torch.stack(losses)
        figures = {f"confidence/depth_{i + 1}": x.detach() for i, x in enumerate(found)}
        return replace(
            lesson,
            loss=lesson.loss + (self.weights * found).sum() / self.weights.sum(),
            figures={**lesson.figures, **figures},
        )
