"""method=dflash: a head that drafts a block of tokens in one pass (DFlash, Chen et al. 2026),
under the target's output head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from specdec.heads.block import BlockConfig, BlockHead
from specdec.heads.export import save_block
from specdec.models.paged import PagedLM
from specdec.models.quantised import output_of
from specdec.observation import Tap
from specdec.training.batches import Seen
from specdec.training.blocks import anchors_of, chains_of, drafted, levels_at, parents
from specdec.training.judge import Judge
from specdec.training.losses import LOSSES
from specdec.training.methods.head import HeadMethod, sizes_of
from specdec.training.teacher import chosen_taps
from specdec.training.trainee import (
    Drafts,
    Lesson,
    Surroundings,
    check_choice,
    check_decay,
    check_least,
)

SALT = 1e4  # a step moves weights by a thousandth or so


@dataclass(frozen=True, kw_only=True)
class DFlash(HeadMethod):
    """A DFlash head with the sizes of layers of its target, all of whose layers see everything.

    Args:
        loss: kl, reverse_kl, tv, lk or ce, that of its authors.
        block: slots of a block, the root's among them.
        anchors: blocks of a sequence that are trained at a time.
        decay: weight of a level beside that of the one above it.
        taps: states that it reads; None is chosen by the number of layers.
        layers: decoder layers.
        rope_theta: of its rotary positions.
        window: tokens that its attention reaches back over, here and at work; None is all, and
            drafts badly in texts longer than those it was trained on.
        path: as of `HeadMethod`.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "dflash"
    losses: ClassVar[tuple[str, ...]] = LOSSES
    least: ClassVar[int] = 2  # slots: a root and a draft
    kind: ClassVar[type[Any]] = BlockHead
    told = ("loss", "decay", "anchors")
    loss: str = "lk"
    block: int = 8
    anchors: int = 64
    decay: float = 0.8
    taps: Sequence[Tap] | None = None
    layers: int = 2
    rope_theta: float = 10_000.0
    window: int | None = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, self.losses)
        check_least(anchors=self.anchors, layers=self.layers)
        check_decay(self.decay)
        if self.block < self.least:
            raise ValueError(
                f"method.block={self.block}: must be at least {self.least}, or nothing is drafted"
            )
        if not self.rope_theta > 0:
            raise ValueError(f"method.rope_theta={self.rope_theta}: must be above 0")
        if self.window is not None and self.window < self.block:
            raise ValueError(
                f"method.window={self.window}: must hold method.block={self.block}, or be null"
            )

    def _taps(self, target: PagedLM) -> tuple[Tap, ...]:
        taps = chosen_taps(self.taps, target.layers)
        if target.layers in taps:
            raise ValueError(
                f"method.taps={list(taps)}: files of DFlash heads have no name for the last state "
                f"before its norm; use normal instead of {target.layers}"
            )
        return taps

    def check(self, target: PagedLM) -> None:
        self._taps(target)
        super().check(target)

    def make(self, surroundings: Surroundings) -> "DFlashTrainee":
        return DFlashTrainee(self.head(surroundings), surroundings, **self._how())

    def fresh(self, surroundings: Surroundings) -> BlockHead:
        head: BlockHead = super().fresh(surroundings)
        assert head.mask_embedding is not None
        with torch.no_grad():  # as long as others
            embedding: Any = surroundings.target.model.get_input_embeddings().weight
            size = embedding.detach().float().std().cpu()
            noise = torch.Generator().manual_seed(surroundings.seed)
            head.mask_embedding.copy_(size * torch.randn(head.width, generator=noise))
        return head

    def config(self, target: PagedLM) -> BlockConfig:
        return BlockConfig(**self._sizes(target))

    def _sizes(self, target: PagedLM) -> dict[str, Any]:
        """Of the head, as `BlockConfig` has them."""
        return {
            **sizes_of(
                target,
                self._taps(target),
                layers=self.layers,
                rope_theta=self.rope_theta,
                make=Qwen3Config,
            ),
            "block": self.block,
            "mask": 0,
            "own_mask": True,
            "causal": (False,) * self.layers,
            "windows": (self.window,) * self.layers,
        }


class DFlashTrainee(Drafts):
    """A DFlash head on its way.

    Args:
        anchors: blocks of a sequence at a time.

    Attributes:
        reads: as `blocks.drafted`, what the output reads of a head at blocks.
        output: makes logits of it.
    """

    reads: Callable[..., Tensor] = staticmethod(drafted)
    output: nn.Module

    def __init__(
        self,
        head: BlockHead,
        surroundings: Surroundings,
        *,
        loss: str,
        decay: float,
        anchors: int,
    ) -> None:
        target = surroundings.target
        embedding: Any = target.model.get_input_embeddings().weight
        rows = output_of(target.model)
        head.embed_tokens.weight = nn.Parameter(embedding.detach(), requires_grad=False)
        head.lm_head.weight = nn.Parameter(rows.detach(), requires_grad=False)
        self.module: nn.Module = head.to(target.device)
        self.head, self.taps, self.anchors = head, head.config.taps, anchors
        self.output = head.lm_head
        self.weights = decay ** torch.arange(head.config.levels, device=target.device)
        self.target_layers = target.layers
        self.judge = Judge.of(surroundings, loss)
        self._reads = self.reads
        if surroundings.compiled:
            self._reads = torch.compile(self.reads, dynamic=False)

    def matrices(self) -> list[nn.Parameter]:
        inside = (*self.head.layers.parameters(), *self.head.fc.parameters())
        return [one for one in inside if one.ndim == 2]

    def lesson(self, seen: Seen) -> Lesson:
        count = min(self.anchors, seen.mask.shape[1])
        salt = SALT * self.head.norm.weight.detach().double().sum()  # changes with each step
        anchors = anchors_of(seen.mask, seen.tokens, count, salt)
        outputs = self._reads(self.head, seen.states, seen.next_tokens, anchors)
        parts = list(zip(*levels_at(seen, anchors, outputs), strict=True))
        judged = self.judge.judged([self.output] * outputs.shape[2], *parts)
        lesson = judged.lesson(self.weights)
        return self.also(
            lesson,
            outputs,
            parents(seen.next_tokens, anchors, outputs.shape[2]),
            judged.kept,
            parts[-1],
        )

    def also(
        self,
        lesson: Lesson,
        outputs: Tensor,
        before: Tensor,
        kept: Sequence[Tensor],
        inside: Sequence[Tensor],
    ) -> Lesson:
        """More that a kind of head learns by.

        Args:
            outputs: [B, A, L, any], what is read.
            before: [B, A, L], the tokens of the text before each.
            kept, inside: of each level [B, A] the overlap, and the blocks that count.
        """
        return lesson

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        def reads(anchors: Tensor) -> Tensor:
            return self.reads(self.head, seen.states, seen.next_tokens, anchors)

        return chains_of(
            seen, depth, reads, partial(self.judge.chances, self.output), self.anchors
        )

    def save(self, folder: Path, target_name: str) -> None:
        save_block(self.head, folder, target_name=target_name, target_layers=self.target_layers)
