"""Methods in turns: jobs of a sweep in one process, prompt by prompt, so that whatever the machine
does meanwhile it does to all of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.lab.attempt import attempt, gpu_name
from specdec.lab.baselines import SharedBaseline
from specdec.lab.build import cache_of, shares_pages
from specdec.lab.course import Course
from specdec.lab.fingerprints import digest
from specdec.lab.identity import METHOD, NO_PART
from specdec.lab.jobs import Job, Ledger, objective, summary_of
from specdec.lab.lane import Lane
from specdec.lab.lines import tell
from specdec.lab.progress import Live
from specdec.lab.prompts import Prompt, encode
from specdec.lab.running import opened
from specdec.lab.session import wait
from specdec.lab.settings import Settings
from specdec.prefixes import Prefixes


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A job that takes turns with others.

    Args:
        number: its place in the sweep.
        words: as they were typed.
        made: makes them settings.
    """

    number: int
    words: list[str]
    made: Callable[[], Settings]

    @cached_property
    def settings(self) -> Settings:
        """Composed once, which takes Hydra a while."""
        return self.made()

    @property
    def work(self) -> str:
        """Equal for jobs of the same plain decoding; empty of one that will be refused."""
        try:
            settings = self.settings
            shared = shares_pages(settings)
        except ValueError:
            return ""
        without = (*NO_PART, *METHOD)
        kept = {name: v for name, v in settings.items() if name not in without}
        return digest([kept, shared])


def launch(
    jobs: Mapping[int, list[str]], settings: Callable[[list[str]], Settings], folder: Path
) -> dict[int, float | None]:
    """Do all jobs of a sweep; those of the same plain decoding take turns, and share it. What
    becomes of each is in the ledger.

    Args:
        jobs: words by number.
        settings: of words; a ValueError says what is wrong with them.
        folder: of the sweep.

    Returns:
        What a sweeper maximises, of each job; None of one without results.

    Raises:
        KeyboardInterrupt: they were interrupted; what is finished has its summaries.
    """
    ledger, console, rounds = Ledger.of_environment(folder), Console(), dict[str, Round]()
    for number, words in jobs.items():
        turn = Turn(number=number, words=words, made=partial(settings, words))
        rounds.setdefault(turn.work, Round(ledger, console)).jobs.append(turn)
    for one in rounds.values():
        one.begin(0)
    done = {job.number: objective(summary_of(folder, job)) for job in ledger.jobs()}
    return {number: done.get(number) for number in jobs}


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
        self._reached = place
        if place == len(self.jobs):
            self._decode()
            return
        turn = self.jobs[place]
        job = Job(words=turn.words, number=turn.number, sweep=self._ledger.token)
        attempt(self._ledger, job, partial(self._work, place, job))
        if self._reached == place:  # there was nothing to do, or it was refused
            self.begin(place + 1)

    def _work(self, place: int, job: Job, began: Callable[[Path], None]) -> dict[str, Any]:
        turn, folder = self.jobs[place], self._ledger.folder
        settings = turn.settings
        job.gpu = gpu_name(str(settings["device"]))
        opening = partial(opened, words=turn.words, sweep=True, began=began)
        with opening(settings, folder, self._console) as run:
            if run.experiment is None:
                return {**(run.folder.summary or {}), "done_already": True}
            self._shared = self._shared or run.shared  # one, whose records all of them read
            course = Course(run.experiment, run.folder, run.tracker, self._live, self._shared)
            course.begin()
            with course.guarded():
                self._courses.append(course)
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
            prefixes = self._share_prompts(lanes)
            try:
                ready = [one for one in lanes if self._does(one[0].ready, one[1], prefixes)]
                size = experiment.batch_size
                prompts = experiment.prompts
                chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
                total = sum(lane.left(prompts).turns for lane, _ in ready)
                with self._live.side("in turns", total):
                    for number, chunk in enumerate(chunks):
                        self._turn(ready, number, chunk, prefixes)
            finally:
                for lane, _ in lanes:
                    lane.close()

    def _turn(
        self,
        lanes: Sequence[tuple[Lane, list[Course]]],
        number: int,
        chunk: Sequence[Prompt],
        prefixes: Prefixes | None,
    ) -> None:
        """A few prompts by all methods, of which none is always the first."""
        if prefixes is not None and any(lane.left(chunk).open for lane, _ in lanes):
            self._read_ahead(prefixes, chunk)
        start = number % max(1, len(lanes))
        for lane, courses in (*lanes[start:], *lanes[:start]):
            if not all(course in self._faults for course in courses):
                self._does(partial(lane.decode, chunk), courses, prefixes)

    def _share_prompts(self, lanes: Sequence[tuple[Lane, list[Course]]]) -> Prefixes | None:
        """One cache of the target for all of them, if their sequences share pages. Of all or of
        none: a drafter that reads states reads every prompt on its own time, and would be compared
        with plain decoding that finds them read."""
        of = self._courses[0].experiment
        if not of.capacity.share or any(lane.method.drafter.reads_states for lane, _ in lanes):
            return None
        chunk = cache_of(self.jobs[0].settings).prefill_chunk
        prefixes = Prefixes(of.target, of.capacity, chunk=chunk)
        for lane, _ in lanes:
            lane.prefixes = prefixes
        return prefixes

    def _read_ahead(self, prefixes: Prefixes, chunk: Sequence[Prompt]) -> None:
        """Read what they all begin with, on nobody's time."""
        of = self._courses[0].experiment
        prompts = [encode(of.target.tokenizer, prompt, chat=of.chat) for prompt in chunk]
        begun = time.perf_counter()
        tokens = prefixes.hold(prompts)
        wait(of.target.device)
        seconds = time.perf_counter() - begun
        for course in self._courses:
            course.add_shared_prefill(tokens, seconds)

    def _does(
        self, work: Callable[[], Any], courses: Sequence[Course], prefixes: Prefixes | None
    ) -> bool:
        """Whether it went well; if not, it is the fault of these, and leaves nothing open."""
        try:
            work()
        except Exception as error:
            self._faults = dict.fromkeys(courses, error) | self._faults  # the first counts
            if prefixes is not None:
                prefixes.settle()
            return False
        return True

    @contextmanager
    def _plain(self) -> Iterator[Lane | None]:
        """Plain decoding that all share, if none of it is decoded yet; else each has its own:
        times of another hour are no times in turns."""
        experiment, shared = self._courses[0].experiment, self._shared
        if shared is None or experiment.baseline is None:
            yield None
            return
        with shared.held(partial(tell, self._console)) as alone:
            if not alone or shared.side.generations.records:
                yield None
                return
            shared.side.begin()
            yield Lane(experiment, experiment.baseline, shared.side, self._live)
