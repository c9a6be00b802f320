"""What a person sees while texts are decoded: a bar that moves, or a line a minute in a log."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from specdec.flight import Step
from specdec.lab.lines import tell

EVERY = 60.0  # seconds between two lines of a log
REFRESH = 4  # of the bar, per second


@dataclass(slots=True, kw_only=True)
class Pace:
    """How far one side of a comparison is.

    Args:
        texts: to decode.
        longest: tokens of a text at most; None: nobody knows.
        begun: when, by the clock in seconds.
        done: texts decoded, with
        said: tokens together.
        tokens: of all texts, also those on their way, in
        steps: of sequences, and
        seconds: of the device.
    """

    title: str
    texts: int
    longest: int | None
    begun: float
    done: int = 0
    said: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def figures(self) -> str:
        """Tokens per second and accepted length so far."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        length = self.tokens / self.steps if self.steps else 0.0
        return f"{rate:6.1f} tok/s  accepted {length:.2f}"

    @property
    def share(self) -> float:
        """Of the work, what is done: texts are taken to be as long as those that are done, or as
        long as they may be."""
        mean = self.said / self.done if self.done else self.longest
        if self.done >= self.texts or not mean:
            return self.done / self.texts if self.texts else 1.0
        return min(self.tokens / (mean * self.texts), 1.0)

    def left(self, now: float) -> float | None:
        """Seconds it will take from now on; None while nobody knows."""
        share = self.share
        return (now - self.begun) * (1.0 - share) / share if share else None


class Live:
    """Shows how far decoding is, with tokens per second and accepted length so far: on a terminal
    as a bar, elsewhere as a line a minute and one at the end.

    A step costs it a few additions; whatever is shown is computed when it is.

    Args:
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._pace = Pace(title="", texts=0, longest=None, begun=0.0)
        self._next = float("inf")  # when a line is due

    @contextmanager
    def side(self, title: str, total: int, longest: int | None = None) -> Iterator[None]:
        """Show progress of one side of a comparison.

        Args:
            total: texts to decode.
            longest: tokens of each at most.
        """
        now = self._clock()
        self._pace = Pace(title=title, texts=total, longest=longest, begun=now)
        if self.console.is_interactive:
            with Bar(self._pace, self._clock, self.console):
                yield
            return
        self._next = now + EVERY
        try:
            yield
        finally:
            self._next = float("inf")
            self._line(f"in {_clock(self._clock() - now)}")

    def step(self, step: Step) -> None:
        pace = self._pace
        pace.tokens += sum(step.tokens)
        pace.steps += len(step.tokens)
        pace.seconds += sum(step.seconds.values())
        if self._next != float("inf") and (now := self._clock()) >= self._next:
            self._next = now + EVERY
            left = pace.left(now)
            rest = "" if left is None else f", {_clock(left)} left"
            self._line(f"{_clock(now - pace.begun)} gone{rest}")

    def finished(self, tokens: int) -> None:
        """One text more is done, of so many tokens."""
        self._pace.done += 1
        self._pace.said += tokens

    def _line(self, when: str) -> None:
        pace = self._pace
        line = f"{pace.title}: {pace.done} of {pace.texts} texts, {pace.figures.strip()}, {when}"
        tell(self.console, line)


class Bar(Progress):
    """A bar that looks where its pace is whenever it is drawn."""

    def __init__(self, pace: Pace, clock: Callable[[], float], console: Console) -> None:
        self._pace = pace
        super().__init__(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            Figures(pace, clock),
            console=console,
            refresh_per_second=REFRESH,
        )
        self.add_task(pace.title, total=1.0)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            task.completed = self._pace.share
        yield self.make_tasks_table(self.tasks)


class Figures(ProgressColumn):
    """What stands beside the bar."""

    def __init__(self, pace: Pace, clock: Callable[[], float]) -> None:
        super().__init__()
        self._pace, self._clock = pace, clock

    def render(self, task: Task) -> Text:
        pace, now = self._pace, self._clock()
        texts = f"{pace.done}/{pace.texts}  {pace.figures}  {_clock(now - pace.begun)}"
        left = pace.left(now)
        if left and pace.done < pace.texts:
            texts += f"  {_clock(left)} left"
        return Text(texts)


def _clock(seconds: float) -> str:
    """As 0:12:34."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
