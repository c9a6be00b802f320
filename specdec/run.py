"""The command line: `python -m specdec.run drafter=small_llama`. Settings become an `Experiment`.

Whatever is wrong with them ends in one line on stderr and exit code 2, before any model is loaded
where that is possible. Other exit codes: 0 all is well, 3 the check of a run has failed, 130 it
was interrupted, 1 anything else, with a traceback. A sweep ends with the worst of its jobs: 3,
then 2; an interruption or a crash ends it at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from specdec import __version__
from specdec.lab.interrupts import interruptible
from specdec.lab.options import CONFIGS, usage
from specdec.lab.running import forget_models, run
from specdec.lab.settings import (
    ERRORS,
    Refused,
    SweepFolder,
    check_words,
    continuing,
    folders_of,
    message_of,
    out_of,
    resolved,
    split,
)
from specdec.lab.terminal import show_sweep

# What the jobs of this process came to: one, or all of a sweep.
_finished: list[tuple[list[str], dict[str, Any]]] = []
_refused: list[tuple[list[str], str]] = []


def main() -> None:
    """Console entry point."""
    transformers.utils.logging.set_verbosity_error()
    _finished.clear()
    _refused.clear()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to the handler below
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, for drafters of the user's own
    try:
        words, flags = split(sys.argv[1:])
        if {"--version", "--help", "-h"} & set(flags):
            about = f"specdec {__version__}"
            print(about if "--version" in flags else usage(folders_of(flags)))
            sys.exit(0)
        check_words(words)
        folders_of(flags)
        sys.argv[1:] = [*words, *flags]  # argparse wants all words on one side of the flags
        with interruptible():
            _hydra_main()
    except (ValueError, Refused, *ERRORS) as error:
        _refuse(message_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        SweepFolder.forget()
        forget_models()
    if len(_finished) + len(_refused) > 1:
        show_sweep(_finished, _refused, Console())
    failed = any(summary["lossless"]["verdict"] == "failed" for _, summary in _finished)
    sys.exit(3 if failed else 2 if _refused else 0)


@hydra.main(config_path=str(CONFIGS), config_name="run", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    """One run; returns what a sweeper maximises: the speedup, or tokens/s without a baseline."""
    job = HydraConfig.get()
    words, console = [str(word) for word in job.overrides.task], Console()
    sweep = job.mode == RunMode.MULTIRUN
    if sweep:
        console.rule(f"{job.job.num}: {' '.join(words)}", align="left")
    try:
        settings = resolved(config, job.runtime.choices, words)
        place = out_of(settings)
        again = continuing(sys.argv[1:], place)
        summary = run(
            settings, place, console, words=words, again=again, sweep=sweep, others=bool(_finished)
        )
    except (ValueError, *ERRORS) as error:
        where = f" ({' '.join(words)})" if sweep else ""
        _refuse(message_of(error) + where, words)  # a sweep goes on with its other jobs
        return None
    _finished.append((words, summary))
    return summary.get("speedup") or summary["tokens_per_second"]


def _refuse(message: str, words: Sequence[str] = ()) -> None:
    """Note and print what is wrong, in one line."""
    _refused.append((list(words), message))
    print(f"error: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
