"""What a person sees while something is trained: a bar that moves, or a line now and then in a
log."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.lab.lines import tell
from specdec.training.course import Budget
from specdec.training.course import Progress as Course

EVERY = 30.0  # seconds between two lines of a log


class Bar:
    """Shows how far a training is, or the writing of own text.

    Args:
        course, budget: of a training; None of own text.
        title: what stands before the bar.
    """

    def __init__(
        self,
        console: Console,
        course: Course | None,
        budget: Budget | None,
        *,
        title: str = "training",
    ) -> None:
        self.console, self.course, self.budget, self.title = console, course, budget, title
        self._next = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=1.0, said="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def share(self, share: float, tokens: int) -> None:
        """Of own text: which part is done, and how many tokens are."""
        self._tell(share, f"{tokens:,} tokens", always=False)

    def point(self, point: dict[str, Any]) -> None:
        """A new point of a training's curve."""
        assert self.course is not None
        assert self.budget is not None
        share = self.budget.share(self.course.seconds, self.course.tokens)
        rate = self.course.tokens / max(self.course.seconds, 1e-9)
        said = f"step {point['steps']:,}, {point['tokens']:,} tokens, {rate:,.0f} a second"
        if "loss" in point:
            self._tell(share, f"{said}, loss {point['loss']:.3f}", always=False)
            return
        kinds = [key.partition("/")[0] for key in point if key.endswith("/greedy")]
        lengths = "; ".join(
            f"{kind} {point[f'{kind}/greedy']:.2f} / {point[f'{kind}/sampled']:.2f}"
            for kind in kinds
        )
        self._tell(share, f"{said}, accepted greedy / sampled: {lengths}", always=True)

    def _tell(self, share: float, said: str, *, always: bool) -> None:
        self._progress.update(self._task, completed=min(share, 1.0), said=said)
        now = time.monotonic()
        if always or (not self.console.is_terminal and now >= self._next):
            tell(self.console, f"{self.title} {min(share, 1.0):4.0%}: {said}")
            self._next = now + EVERY
