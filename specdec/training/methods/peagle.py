"""method=peagle: P-EAGLE (speculators `models/peagle`), a head of EAGLE-3 that answers all levels
in one pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.heads.parallel import ParallelConfig, ParallelHead
from specdec.models.paged import PagedLM
from specdec.training.batches import Seen
from specdec.training.blocks import anchors_of, chains_of, levels_at, rolled
from specdec.training.methods.dflash import SALT
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.methods.recurrent import RecurrentTrainee
from specdec.training.trainee import Lesson, Surroundings, check_least


@dataclass(frozen=True, kw_only=True)
class PEagle(Eagle3):
    """A P-EAGLE head with the sizes of layers of its target. The embedding of its mask token, the
    rarest, stays the target's: the state beside it is learnt.

    Args:
        steps: levels that are trained, all in one pass.
        anchors: slots of a sequence from which all levels are trained at a time; the first is at
            every slot. Published trainings drop more of the deeper ones.
        layers: decoder layers, of which the first reads pairs.
        loss, decay, taps, fc_norm, norm_before_fc, norm_before_residual, norm_output, rope_theta,
            window, draft_vocab, tied, path: as of `Eagle3`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "peagle"
    kind = ParallelHead
    told = (*Eagle3.told, "anchors")
    steps: int = 7
    layers: int = 2
    anchors: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(anchors=self.anchors)

    def config(self, target: PagedLM) -> ParallelConfig:
        return ParallelConfig(**self._sizes(target), mask=0)

    def make(self, surroundings: Surroundings) -> "PEagleTrainee":
        return PEagleTrainee(self.head(surroundings), surroundings, **self._how())


class PEagleTrainee(RecurrentTrainee):
    """A P-EAGLE head on its way.

    Args:
        anchors: as of `PEagle`.
    """

    head: ParallelHead

    def __init__(
        self, head: ParallelHead, surroundings: Surroundings, *, anchors: int, **how: Any
    ) -> None:
        super().__init__(head, surroundings, **how)
        self.anchors = anchors
        self._rolled: Callable[..., tuple[Tensor, Tensor]] = rolled
        if surroundings.compiled:
            self._rolled = torch.compile(rolled, dynamic=False)

    def lesson(self, seen: Seen) -> Lesson:
        salt = SALT * self.head.norm.weight.detach().double().sum()  # changes with each step
        anchors = anchors_of(seen.mask, seen.tokens, min(self.anchors, seen.mask.shape[1]), salt)
        first, outputs = self._rolled(
            self.head, seen.states, seen.next_tokens, anchors, self.steps
        )
        parts = [
            (first, seen.logits, seen.labels, seen.mask),
            *levels_at(seen, anchors, outputs)[1:],
        ]
        judged = self.judge.judged([self.head.lm_head] * len(parts), *zip(*parts, strict=True))
        return judged.lesson(self.weights)

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        def reads(anchors: Tensor) -> Tensor:
            return rolled(self.head, seen.states, seen.next_tokens, anchors, depth)[1]

        return chains_of(
            seen, depth, reads, partial(self.judge.chances, self.head.lm_head), self.anchors
        )
