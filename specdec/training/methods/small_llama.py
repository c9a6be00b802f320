"""method=small_llama: a small language model that learns the target's distribution (distillation,
as DistillSpec, Zhou et al. 2024)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.heads.formats import check_whole
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.training.batches import Seen
from specdec.training.judge import Judge
from specdec.training.losses import LOSSES
from specdec.training.methods.causal import CausalTrainee, check_output, trained_copy
from specdec.training.trainee import (
    Drafts,
    Lesson,
    Surroundings,
    TrainingMethod,
    check_choice,
    rooted,
)


@dataclass(frozen=True, kw_only=True)
class SmallLlama(TrainingMethod):
    """A draft model with the target's vocabulary.

    Args:
        path: where it begins, as drafter.path of drafter=small_llama.
        from_scratch: whether with random weights, of that shape.
        loss: kl, reverse_kl, tv, lk or ce.

    Raises:
        ValueError: a setting out of range, or a head.
    """

    drafter = "small_llama"
    path: str = "zoo:draft"
    from_scratch: bool = False
    loss: str = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_whole(self.path, "method.path")

    def make(self, surroundings: Surroundings) -> "SmallTrainee":
        target = surroundings.target
        placement = Placement(device=target.device, dtype=torch.float32)
        draft = Models(placement).load(self.path, setting="method.path")
        check_output(draft.model.config, f"method.path={self.path}")
        if draft.vocab_size != target.vocab_size:
            raise ValueError(
                f"method.path={self.path}: has {draft.vocab_size} tokens, and the target has "
                f"{target.vocab_size}; take a draft with its vocabulary"
            )
        seed = surroundings.seed if self.from_scratch else None
        model = trained_copy(draft, fresh=seed)
        return SmallTrainee(model, draft, surroundings, loss=self.loss)


class SmallTrainee(CausalTrainee, Drafts):
    """A small model on its way."""

    def __init__(
        self, model: Any, draft: PagedLM, surroundings: Surroundings, *, loss: str
    ) -> None:
        super().__init__(model, draft.tokenizer)
        self.judge = Judge.of(surroundings, loss)
        self._base: Any = model.base_model
        if surroundings.compiled:
            self._base = torch.compile(model.base_model, dynamic=False)

    def _output(self, base: Any, seen: Seen) -> Tensor:
        """[B, T, D], what the output head reads after tokens 1 .. T."""
        out = base(input_ids=seen.tokens[:, :-1], use_cache=False)
        hidden: Tensor = out.last_hidden_state[:, 1:]
        return hidden

    def lesson(self, seen: Seen) -> Lesson:
        judged = self.judge.judged(
            [self.head],
            [self._output(self._base, seen)],
            [seen.logits],
            [seen.labels],
            [seen.mask],
        )
        figures = {"overlap": judged.overlap[0], "agrees": judged.agrees[0]}
        return Lesson(loss=judged.loss[0], figures=figures)

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        output = self._output(self.module.base_model, seen)
        agrees, overlap = self.judge.chances(self.head, output, seen.logits, seen.labels)
        return rooted([agrees] * depth), rooted([overlap] * depth)
