"""The launcher `processes`: jobs of a sweep in processes of their own, one to a GPU.

Memory, graphs and compiled kernels of one job are gone before the next begins, and a process that
dies takes no other with it.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

import torch
from pydantic import Field
from rich.console import Console

from specdec.lab.files import to_json, writing
from specdec.lab.interrupts import interruptible
from specdec.lab.jobs import (
    FAILED,
    INTERRUPTED,
    JOB,
    Job,
    Ledger,
    differing,
    ending,
    now,
    objective,
    summary_of,
)
from specdec.lab.lines import tell
from specdec.lab.settings import split, word_of
from specdec.lab.values import typed

PAUSE = 0.05  # seconds between looks at what runs
GRACE = 60.0  # seconds for a job that took too long to write its summary
CPU = "CPU"
OWN = ("hydra/launcher=", "hydra.launcher.", "hydra/sweeper=", "hydra.sweep", "hydra.mode=")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A job to be done.

    Args:
        number: its place in the sweep.
        words: its settings.
        device: its setting of that name.
        gpus: how many it takes, if any.
    """

    number: int
    words: list[str]
    device: str
    gpus: int = 1


@dataclass(kw_only=True)
class Running:
    """A job that is being done on `slots`: GPUs, or CPU."""

    task: Task
    slots: list[str]
    process: subprocess.Popen[bytes]
    log: TextIO
    begun: float = field(default_factory=time.monotonic)
    ended_at: float | None = None  # when it had taken too long


def launch(
    tasks: Sequence[Task], folder: Path, words: Iterable[str], settings: Mapping[str, Any]
) -> list[float | None]:
    """Do all jobs of a sweep.

    Args:
        folder: of the sweep.
        words: for Hydra itself, of the sweep's command line, whose flags are in `sys.argv`.
        settings: those of the launcher.

    Returns:
        What a sweeper maximises, of each job; None of one without results.

    Raises:
        ValueError: a setting that cannot be used.
        KeyboardInterrupt: the sweep was interrupted. Jobs have ended; a second interruption
            kills them.
    """
    flags = [flag for flag in split(sys.argv[1:])[1] if flag not in ("-m", "--multirun")]
    flags += [word for word in words if not word.startswith(OWN)]
    flags += ["hydra.mode=RUN", word_of("out", str(folder))]
    processes = Processes(Ledger.of_environment(folder), flags, tasks, **settings)
    processes.run()
    done = {job.number: job for job in processes.ledger.jobs()}
    found = (done.get(task.number) for task in tasks)
    return [objective(summary_of(folder, job)) if job else None for job in found]


