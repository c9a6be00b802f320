"""Measuring a trainee on text that it is never trained on: how long its chains of drafts would be
accepted, teacher-forced, with its own states fed back.

The accepted length of a chain counts the target's own token, and is expected: 1 plus the sum over
depths of the product of the chances up to there. `greedy` is at temperature 0, `sampled` at 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.training.batches import Batch, Seen
from specdec.training.teacher import Teacher
from specdec.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """When is measured, and what.

    Args:
        every: seconds between measurements; None: not by the clock.
        tokens: tokens trained on between them; None: by the clock.
        depth: of the chains.

    Raises:
        ValueError: a setting out of range.
    """

    every: float | None = 30.0
    tokens: float | None = None
    depth: int = 7

    def __post_init__(self) -> None:
        for name in ("every", "tokens", "depth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"measure.{name}={value}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Length:
    """Accepted lengths of chains.

    Args:
        greedy, sampled: at temperatures 0 and 1.
        greedy_by_depth, sampled_by_depth: the share of chains that are accepted so far.
        nats: per token of what drafts are judged by, where that is trained itself.
    """

    greedy: float
    sampled: float
    greedy_by_depth: list[float]
    sampled_by_depth: list[float]
    nats: float | None = None


def whole_chains(mask: Tensor, depth: int) -> Tensor:
    """[B, T], from which slots of a mask whole chains begin: all their slots count."""
    whole = torch.zeros_like(mask)
    roots = mask.shape[1] - depth + 1
    if roots > 0:
        whole[:, :roots] = mask.unfold(1, depth, 1).all(-1)
    return whole


@torch.no_grad()
def lengths(
    trainee: Trainee,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    depth: int,
    device: torch.device,
) -> Length:
    """Over all chains of these batches."""
    sums = torch.zeros(2, depth, dtype=torch.float64)
    count, nats, tokens = 0, 0.0, 0
    for batch in batches:
        seen = look(teacher, batch.to(device))
        roots = whole_chains(seen.mask, depth)
        for kind, chances in enumerate(trainee.chains(seen, depth)):
            kept = chances.float().cumprod(0)[:, roots].double().sum(1)
            sums[kind] += kept.cpu()
        count += int(roots.sum())
        if trainee.is_target:
            nats += float(trainee.nats(seen))
            tokens += int(seen.mask.sum())
    greedy, sampled = (sums / max(count, 1)).tolist()
    return Length(
        greedy=1 + sum(greedy),
        sampled=1 + sum(sampled),
        greedy_by_depth=greedy,
        sampled_by_depth=sampled,
        nats=nats / max(tokens, 1) if trainee.is_target else None,
    )


def look(teacher: Teacher | None, batch: Batch) -> Seen:
    """A batch, and what the target makes of it; nothing of a teacher that nobody asks."""
    if teacher is None:
        nothing = torch.empty(0)
        return Seen(tokens=batch.tokens, mask=batch.mask, all_states=nothing, logits=nothing)
    states, logits = teacher(batch.tokens[:, :-1])
    return Seen(tokens=batch.tokens, mask=batch.mask, all_states=states, logits=logits[:, 1:])


def score(found: Mapping[str, Length]) -> float:
    """By which trainees are chosen: the mean over kinds of text of greedy and sampled length."""
    every: Sequence[float] = [
        value for one in found.values() for value in (one.greedy, one.sampled)
    ]
    return sum(every) / len(every)
