"""Judging what a drafter reads at its output head: losses and acceptance, of logits that are made
for some sequences at a time. Where all of a batch would take much memory they are made again when
gradients go back, which takes a sixth more time.

Legend: B sequences, R of them at a time, T slots, J steps, D width, V tokens of the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specdec.training.losses import compare, lk, sequence_means
from specdec.training.trainee import Lesson, Surroundings

KEPT = {"cuda": 8e9, "cpu": 1e9}  # bytes of logits that are kept until gradients go back


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came of each of J steps.

    Args:
        loss: [J], mean of each sequence, then over sequences; differentiable.
        overlap, agrees: [J], means over all slots that count.
        kept: of each step the overlap at each slot [B, T], without gradient.
    """

    loss: Tensor
    overlap: Tensor
    agrees: Tensor
    kept: Sequence[Tensor]

    def lesson(self, weights: Tensor) -> Lesson:
        """What it teaches if steps weigh as much as `weights` [J] says."""
        figures = {
            f"{name}/depth_{step + 1}": value.detach()
            for name in ("loss", "overlap", "agrees")
            for step, value in enumerate(getattr(self, name))
        }
        return Lesson(loss=(self.loss * weights).sum() / weights.sum(), figures=figures)


class Judge:
    """Compares drafted logits with the target's.

    Args:
        loss: one of `losses.LOSSES`.
        names: [VD] int64, target ids of what the drafter can name; None if they are the same.
        chunk: slots whose logits are held at a time.
        compiled: whether torch compiles it.
    """

    def __init__(
        self, *, loss: str, names: Tensor | None, chunk: int, compiled: bool = False
    ) -> None:
        self.loss, self.names, self.chunk = loss, names, chunk
        self._rows: Callable[..., tuple[Tensor, ...]] = self._of_rows
        if compiled:
            self._rows = torch.compile(self._of_rows, dynamic=False)

    @classmethod
    def of(cls, surroundings: Surroundings, loss: str, names: Tensor | None = None) -> "Judge":
        """As a training has it."""
        chunk, compiled = surroundings.chunk, surroundings.compiled
        return cls(loss=loss, names=names, chunk=chunk, compiled=compiled)

    def judged(
        self,
        heads: Sequence[nn.Module],
        outputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> Judged:
        """Of what an output head reads [B, T, D] at each step; the others as `losses.compare` has
        them, with the slots [B, T] that count, one of each for every step, whose T may differ."""
        slots = sum(mask.numel() for mask in masks)
        logits = slots * (wanted[0].shape[-1] if self.names is None else len(self.names))
        size = 2 if torch.is_autocast_enabled(outputs[0].device.type) else 4
        again = torch.is_grad_enabled() and logits * size > KEPT[outputs[0].device.type]
        found = [
            self._step(*step, again=again)
            for step in zip(heads, outputs, wanted, labels, masks, strict=True)
        ]
        *means, kept = zip(*found, strict=True)
        loss, overlap, agrees = (torch.stack(one) for one in means)
        return Judged(loss=loss, overlap=overlap, agrees=agrees, kept=kept)

    def _step(
        self, head: nn.Module, *tensors: Tensor, again: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [
            checkpoint(self._rows, head, *inputs, use_reentrant=False)
            if again
            else self._rows(head, *inputs)
            for inputs in zip(*self._split(*tensors), strict=True)
        ]
        means, any_, kept, agrees, count = (torch.cat(one) for one in zip(*parts, strict=True))
        slots = count.sum().clamp(min=1)
        loss = means.sum() / any_.sum().clamp(min=1)
        return loss, kept.sum() / slots, agrees.sum() / slots, kept

    def _split(self, *tensors: Tensor) -> list[Sequence[Tensor]]:
        rows = max(1, self.chunk // tensors[0].shape[1])
        return [tensor.split(rows) for tensor in tensors]

    def _of_rows(
        self, head: nn.Module, output: Tensor, wanted: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Of each sequence [R]: its mean loss, whether any slot counts, the overlap at each slot
        that does [R, T], the sum of agreement, and slots that count."""
        logits = head(output).flatten(0, 1)
        loss = "kl" if self.loss == "lk" else self.loss
        one = compare(logits, wanted.flatten(0, 1), labels.flatten(), self.names, loss)
        value, overlap, agrees, counts = (x.view(mask.shape) for x in one)
        counted = mask & counts
        overlap = overlap * mask
        if self.loss == "lk":
            accepted, _ = sequence_means(overlap, mask)
            value = lk(value, overlap, accepted[:, None])
        means, any_ = sequence_means(value, counted)
        return means, any_, overlap.detach(), (agrees & mask).sum(1), mask.sum(1)

    @torch.no_grad()
    def chances(
        self, head: nn.Module, output: Tensor, wanted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether each slot's best token is the target's, and the overlap, [B, T] each."""
        parts = [
            self._of_slots(head, *inputs)
            for inputs in zip(*self._split(output, wanted, labels), strict=True)
        ]
        agrees, overlap = (torch.cat(one) for one in zip(*parts, strict=True))
        return agrees, overlap

    def _of_slots(
        self, head: nn.Module, output: Tensor, wanted: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        shape = labels.shape
        logits = head(output).flatten(0, 1)
        one = compare(logits, wanted.flatten(0, 1), labels.flatten(), self.names, "tv")
        return one.agrees.view(shape), one.overlap.view(shape)