class Processes:
    """Jobs in processes.

    Args:
        flags: of each one's command line, besides its words.
        devices: GPUs, as CUDA_VISIBLE_DEVICES has them; `auto` for all that are visible.
        at_once: jobs at a time on the CPU.
        timeout: minutes of a job; None for no limit.
        max_failures: failed jobs after which no more are started; None for no limit.

    Raises:
        ValueError: a setting that cannot be used.
    """

    program: ClassVar[list[str]] = [sys.executable, "-m", "specdec.run"]

    def __init__(
        self,
        ledger: Ledger,
        flags: Sequence[str],
        tasks: Sequence[Task],
        *,
        devices: Any = "auto",
        at_once: Any = 1,
        timeout: Any = None,
        max_failures: Any = None,
    ) -> None:
        at_least_one = Annotated[int, Field(ge=1)]
        name = "hydra.launcher"
        at_once = typed(f"{name}.at_once", at_once, at_least_one)
        self.timeout = typed(f"{name}.timeout", timeout, Annotated[float, Field(gt=0)] | None)
        self.max_failures = typed(f"{name}.max_failures", max_failures, at_least_one | None)
        self.gpus = gpus_of(devices)
        self.ledger, self.flags = ledger, list(flags)
        self._slots = [*self.gpus, *[CPU] * at_once]
        self._waiting, self._running = deque(tasks), list[Running]()
        self._names = dict(
            zip(
                (task.number for task in tasks),
                differing(task.words for task in tasks),
                strict=True,
            )
        )
        self._failures = 0
        self._stopping = False
        self._console = Console()

    def run(self) -> None:
        """Until all have ended."""
        try:
            while self._waiting or self._running:
                self._start_some()
                self._look()
                time.sleep(PAUSE)
        except BaseException:  # an interruption, or a disk without room for the next log
            self._stop()
            raise

    def _start_some(self) -> None:
        """As many as there are free devices for."""
        while self._waiting:
            task = self._waiting[0]
            on_cpu = task.device == "cpu" or not self.gpus
            # One that asks for more than there are is told so by its own process.
            count = 1 if on_cpu else max(1, min(task.gpus, len(set(self.gpus))))
            free = [one for one in self._slots if (one == CPU) == on_cpu]
            slots = (free if on_cpu else list(dict.fromkeys(free)))[:count]
            if len(slots) < count:
                return
            for slot in slots:
                self._slots.remove(slot)
            self._running.append(self._start(self._waiting.popleft(), slots))

    def _start(self, task: Task, slots: list[str]) -> Running:
        path = self.ledger.log(task.number)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = path.open("w", encoding="utf-8")
        given = {"number": task.number, "words": task.words, "started": now()}
        environment = {**os.environ, JOB: to_json(given)}
        where, names = "", ",".join(slots)
        if slots != [CPU]:
            environment["CUDA_VISIBLE_DEVICES"] = names
            where = f" on GPU{'s' * (len(slots) > 1)} {names}"
        self._tell(task, f"started{where}, prints to {path}")
        process = subprocess.Popen(
            [*self.program, *task.words, *self.flags],  # with `out`, of which the last counts
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on a terminal would reach them as well
        )
        return Running(task=task, slots=slots, process=process, log=log)

    def _look(self) -> None:
        """After those that have ended, or should have."""
        for one in list(self._running):
            if one.process.poll() is None:
                self._limit(one)
                continue
            one.log.close()
            self._running.remove(one)
            self._slots += one.slots
            job = self._settle(one)
            self._tell(one.task, job.state + (f": {job.reason}" if job.reason else ""))
            self._failures += job.state == FAILED
        if self._waiting and self.max_failures and self._failures >= self.max_failures:
            self._waiting.clear()
            self._print(
                f"hydra.launcher.max_failures={self.max_failures}: as many have failed, no more "
                f"are started"
            )

    def _limit(self, one: Running) -> None:
        """End what takes too long: asked first, so that its finished texts have a summary."""
        if self.timeout is None or time.monotonic() - one.begun < 60 * self.timeout:
            return
        if one.ended_at is None:
            one.ended_at = time.monotonic()
            one.process.terminate()
        elif time.monotonic() - one.ended_at > GRACE:
            self._kill(one)

    def _settle(self, one: Running) -> Job:
        """What became of a job, in the ledger too if it could not write that itself."""
        job = next((j for j in self.ledger.jobs() if j.number == one.task.number), None)
        code, known = one.process.returncode, job is not None and job.ended is not None
        if job is None:
            sweep = self.ledger.token
            job = Job(words=one.task.words, number=one.task.number, sweep=sweep)
            job.pid = one.process.pid
        if one.ended_at is not None:
            job.state = FAILED
            job.reason = f"took longer than hydra.launcher.timeout={self.timeout:g} minutes"
        elif known:
            return job
        elif self._stopping:
            job.state = INTERRUPTED
            job.reason = "killed" if code == -signal.SIGKILL else ending(code)
        else:
            log = self.ledger.log(job.number)
            job.state, job.reason = FAILED, f"{ending(code)}; what it printed is in {log}"
        job.ended = job.ended or now()
        with suppress(ValueError):  # of a full disk
            self.ledger.write(job)
        return job

    def _stop(self) -> None:
        """End what runs: asked first, killed at a second interruption."""
        self._stopping = True
        self._waiting.clear()
        self._print(
            f"no more jobs are started, {len(self._running)} running ones write their summaries; "
            f"Ctrl-C kills them"
        )
        try:
            with interruptible():
                for one in self._running:
                    one.process.terminate()
                while self._running:
                    self._look()
                    time.sleep(PAUSE)
        except KeyboardInterrupt:
            for one in self._running:
                self._kill(one)
                one.process.wait()
            self._look()

    @staticmethod
    def _kill(one: Running) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)

    def _tell(self, task: Task, what: str) -> None:
        name = self._names[task.number] or " ".join(task.words)
        self._print(f"{task.number}: {name}: {what}")

    def _print(self, line: str) -> None:
        tell(self._console, line)


def gpus_of(devices: Any) -> list[str]:
    """GPUs that jobs may have, as CUDA_VISIBLE_DEVICES names them.

    Args:
        devices: `auto`, or a list of them.

    Raises:
        ValueError: one that is not visible, or no list.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        visible = [name.strip() for name in given.split(",") if name.strip()]
    else:
        visible = [str(number) for number in range(torch.cuda.device_count())]
    if devices == "auto":
        return visible
    try:
        asked = [str(one) for one in typed("hydra.launcher.devices", devices, list[int | str])]
    except ValueError:
        asked = []
    if not asked:
        raise ValueError(
            f"hydra.launcher.devices={devices}: must be auto or a list of GPUs, as in [0,1]"
        )
    for one in asked:
        if one not in visible and (given is not None or one.isdecimal()):
            raise ValueError(
                f"hydra.launcher.devices=[{','.join(asked)}]: {one} is none of the GPUs that are "
                f"visible here: {', '.join(visible) or 'none'}"
            )
    return asked
