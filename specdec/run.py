"""The command line: `python -m specdec.run drafter=small_llama`. Settings become an `Experiment`.

Whatever is wrong with them ends in one line on stderr and exit code 2, before any model is loaded
where that is possible. Other exit codes: 0 all is well, 3 the check of a run has failed, 130 it
was interrupted, 1 anything else: a drafter that fails or a full GPU in one line, what nobody
thought of with a traceback. A sweep does all its jobs whatever becomes of one, and ends with the
worst code: 130, then 1, 3, 2.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from specdec import __version__
from specdec.compare.track import answer
from specdec.lab.attempt import attempt, gpu_name
from specdec.lab.interrupts import interruptible
from specdec.lab.jobs import (
    JOB,
    NEVER,
    REFUSED,
    Job,
    Ledger,
    exit_code,
    objective,
    summary_of,
    worst,
)
from specdec.lab.lines import tell
from specdec.lab.options import CONFIGS, usage
from specdec.lab.running import forget_models, run
from specdec.lab.settings import (
    ERRORS,
    Refused,
    SweepFolder,
    check_words,
    continuing,
    find_own_code,
    folders_of,
    in_one_line,
    message_of,
    out_of,
    resolved,
    split,
)
from specdec.lab.sweep_table import show_sweep
from specdec.reasons import FailedError

_codes: list[int] = []  # of the run of this process, or of the job it does for another


def main() -> None:
    """Console entry point."""
    _codes.clear()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to the handler below
    find_own_code()
    try:
        code = _command()
        if SweepFolder.ledger is not None:
            code = _end(SweepFolder.ledger, code, Console())
    finally:
        SweepFolder.forget()
        forget_models()
    sys.exit(code)


def _command() -> int:
    """Do what was typed; returns the exit code, that of a sweep without those of its jobs."""
    try:
        words, flags = split(sys.argv[1:])
        if {"--version", "--help", "-h"} & set(flags):
            about = f"specdec {__version__}"
            print(about if "--version" in flags else usage(folders_of(flags)))
            return 0
        check_words(words)
        folders_of(flags)
        sys.argv[1:] = [*words, *flags]  # argparse wants all words on one side of the flags
        with interruptible():
            _hydra_main()
        return worst(_codes)
    except (ValueError, Refused, *ERRORS) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if SweepFolder.ledger is None:
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"error: a job ended without a word, {said}", file=sys.stderr)
        return _outlast(error)


@hydra.main(config_path=str(CONFIGS), config_name="run", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    """One run, or a job of a sweep; returns what a sweeper maximises."""
    transformers.utils.logging.set_verbosity_error()
    job = HydraConfig.get()
    words, choices = [str(word) for word in job.overrides.task], job.runtime.choices
    given = os.environ.pop(JOB, None)
    try:
        if given is not None:  # a job that another process has started this one for
            return _job(config, choices, **json.loads(given))
        if job.mode == RunMode.MULTIRUN:
            return _job(config, choices, number=job.job.num, words=words)
        settings = resolved(config, choices, words)
        out, console = out_of(settings), Console()
        if swept := ", ".join(job.sweeper.get("params") or ()):
            said = f"experiment={choices['experiment']}: its sweep over {swept} takes -m"
            tell(console, f"{said}; this is one run without it")
        summary = run(settings, out, console, words=words, again=continuing(sys.argv[1:], out))
    except (ValueError, *ERRORS) as error:  # Hydra would print more about it
        _codes.append(_refuse(error))
        return None
    _codes.append(exit_code([], [summary]))
    return objective(summary)


def _refuse(error: BaseException) -> int:
    """Print what is wrong, in one line; returns the exit code."""
    print(f"error: {message_of(error)}", file=sys.stderr)
    return 1 if isinstance(error, FailedError) else 2


def _job(
    config: DictConfig,
    choices: Mapping[str, Any],
    *,
    number: int,
    words: list[str],
    started: str | None = None,
) -> float | None:
    """A job of a sweep, in the process of the sweep or in another.

    Args:
        started: when its process was, which does this job alone.
    """
    folder, console = out_of(config), Console()
    ledger = Ledger.of_environment(folder)
    job = Job(words=words, number=number, sweep=ledger.token)
    job.started = started or job.started
    console.rule(f"{number}: {' '.join(words)}", align="left")

    def work(began: Callable[[Path], None]) -> dict[str, Any]:
        with in_one_line():
            settings = resolved(config, choices, words)
        job.gpu = gpu_name(str(settings["device"]))
        return run(settings, folder, console, words=words, sweep=True, began=began)

    ours = SweepFolder.ledger is not None or started is not None
    try:
        with nullcontext() if ours else interruptible():
            summary = attempt(ledger, job, work)
    except KeyboardInterrupt:
        if ours:
            raise
        return None  # of a launcher that would take it for a crash
    if started is not None:
        _codes.append(exit_code([job], [summary]))
    return objective(summary)


def _outlast(error: BaseException) -> int:
    """Wait for jobs that still run: submitit's launcher raises what the first one ended with while
    others go on. Its frame knows them. Returns the exit code."""
    try:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            jobs = frame.f_locals.get("jobs", ())
            for job in jobs if isinstance(jobs, list) else ():
                if hasattr(job, "wait"):
                    job.wait()
    except KeyboardInterrupt:
        return 130
    return 1


def _end(ledger: Ledger, code: int, console: Console) -> int:
    """Print what became of the jobs of a sweep, and what they say together; returns its exit
    code.

    Args:
        code: of the sweep without that of its jobs.
    """
    jobs = ledger.jobs()
    if not jobs:
        return code
    with suppress(ValueError):  # of a full disk
        for job in jobs:
            ledger.settle(job)
    begun = {job.number for job in jobs}
    ahead = [(n, words) for n, words in enumerate(SweepFolder.planned) if n not in begun]
    missing = [Job(words=words, number=n, sweep="", state=NEVER) for n, words in ahead]
    jobs = sorted([*jobs, *missing], key=lambda job: job.number)
    summaries = [summary_of(ledger.folder, job) for job in jobs]
    show_sweep(jobs, summaries, console)
    code = worst([code, exit_code(jobs, summaries)])
    if code == 130:
        again = continuing(sys.argv[1:], ledger.folder)
        tell(console, f"this continues: {again}")
    elif sum(summary is not None for summary in summaries) > 1:
        try:
            answer(ledger.folder, console)
        except KeyboardInterrupt:
            return 130
    if {job.state for job in jobs} == {REFUSED}:
        ledger.discard()
    return code


if __name__ == "__main__":
    main()
