"""The ledger of a sweep: a file in `jobs/` for each job, which the process that does it writes,
whatever launched it. So the table of a sweep and its exit code come from the disk.

Parents and jobs know each other by two variables of the environment: SPECDEC_SWEEP, the token of
a sweep, and SPECDEC_JOB, which makes a plain run one of its jobs.
"""

import os
import signal
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from specdec.lab.files import read_object, replace_file, to_json, writing
from specdec.lab.lock import alive

SWEEP, JOB = "SPECDEC_SWEEP", "SPECDEC_JOB"
FOLDER, LOGS = "jobs", "logs"  # of a sweep's folder
RUNNING, FINISHED, DONE = "running", "finished", "done already"
REFUSED, FAILED, INTERRUPTED = "refused", "failed", "interrupted"
NEVER = "not started"  # of jobs that left no file


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


@dataclass(slots=True, kw_only=True)
class Job:
    """What is known of a job.

    Args:
        words: its settings as they were typed.
        number: its place in the sweep.
        reason: why it is refused, failed or was interrupted, in one line.
        folder: of its results, from that of the sweep.
        sweep: token of the sweep.
        gpu: what the driver calls the GPU that it works on; None on a CPU.
        shared: whether another job of the sweep ran on its device meanwhile, so that its times are
            not its own.
    """

    schema: int = 1
    words: list[str]
    number: int
    state: str = RUNNING
    reason: str | None = None
    folder: str | None = None
    sweep: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    gpu: str | None = None
    started: str = field(default_factory=now)
    ended: str | None = None
    shared: bool = False


class Ledger:
    """Of one sweep.

    Args:
        folder: of the sweep.
        token: by which its jobs are told from those of earlier sweeps in the same folder.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Of a sweep that begins: all jobs that this process starts belong to it."""
        token = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        os.environ[SWEEP] = token
        return cls(folder, token)

    @classmethod
    def of_environment(cls, folder: Path) -> Self:
        """Of the sweep that this process works for."""
        return cls(folder, os.environ.get(SWEEP, "unknown"))

    def name(self, number: int) -> str:
        """What files of a job are called."""
        return f"{self.token}-{number}"

    def log(self, number: int) -> Path:
        """What a job in a process of its own prints."""
        return self.folder / LOGS / f"{self.name(number)}.txt"

    def write(self, job: Job) -> None:
        """Replace the file of a job.

        Raises:
            ValueError: it cannot be written.
        """
        path = self.folder / FOLDER / f"{self.name(job.number)}.json"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(asdict(job)) + "\n")

    def jobs(self) -> list[Job]:
        """Those that have begun, by number, as `jobs_of` has them."""
        return [job for job in jobs_of(self.folder) if job.sweep == self.token]

    def settle(self, job: Job) -> None:
        """Keep what `jobs` says of one, where its file says less. For a sweep that has ended."""
        if job != _read(self.folder / FOLDER, self.name(job.number)):
            self.write(job)

    def discard(self) -> None:
        """Remove all files of this sweep's jobs."""
        for place in (FOLDER, LOGS):
            for path in (self.folder / place).glob(f"{self.token}-*"):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # there are others
                (self.folder / place).rmdir()


def jobs_of(folder: Path) -> list[Job]:
    """All jobs of all sweeps in a folder, in order. One whose process has died without a word has
    failed, unless it ran on another host."""
    found = [_read(folder / FOLDER, path.stem) for path in (folder / FOLDER).glob("*.json")]
    jobs = sorted((job for job in found if job), key=lambda job: (job.sweep, job.number))
    for job in jobs:
        ours = job.host == socket.gethostname()
        if job.state == RUNNING and ours and not alive({"host": job.host, "pid": job.pid}):
            job.state, job.reason = FAILED, f"its process {job.pid} ended without a word"
    for job in jobs:
        others = (one for one in jobs if one is not job)
        job.shared = job.shared or any(_meet(job, other) for other in others)
    return jobs


def _read(folder: Path, name: str) -> Job | None:
    """None of a file that is no job's."""
    found = read_object(folder / f"{name}.json") or {}
    known = [one.name for one in fields(Job)]
    return Job(**{key: found[key] for key in known}) if found.keys() >= set(known) else None


def _meet(one: Job, other: Job) -> bool:
    """Whether two jobs of a sweep ran on the same device at the same time, and not in turns, in
    one process."""
    if (one.host, one.pid) == (other.host, other.pid):
        return False
    same = (one.sweep, one.host, one.gpu) == (other.sweep, other.host, other.gpu)
    return same and _before_end(one, other) and _before_end(other, one)


def _before_end(one: Job, other: Job) -> bool:
    """Whether one had begun when the other ended."""
    if other.ended is None:
        return True
    return datetime.fromisoformat(one.started) < datetime.fromisoformat(other.ended)


def summary_of(folder: Path, job: Job) -> dict[str, Any] | None:
    """The figures that a job has left in the folder of its sweep."""
    return read_object(folder / job.folder / "summary.json") if job.folder else None


def objective(summary: Mapping[str, Any] | None) -> float | None:
    """What a sweeper maximises: the speedup, or tokens/s without a baseline."""
    if summary is None:
        return None
    return float(summary.get("speedup") or summary["tokens_per_second"])


def ending(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    about = ", as it does where memory runs out" if -code == signal.SIGKILL else ""
    return f"ended by signal {-code}{name}{about}"


def differing(all_words: Iterable[Sequence[str]]) -> list[str]:
    """Of the words of several jobs, for each those that others do not have."""
    jobs = [list(words) for words in all_words]
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in words if word not in common) for words in jobs]


def exit_code(jobs: Sequence[Job], summaries: Sequence[Mapping[str, Any] | None]) -> int:
    """130 if any was interrupted, else 1 if any failed, else 3 if a check did, else 2 if any was
    refused."""
    states = {job.state for job in jobs}
    if INTERRUPTED in states:
        return 130
    if states & {FAILED, RUNNING}:
        return 1
    verdicts = {(found or {}).get("lossless", {}).get("verdict") for found in summaries}
    return 3 if "failed" in verdicts else 2 if REFUSED in states else 0


def worst(codes: Iterable[int]) -> int:
    """Of several exit codes."""
    return min(codes, key=(130, 1, 3, 2, 0).index, default=0)
