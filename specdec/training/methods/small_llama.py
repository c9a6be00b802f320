"""method=small_llama: a small language model that learns the target's distribution (distillation,
as DistillSpec, Zhou et al. 2024)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.lab.settings import word_of
from specdec.models.load import Models, find_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.observation import Tap
from specdec.training.batches import Seen
from specdec.training.judge import Judge
from specdec.training.losses import LOSSES
from specdec.training.methods.causal import (
    check_output,
    matrices_of,
    save_model,
    trained_copy,
)
from specdec.training.trainee import Drafts, Lesson, Rates, Surroundings, beside, rooted


class SmallLlama:
    """A draft model with the target's vocabulary.

    Args:
        path: where it begins, as drafter.path of drafter=small_llama.
        from_scratch: whether with random weights, of that shape.
        loss: kl, reverse_kl, tv, lk or ce.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        *,
        path: str = "zoo:draft",
        from_scratch: bool = False,
        loss: str = "kl",
        rate: float = 1e-3,
        matrix_rate: float = 3e-3,
        weight_decay: float = 0.05,
        warm_up: int = 100,
        steady: float = 0.6,
        clip: float = 1.0,
    ) -> None:
        self.rates = Rates(
            rate=rate,
            matrix_rate=matrix_rate,
            weight_decay=weight_decay,
            warm_up=warm_up,
            steady=steady,
            clip=clip,
        )
        if loss not in LOSSES:
            raise ValueError(f"method.loss={loss}: must be one of {', '.join(LOSSES)}")
        find_model(path, setting="method.path")
        self.path, self.from_scratch, self.loss = path, from_scratch, loss

    def check(self, config: Any) -> None:
        """Nothing is known before it is loaded."""

    def using(self, head: str, target: str) -> list[str]:
        return [*beside(target), "drafter=small_llama", word_of("drafter.path", head)]

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


class SmallTrainee(Drafts):
    """A small model on its way."""

    taps: tuple[Tap, ...] = ()

    def __init__(
        self, model: Any, draft: PagedLM, surroundings: Surroundings, *, loss: str
    ) -> None:
        self.module, self.tokenizer = model, draft.tokenizer
        self.judge = Judge(
            loss=loss, names=None, chunk=surroundings.chunk, compiled=surroundings.compiled
        )
        self._base: Any = model.base_model
        if surroundings.compiled:
            self._base = torch.compile(model.base_model, dynamic=False)

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.module.get_output_embeddings()
        return head

    def matrices(self) -> list[nn.Parameter]:
        return matrices_of(self.module)

    def _output(self, base: Any, seen: Seen) -> Tensor:
        """[B, T, D], what the output head reads after tokens 1 .. T."""
        out = base(input_ids=seen.tokens[:, :-1], use_cache=False)
        hidden: Tensor = out.last_hidden_state[:, 1:]
        return hidden

    def lesson(self, seen: Seen) -> Lesson:
        judged = self.judge.judged(
            [self._head],
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
        agrees, overlap = self.judge.chances(self._head, output, seen.logits, seen.labels)
        return rooted([agrees] * depth), rooted([overlap] * depth)

    def save(self, folder: Path, target_name: str) -> None:
        save_model(self.module, self.tokenizer, folder)
