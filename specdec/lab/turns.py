"""Methods in turns: jobs of a sweep in one process, prompt by prompt, so that whatever the machine
does meanwhile it does to all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.lab.attempt import attempt
from specdec.lab.baselines import SharedBaseline
from specdec.lab.course import Course
from specdec.lab.fingerprints import digest
from specdec.lab.identity import METHOD, NO_PART
from specdec.lab.jobs import Job, Ledger
from specdec.lab.lane import Lane
from specdec.lab.prompts import Prompt
from specdec.lab.running import opened
from specdec.lab.settings import Settings
from specdec.lab.terminal import Live


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A job that takes turns with others.

    Args:
        number: its place in the sweep.
        words: as they were typed.
        settings: makes them settings.
    """

    number: int
    words: list[str]
    settings: Callable[[], Settings]


def take_turns(jobs: Sequence[Turn], ledger: Ledger, console: Console) -> None:
    """Do all jobs; those with the same plain decoding take turns, and share it. What becomes of
    each is in the ledger.

    Raises:
        KeyboardInterrupt: they were interrupted; what is finished has its summaries.
    """
    rounds: dict[str, Round] = {}
    for job in jobs:
        try:
            settings = job.settings()
            without = (*NO_PART, *METHOD)
            key = digest({name: v for name, v in settings.items() if name not in without})
        except ValueError:  # the round says so
            key = ""
        rounds.setdefault(key, Round(ledger, console)).jobs.append(job)
    for one in rounds.values():
        one.begin(0)


class Round:
    """Jobs that take turns.

    All of them are open while they decode: each is opened within the one before, so that whatever
    ends the decoding ends each of them as it would on its own.
    """

    def __init__(self, ledger: Ledger, console: Console) -> None:
        self.jobs: list[Turn] = []
        self._ledger, self._console, self._live = ledger, console, Live(console)
        self._courses: list[Course] = []
        self._faults: dict[Course, Exception] = {}
        self._shared: SharedBaseline | None = None
        self._reached = 0

    def begin(self, place: int) -> None:
        """Open the jobs from this one on, decode, and finish them."""
        if place == len(self.jobs):
            self._decode()
            return
        self._reached, turn = place, self.jobs[place]
        job = Job(words=turn.words, number=turn.number, sweep=self._ledger.token)
        attempt(self._ledger, job, partial(self._work, place))
        if self._reached == place:  # there was nothing to do, or it was refused
            self.begin(place + 1)

    def _work(self, place: int, began: Callable[[Path], None]) -> dict[str, Any]:
        turn, folder = self.jobs[place], self._ledger.folder
        opening = partial(opened, words=turn.words, sweep=True, began=began)
        with opening(turn.settings(), folder, self._console) as job:
            if job.experiment is None:
                return {**(job.folder.summary or {}), "done_already": True}
            course = Course(job.experiment, job.folder, job.tracker, self._live, job.shared)
            course.begin()
            with course.guarded():
                self._courses.append(course)
                self._shared = job.shared
                self.begin(place + 1)
                if course in self._faults:
                    raise self._faults[course]
            return course.finish()

    def _decode(self) -> None:
        if not self._courses:
            return
        experiment = self._courses[0].experiment
        with self._plain() as plain:
            lanes: list[tuple[Lane, list[Course]]] = [(plain, self._courses)] if plain else []
            for course in self._courses:
                lanes += [(lane, [course]) for lane in course.in_turns(shared=plain is not None)]
            try:
                ready = [one for one in lanes if self._does(one[0].ready, one[1])]
                size = experiment.batch_size
                prompts = experiment.prompts
                chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
                total = sum(lane.left(prompts).turns for lane, _ in ready)
                with self._live.side("in turns", total):
                    for number, chunk in enumerate(chunks):
                        self._turn(ready, number, chunk)
            finally:
                for lane, _ in lanes:
                    lane.close()

    def _turn(
        self, lanes: Sequence[tuple[Lane, list[Course]]], number: int, chunk: Sequence[Prompt]
    ) -> None:
        """A few prompts by all methods, of which none is always the first."""
        start = number % max(1, len(lanes))
        for lane, courses in (*lanes[start:], *lanes[:start]):
            if not any(course in self._faults for course in courses):
                self._does(partial(lane.decode, chunk), courses)

    def _does(self, work: Callable[[], Any], courses: Sequence[Course]) -> bool:
        """Whether it went well; if not, it is the fault of these."""
        try:
            work()
        except Exception as error:
            self._faults |= dict.fromkeys(courses, error)
            return False
        return True

    @contextmanager
    def _plain(self) -> Iterator[Lane | None]:
        """Plain decoding that all share, if none of it is decoded yet; else each has its own, since
        times of another hour are no times in turns."""
        experiment, shared = self._courses[0].experiment, self._shared
        if shared is None or experiment.baseline is None:
            yield None
            return
        with shared.held(self._console.print) as alone:
            if not alone or shared.side.generations.records:
                yield None
                return
            shared.side.begin()
            yield Lane(experiment, experiment.baseline, shared.side, self._live)
