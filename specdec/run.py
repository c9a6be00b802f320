"""The command line: `python -m specdec.run drafter=small_llama`. Settings become an `Experiment`.

Whatever is wrong with them ends in one line on stderr and exit code 2, before any model is loaded
where that is possible. Other exit codes: 0 all is well, 3 the check of a run has failed, 130 it
was interrupted, 1 anything else, with a traceback. A sweep ends with the worst of its jobs: 3,
then 2; an interruption or a crash ends it at once.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from specdec import __version__
from specdec.lab.build import (
    baseline_of,
    cache_of,
    method_of,
    placement_of,
    shown,
    typed,
)
from specdec.lab.experiment import Experiment, stop_tokens
from specdec.lab.fingerprints import contents_of, digest
from specdec.lab.interrupts import interruptible
from specdec.lab.method import mark_of
from specdec.lab.options import CONFIGS, nearest, usage
from specdec.lab.prompts import CHAT_MODES, load_prompts, unused_fields
from specdec.lab.runs import RunFolder
from specdec.lab.settings import (
    ERRORS,
    Refused,
    Settings,
    SweepFolder,
    check_words,
    continuing,
    folders_of,
    message_of,
    out_of,
    resolved,
    split,
)
from specdec.lab.setup import General, general_of, target_of, tracker_of
from specdec.lab.terminal import Live, show_summary, show_sweep
from specdec.lab.tracking import Careful
from specdec.lab.unused import without_effect
from specdec.models.load import Models, find_model
from specdec.sampling import SamplingParams

VOLATILE = frozenset({"resume", "tracker", "out", "choices"})  # may differ when a run is resumed
MOST_TEXTS = 1_000_000  # of a run
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
        out = place / str(job.job.num) if sweep else place
        again = continuing(sys.argv[1:], place)
        summary = run(settings, out, console, words=words, again=again, sweep=sweep)
    except (ValueError, *ERRORS) as error:
        where = f" ({' '.join(words)})" if sweep else ""
        _refuse(message_of(error) + where, words)  # a sweep goes on with its other jobs
        return None
    _finished.append((words, summary))
    return summary.get("speedup") or summary["tokens_per_second"]


def run(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    words: Sequence[str] = (),
    again: str = "",
    sweep: bool = False,
) -> dict[str, Any]:
    """Decode as the settings say, print the table and return the summary.

    Args:
        out: the folder of this run.
        words: what was typed, which is what trackers call the run; its drafter if there are none.
        again: the command that continues it, for the one who interrupts it.
        sweep: whether it is one of several, in the folder of all of them.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """
    general = general_of(settings)
    resume = general.resume
    folder = RunFolder(out, config=settings, resume=resume, volatile=VOLATILE, may_begin=sweep)
    with folder:
        try:
            tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
            tracker = Careful(tracker_of(settings), tell)
            experiment = _experiment(settings, general, words, console)
            method = experiment.method
            prompts = digest([asdict(prompt) for prompt in experiment.prompts])
            folder.identify(
                resolved=experiment.resolved,
                contents={**contents_of(settings), "prompts": prompts},
            )
            tracker.start(
                config={**settings, **method.marks},
                folder=out,
                group="-".join(out.parent.parts[-2:]) if sweep else None,
                name=f"{mark_of(method.marks)} {' '.join(words) or method.drafter_name}".strip(),
            )
            summary = experiment.run(folder, tracker, Live(console))
        except KeyboardInterrupt:
            said = f"interrupted: {folder.finished} finished texts are in {out}"
            if folder.resumable or (sweep and _finished):
                said += f"; this continues: {again}"
            console.print(said, soft_wrap=True, markup=False, highlight=False)
            raise
    show_summary(summary, console)
    console.print(f"results in {out}")
    return summary


def _experiment(
    settings: Settings, general: General, words: Sequence[str], console: Console
) -> Experiment:
    """Everything is checked before a model is loaded, as far as that is possible."""
    method, path = method_of(settings), target_of(settings)
    models, asked = Models(placement_of(settings)), _asked(settings, method.sampling, console)
    find_model(path, setting="target.path")
    method.drafter.find()
    for line in without_effect(settings, method, models.placement.kernels.impl, words):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    target = models.load(path, setting="target.path")
    method.load(target, models)
    return Experiment(
        target=target,
        method=method,
        baseline=baseline_of(settings) if general.baseline else None,
        cache=cache_of(settings),
        max_new_tokens=general.max_new_tokens,
        batch_size=general.batch_size,
        stop_tokens=stop_tokens(target, ignore_eos=general.ignore_eos),
        stop_strings=general.stop_strings,
        label=path,
        **asked,
    )


def _asked(settings: Settings, sampling: SamplingParams, console: Console) -> dict[str, Any]:
    """What is decoded: prompts, samples of each, and whether a chat template is applied."""
    kinds = {**get_type_hints(load_prompts), "chat": str, "samples": int}
    source: dict[str, Any] = {"path": None, "field": None, "limit": None}
    source |= {"chat": "auto", "samples": 1}
    for name, value in settings["prompts"].items():
        if name not in kinds:
            near = nearest(f"prompts.{name}", (f"prompts.{one}" for one in kinds))
            raise ValueError(f"prompts.{name}={shown(value)}: there is no such setting{near}")
        source[name] = typed(f"prompts.{name}", value, kinds[name])
    chat, samples = source.pop("chat"), source.pop("samples")
    if chat not in CHAT_MODES:
        raise ValueError(f"prompts.chat={chat}: must be one of {', '.join(CHAT_MODES)}")
    if samples < 1:
        raise ValueError(f"prompts.samples={samples}: must be at least 1")
    if samples > 1 and sampling.greedy:
        raise ValueError(
            f"prompts.samples={samples}: at temperature 0 all of them are the same; use "
            f"sampling=sample or prompts.samples=1"
        )
    prompts = load_prompts(**source)
    if samples * len(prompts) > MOST_TEXTS:
        raise ValueError(
            f"prompts.samples={samples}: of {len(prompts)} prompts these are more than the "
            f"{MOST_TEXTS:,} texts of a run; lower it, or prompts.limit"
        )
    unused = unused_fields(prompts)
    if unused:
        said = f"fields of the prompts that are not used: {', '.join(unused)}"
        console.print(said, soft_wrap=True, markup=False)
    return {"prompts": prompts, "samples": samples, "chat": chat}


def _refuse(message: str, words: Sequence[str] = ()) -> None:
    """Note and print what is wrong, in one line."""
    _refused.append((list(words), message))
    print(f"error: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
