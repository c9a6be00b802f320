"""A job of a sweep, which costs the others nothing, whatever becomes of it."""

import gc
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from specdec.lab.files import replace_file
from specdec.lab.jobs import (
    DONE,
    FAILED,
    FINISHED,
    FOLDER,
    INTERRUPTED,
    REFUSED,
    Job,
    Ledger,
    jobs_of,
    now,
)
from specdec.reasons import FailedError, described

Summary = dict[str, Any]


def attempt(
    ledger: Ledger, job: Job, work: Callable[[Callable[[Path], None]], Summary]
) -> Summary | None:
    """Do a job, and keep its file in the ledger. What is wrong with it goes to stderr, in one
    line.

    Args:
        work: returns the summary. It calls its argument with the folder of the run once there is
            one.

    Returns:
        The summary; None of a job that was refused or failed.

    Raises:
        KeyboardInterrupt: it was interrupted.
        ValueError: its file in the ledger cannot be written.
    """

    def began(folder: Path) -> None:
        job.folder = folder.relative_to(ledger.folder).as_posix()
        ledger.write(job)

    ledger.write(job)
    summary = None
    try:
        summary = work(began)
        job.state = FINISHED
        if summary.get("done_already"):  # with the times of then
            job.state, job.shared = DONE, _shared_before(ledger, job)
        return summary
    except KeyboardInterrupt:
        job.state = INTERRUPTED
        raise
    except ValueError as error:
        state = FAILED if isinstance(error, FailedError) else REFUSED
        job.state, job.reason = state, " ".join(str(error).split())
    except (Exception, SystemExit) as error:
        job.state, job.reason = FAILED, _crash(error, ledger, job)
    finally:
        job.ended = now()
        if job.folder is not None and not (ledger.folder / job.folder).exists():
            job.folder = None  # what is refused leaves nothing
        with suppress(ValueError):  # of a full disk: as it is, readers take it for failed
            ledger.write(job)
        if job.state == FAILED:
            _free()
    print(f"error: {job.reason} ({' '.join(job.words)})", file=sys.stderr)
    return None


def _shared_before(ledger: Ledger, job: Job) -> bool:
    """Whether what is in the folder of a job was measured beside another."""
    before = [one for one in jobs_of(ledger.folder) if one.folder == job.folder]
    return any(one.shared for one in before if one.sweep != job.sweep)


def _crash(error: BaseException, ledger: Ledger, job: Job) -> str:
    """Keep the traceback; returns the reason, in one line."""
    place = ledger.folder / FOLDER / f"{ledger.name(job.number)}.error.txt"
    if job.folder is not None:
        place = ledger.folder / job.folder / "error.txt"
    reason = " ".join(described(error).split())
    with suppress(ValueError, OSError):  # of a full disk
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, "".join(traceback.format_exception(error)))
        reason += f"; the traceback is in {place}"
    return reason


def _free() -> None:
    """Give back what a failed job has left for the next one of this process."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # of a device that has failed
            torch.cuda.empty_cache()


def gpu_name(device: str) -> str | None:
    """What the driver calls the GPU that this setting means in this process, as in `GPU-...`; None
    of a CPU, or of what cannot be used."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    with suppress(RuntimeError, AssertionError, ValueError):
        where = torch.device("cuda" if device == "auto" else device)
        return f"GPU-{torch.cuda.get_device_properties(where).uuid}"
    return None
