"""method=medusa: heads that each name a token at their own distance from one state of the target
(Medusa-1, Cai et al. 2024). The target stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specdec.heads.export import save_medusa
from specdec.heads.medusa import MedusaConfig, MedusaHeads
from specdec.models.paged import PagedLM
from specdec.models.quantised import output_of
from specdec.observation import Tap
from specdec.training.batches import Seen
from specdec.training.judge import Judge
from specdec.training.losses import LOSSES
from specdec.training.methods.head import HeadMethod
from specdec.training.trainee import (
    Drafts,
    Lesson,
    Surroundings,
    check_choice,
    check_decay,
    check_least,
)


@dataclass(frozen=True, kw_only=True)
class Medusa(HeadMethod):
    """Medusa heads, which begin as the target's own output head.

    Args:
        heads: how many, hence depths.
        blocks: of each head.
        loss: kl, reverse_kl, tv, lk or ce.
        decay: weight of a head beside that of the one before.
        tied: whether all write through the target's output head; else each trains its own.
        path: as of `HeadMethod`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "medusa"
    told = ("loss", "decay")
    heads: int = 4
    blocks: int = 1
    loss: str = "kl"
    decay: float = 0.8
    tied: bool = True
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_least(heads=self.heads, blocks=self.blocks)
        check_decay(self.decay)

    def make(self, surroundings: Surroundings) -> "MedusaTrainee":
        return MedusaTrainee(self.head(surroundings), surroundings, **self._how())

    def config(self, target: PagedLM) -> MedusaConfig:
        return MedusaConfig(
            heads=self.heads,
            blocks=self.blocks,
            state_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            tied=self.tied,
        )

    @torch.no_grad()
    def fresh(self, surroundings: Surroundings) -> MedusaHeads:
        heads = MedusaHeads(self.config(surroundings.target))
        for block in heads.blocks.parameters():
            block.zero_()
        for output in heads.lm_heads:
            output.weight.copy_(output_of(surroundings.target.model).float().cpu())
        return heads


class MedusaTrainee(Drafts):
    """Medusa heads on their way."""

    taps: tuple[Tap, ...] = ("normal",)

    def __init__(
        self, heads: MedusaHeads, surroundings: Surroundings, *, loss: str, decay: float
    ) -> None:
        model = surroundings.target.model
        rows = output_of(model).detach()
        if heads.lm_head is not None:
            heads.lm_head.weight = nn.Parameter(rows, requires_grad=False)
        self.module: nn.Module = heads.to(surroundings.target.device)
        self.heads = heads
        self.weights = decay ** torch.arange(heads.config.heads, device=rows.device)
        self.judge = Judge.of(surroundings, loss)
        self._features: Callable[..., Tensor] = heads.features
        if surroundings.compiled:
            self._features = torch.compile(heads.features, dynamic=False)

    def matrices(self) -> list[nn.Parameter]:
        return [one for one in self.heads.blocks.parameters() if one.ndim == 2]

    def _outputs(self, count: int) -> list[nn.Module]:
        if self.heads.lm_head is not None:
            return [self.heads.lm_head] * count
        return list(self.heads.lm_heads[:count])

    def _parts(
        self, features: Callable[..., Tensor], seen: Seen, count: int
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each head what it makes of the states, the target's logits, the tokens and the mask
        of the slots that it is about, [B, T - count + 1] each: the last slots are about tokens
        that some heads cannot be judged by."""
        made = features(seen.states.flatten(0, 1), count)
        made = made.view(*seen.mask.shape, count, -1)
        slots = seen.mask.shape[1] - count + 1
        return [
            (
                made[:, :slots, head],
                seen.logits[:, head : head + slots],
                seen.labels[:, head : head + slots],
                seen.mask[:, head : head + slots],
            )
            for head in range(count)
        ]

    def lesson(self, seen: Seen) -> Lesson:
        count = self.heads.config.heads
        parts = zip(*self._parts(self._features, seen, count), strict=True)
        judged = self.judge.judged(self._outputs(count), *parts)
        return judged.lesson(self.weights)

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        count = min(depth, self.heads.config.heads)
        found = seen.logits.new_zeros(2, depth, *seen.mask.shape, dtype=torch.float32)
        parts = self._parts(self.heads.features, seen, count)
        for head, (output, wanted, labels, mask) in enumerate(parts):
            chances = self.judge.chances(self._outputs(count)[head], output, wanted, labels)
            for kind, one in enumerate(chances):
                found[kind, head, :, : mask.shape[1]] = one
        return found[0], found[1]

    def save(self, folder: Path, target_name: str) -> None:
        save_medusa(self.heads, folder, target_name=target_name)
