"""Course: the loop of a training, with its measurements and checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec.training.batches import Batch, Batches
from specdec.training.checkpoint import load_state, save_state
from specdec.training.measure import Length, MeasureSettings, lengths, look, score
from specdec.training.optimise import Optimisers
from specdec.training.teacher import Teacher
from specdec.training.trainee import Lesson, Trainee

HEAD = "head"  # folder of the best
SHOWN_EVERY = 10  # steps between two looks at the loss, for which the host waits
SAVED_EVERY = 60.0  # seconds
Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long is trained: tokens if they are given, else seconds."""

    seconds: float | None
    tokens: int | None

    def share(self, seconds: float, tokens: int) -> float:
        """Part of it that is used up."""
        if self.tokens is not None:
            return tokens / self.tokens
        assert self.seconds is not None
        return seconds / self.seconds


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a training is.

    Args:
        seconds: measurements and checkpoints included.
        tokens: slots trained on.
        curve: a point for each look at the loss and each measurement.
        best: the point of the best measurement.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measured_at: float = 0.0  # tokens, or seconds
    curve: list[Point] = field(default_factory=list)
    best: Point = field(default_factory=dict)


class Course:
    """Trains one trainee.

    Args:
        held_out: batches by kind of text.
        settings: what a training that is continued must have in common with what it continues.
        target_name: path of the target, which the head's configuration names.
        told: is told every new point of the curve.
    """

    def __init__(
        self,
        trainee: Trainee,
        teacher: Teacher | None,
        batches: Batches,
        held_out: Mapping[str, Sequence[Batch]],
        optimisers: Optimisers,
        *,
        budget: Budget,
        measure: MeasureSettings,
        folder: Path,
        settings: Mapping[str, Any],
        device: torch.device,
        target_name: str,
        told: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self.trainee, self.teacher, self.batches, self.held_out = (
            trainee,
            teacher,
            batches,
            held_out,
        )
        self.optimisers, self.budget, self.measure = optimisers, budget, measure
        self.folder, self.settings, self.device = folder, dict(settings), device
        self.target_name, self.told = target_name, told
        self.progress = Progress()
        self._saved = 0.0

    # Going on

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "progress": asdict(self.progress),
            "weights": self._weights(),
            "optimisers": self.optimisers.state(),
            "generator": self.batches.generator.get_state(),
        }

    def _weights(self) -> dict[str, torch.Tensor]:
        """What is trained, and the ids of tokens that it names."""
        found = self.trainee.module.state_dict(keep_vars=True)
        return {
            name: one.detach()
            for name, one in found.items()
            if one.requires_grad or not isinstance(one, torch.nn.Parameter)
        }

    def resume(self) -> None:
        """Go on from the checkpoint of the folder.

        Raises:
            ValueError: it cannot be read, or is of other settings.
        """
        state = load_state(self.folder)
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if before != value:
                raise ValueError(
                    f"{name}={value}: the training in {self.folder} has {before}; leave it so, "
                    f"or choose another folder with out="
                )
        weights = self._weights()
        shapes, before = (
            {name: one.shape for name, one in some.items()} for some in (weights, state["weights"])
        )
        if shapes != before:
            raise ValueError(
                f"resume: the training in {self.folder} has other weights than this one begins "
                f"with; what method.path names has changed, or the software: start anew elsewhere"
            )
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
        self.optimisers.load(state["optimisers"])
        self.batches.generator.set_state(state["generator"])
        self.progress = Progress(**state["progress"])

    def _save(self) -> None:
        self._saved = time.monotonic()
        save_state(self.folder, self.state())

    # Training

    def run(self) -> Progress:
        """Train until the budget is used up; an interruption (KeyboardInterrupt) leaves a
        checkpoint and goes on its way.

        Raises:
            ValueError: the loss is not a number.
        """
        if not self.progress.steps:
            self._prepare()
            self._measure()
        begun = self._saved = time.monotonic()
        before = self.progress.seconds
        try:
            while (share := self._share()) < 1:
                self._step(share)
                self.progress.seconds = before + time.monotonic() - begun
                if self._due() and self._share() < 1:
                    self._measure()
                if time.monotonic() - self._saved > SAVED_EVERY:
                    self._save()
        except KeyboardInterrupt:
            self._save()
            raise
        if self.progress.curve[-1].get("steps") != self.progress.steps or (
            "score" not in self.progress.curve[-1]
        ):
            self._measure()
        self._save()
        return self.progress

    def _share(self) -> float:
        return self.budget.share(self.progress.seconds, self.progress.tokens)

    def _prepare(self) -> None:
        """What happens once, as compiling, before the clock runs."""
        if self.device.type != "cuda":
            return
        state = self.batches.generator.get_state()
        self._lesson(self.batches.next()).loss.backward()
        for parameter in self.optimisers.parameters:
            parameter.grad = None
        self.batches.generator.set_state(state)
        torch.cuda.synchronize()

    def _lesson(self, batch: Batch) -> Lesson:
        batch = batch.to(self.device)
        seen = look(self.teacher, batch)
        with self._precision():
            return self.trainee.lesson(seen)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _step(self, share: float) -> None:
        batch = self.batches.next()
        lesson = self._lesson(batch)
        lesson.loss.backward()
        self.optimisers.step(share, self.progress.steps)
        self.progress.steps += 1
        self.progress.tokens += batch.mask.numel()
        if self.progress.steps % SHOWN_EVERY == 0:
            self._show(lesson)

    def _show(self, lesson: Lesson) -> None:
        names = ["loss", *lesson.figures]
        values = torch.stack([lesson.loss.detach(), *lesson.figures.values()]).float().tolist()
        if not math.isfinite(values[0]):
            raise ValueError(
                f"method.rate: the loss is {values[0]} at step {self.progress.steps}; lower "
                f"method.rate and method.matrix_rate"
            )
        self._point(dict(zip(names, values, strict=True)))

    def _point(self, found: Point) -> Point:
        """Add a point to the curve."""
        at = self.progress
        point = {"steps": at.steps, "tokens": at.tokens, "seconds": round(at.seconds, 3), **found}
        at.curve.append(point)
        self.told(point)
        return point

    # Measuring

    def _due(self) -> bool:
        by_tokens, by_clock = self.measure.tokens, self.measure.every
        if by_tokens is not None:
            return self.progress.tokens - self.progress.measured_at >= by_tokens
        return (
            by_clock is not None and self.progress.seconds - self.progress.measured_at >= by_clock
        )

    def _measure(self) -> None:
        """Measure, and keep the trainee if it is the best so far."""
        at = self.progress
        at.measured_at = at.tokens if self.measure.tokens is not None else at.seconds
        found = self._lengths()
        values = {
            f"{kind}/{name}": value
            for kind, one in found.items()
            for name, value in asdict(one).items()
            if value is not None
        }
        point = self._point({"score": score(found), **values})
        if not at.best or point["score"] > at.best["score"]:
            at.best = point
            self.trainee.save(self.folder / HEAD, self.target_name)

    def _lengths(self) -> dict[str, Length]:
        with self._precision():
            return {
                kind: lengths(self.trainee, self.teacher, batches, self.measure.depth, self.device)
                for kind, batches in self.held_out.items()
            }
