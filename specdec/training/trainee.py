"""Trainee: what is trained, whichever method it is of. A method is a class whose settings are the
options of configs/method, and who makes one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from specdec.lab.settings import word_of
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from specdec.training.batches import Seen


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a batch has taught.

    Args:
        loss: a number, differentiable.
        figures: to be shown, by name; of tensors without gradients.
    """

    loss: Tensor
    figures: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates.

    Args:
        rate: of AdamW.
        matrix_rate: of Muon.
        weight_decay: of Muon's matrices.
        warm_up: steps.
        steady: part of the budget after which rates fall.
        clip: of the gradient's norm.

    Raises:
        ValueError: one out of range.
    """

    rate: float = 1e-3
    matrix_rate: float = 3e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    steady: float = 0.6
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "matrix_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"method.{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "warm_up"):
            if getattr(self, name) < 0:
                raise ValueError(f"method.{name}={getattr(self, name)}: must be at least 0")
        if not 0 <= self.steady < 1:
            raise ValueError(f"method.steady={self.steady}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where a trainee is made.

    Args:
        target: what it is to draft for.
        counts: [V], how often each token occurs in what is trained on.
        chunk: slots whose logits are held at a time.
        compiled: whether torch compiles it.
        seed: of its random weights.
    """

    target: PagedLM
    counts: Tensor
    chunk: int
    compiled: bool
    seed: int


class Trainee(Protocol):
    """Something that is trained.

    Attributes:
        module: whose parameters are.
        taps: the states of the target that it reads.
        is_target: whether it is a target itself, which drafts are judged by; then nobody asks the
            other one.
    """

    module: nn.Module
    taps: tuple[Tap, ...]
    is_target: bool

    def matrices(self) -> Sequence[nn.Parameter]:
        """What Muon trains; AdamW the rest."""

    def lesson(self, seen: Seen) -> Lesson:
        """What a batch teaches."""

    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        """Teacher-forced chains of drafts, from every slot: [depth, B, T], of the chain whose
        first draft is made at a slot, whether the most probable draft at each depth is the
        target's, and the chance that a drawn one is kept. What lies beyond the end is 0."""

    def nats(self, seen: Seen) -> Tensor:
        """Of a target: minus the log probability of the tokens that slots are about, summed over
        those that count."""

    def save(self, folder: Path, target_name: str) -> None:
        """Write it as drafters read it."""


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Rates):
    """Makes a trainee. Its fields are the settings of `method`.

    Attributes:
        drafter: the option that drafts with what was trained.
    """

    drafter: ClassVar[str]

    def check(self, target: PagedLM) -> None:
        """Raise ValueError for what does not go with a target; here nothing does not."""

    def make(self, surroundings: Surroundings) -> Trainee:
        """A trainee with the weights that it begins with, on the target's device."""
        raise NotImplementedError

    def using(self, head: str, target: str, config: Any) -> list[str]:
        """Words of a run that uses what was written in a folder.

        Args:
            target: path of what it was trained for, and
            config: its configuration.
        """
        words = [f"drafter={self.drafter}", word_of("drafter.path", head)]
        if target == "zoo:target":
            return words
        option = [] if target.startswith(("zoo:", "standin:")) else ["target=hf"]
        return [*option, word_of("target.path", target), *words]


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless a setting of `method` is one of those known."""
    if value not in known:
        raise ValueError(f"method.{name}={value}: must be one of {', '.join(known)}")


def check_least(**values: int | None) -> None:
    """Raise ValueError unless settings of `method` are at least 1, or open."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"method.{name}={value}: must be at least 1")


def check_decay(decay: float) -> None:
    """Raise ValueError unless depths weigh less the deeper they are."""
    if not 0 < decay <= 1:
        raise ValueError(f"method.decay={decay}: must be above 0 and at most 1")


def rooted(chances: Sequence[Tensor]) -> Tensor:
    """Of what is known of each slot at each depth, [B, T] each, that of the chains: depth d of the
    chain that begins at a slot is d slots later. [depth, B, T], beyond the end 0."""
    moved = []
    for depth, one in enumerate(chances):
        kept = one[:, depth:].float()
        moved.append(torch.nn.functional.pad(kept, (0, one.shape[1] - kept.shape[1])))
    return torch.stack(moved)


class Drafts:
    """A trainee that drafts for a target, as all do but those that are one."""

    is_target = False

    def nats(self, seen: Seen) -> Tensor:
        raise RuntimeError("is no target")
