"""Trackers: where the figures of a run go besides its folder. A tracker may be slow, fail or hang;
the run is not to notice."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, Protocol, runtime_checkable

from specdec.flight import Step
from specdec.lab.curves import Table
from specdec.lab.records import STEPS

Record = Mapping[str, Any]
BEGIN, STEP, END = 5.0, 0.05, 60.0  # seconds that a run waits for its tracker at most
WAITING = 20_000  # steps that a tracker may be behind


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run, or of the comparison of several, when it begins.

    Args:
        folder: of the run; of the sweep if it is a comparison.
        id: of the run, the same whenever it continues.
        job_type: run, comparison or training.
        group: what the runs of a sweep share; None of a run by itself.
        config: by flat name, as `drafter/max_match`; `drafter` itself is the option.
    """

    folder: Path
    id: str
    name: str
    job_type: str = "run"
    group: str | None = None
    tags: Sequence[str] = ()
    config: Record = field(default_factory=dict)


@runtime_checkable
class Tracker(Protocol):
    """Follows one run from `start` to `finish`, or shows a comparison.

    `finish` and `compare` return where it can be seen, or how, in one line. `abandon` ends what
    would keep the process from ending, after anything has failed or taken too long. A training is
    followed from `start` through every `point` of its curve, by `steps`, to `close`, which is told
    what it came to and returns as `finish` does.
    """

    def start(self, run: TrackedRun) -> None: ...
    def step(self, step: Step) -> None: ...
    def finish(self, summary: Record, generations: Sequence[Record]) -> str | None: ...
    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None: ...
    def point(self, point: Mapping[str, float]) -> None: ...
    def close(self, figures: Record) -> str | None: ...
    def abandon(self) -> None: ...


class NoTracker:
    """tracker=none: the run folder is all there is."""

    def start(self, run: TrackedRun) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def finish(self, summary: Record, generations: Sequence[Record]) -> str | None:
        return None

    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None:
        return None

    def point(self, point: Mapping[str, float]) -> None:
        pass

    def close(self, figures: Record) -> str | None:
        return None

    def abandon(self) -> None:
        pass


def replay(steps: Iterable[Record], tracker: Tracker) -> None:
    """Tell a tracker of the steps of an earlier process, so that it shows the run as one."""
    for record in steps:
        tracker.step(STEPS.validate_python(record))


@dataclass
class _Job:
    work: Callable[[], str | None]
    said: str | None = None
    done: Event = field(default_factory=Event)


class Careful:
    """A tracker whose faults cost no run anything: the first is told in one line, and then it is
    left alone.

    It works on a thread of its own. The run waits for it between steps, so that it takes no time
    of what is measured, but only until it has been late once: for 5 s when it begins, 0.05 s at a
    step, and in any case up to 60 s at the end.

    Args:
        tell: what to do with lines for the user.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        self._tracker, self._tell = tracker, tell
        self._jobs: Queue[_Job | None] = Queue(WAITING)  # None: there will be no more
        self._folder: Path | None = None
        self._late = False
        self._lost = 0  # steps that found no room
        self._over = False
        self._idle = type(tracker) is NoTracker
        self._thread = Thread(target=self._work, daemon=True, name="tracker")

    def start(self, run: TrackedRun) -> None:
        self._folder = run.folder
        self._do(lambda: self._tracker.start(run), BEGIN)

    def step(self, step: Step) -> None:
        self._do(lambda: self._tracker.step(step), STEP)

    def finish(self, summary: Record, generations: Sequence[Record]) -> str | None:
        return self._end(lambda: self._tracker.finish(summary, generations))

    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None:
        return self._end(lambda: self._tracker.compare(run, tables, files))

    def point(self, point: Mapping[str, float]) -> None:
        self._do(lambda: self._tracker.point(point), STEP)

    def close(self, figures: Record) -> str | None:
        return self._end(lambda: self._tracker.close(figures))

    def abandon(self) -> None:
        self._over = True
        with suppress(Exception, SystemExit):
            self._tracker.abandon()

    def _do(self, work: Callable[[], None], patience: float) -> None:
        if self._idle:
            work()
        if self._idle or self._over:
            return
        job = _Job(work)
        self._begin()
        try:
            self._jobs.put_nowait(job)
        except Full:
            self._lost += 1
        else:
            self._late = self._late or not job.done.wait(patience)

    def _end(self, work: Callable[[], str | None]) -> str | None:
        """The last job; what it says is told."""
        job = _Job(work)
        if not self._idle and not self._over:
            self._begin()
            with suppress(Full):
                self._jobs.put(job, timeout=END)
            if not job.done.wait(END):
                self.abandon()
                self._tell(f"{self._name} did not end within {END:.0f} s{self._mend}")
            elif self._lost and not self._over:
                self._tell(f"{self._name} was too slow for {self._lost} steps{self._mend}")
        self._over = True
        with suppress(Full):
            self._jobs.put_nowait(None)
        if job.said:
            self._tell(job.said)
        return job.said

    def _begin(self) -> None:
        if self._thread.ident is None:  # runs that have nothing to do need none
            self._thread.start()

    @property
    def _name(self) -> str:
        return type(self._tracker).__name__

    @property
    def _mend(self) -> str:
        if self._folder is None:
            return ""
        return f"; {shlex.join(['specdec', 'sync', str(self._folder)])} makes up for it"

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.said = None if self._over else job.work()
            except BaseException as error:
                if not self._over:
                    self.abandon()
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    without = "the run goes on without it"
                    self._tell(f"{self._name} failed, {reason}; {without}{self._mend}")
            finally:
                job.done.set()
