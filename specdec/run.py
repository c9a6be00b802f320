"""The command line: `python -m specdec.run drafter=small_llama`. Settings become an `Experiment`.

Whatever is wrong with them ends in one line on stderr and exit code 2, before any model is loaded
where that is possible.
"""

import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pydantic import Field
from rich.console import Console

from specdec.lab.build import baseline_of, build, cache_of, method_of, placement_of, typed
from specdec.lab.experiment import Experiment, stop_tokens
from specdec.lab.fingerprints import contents_of, digest
from specdec.lab.interrupts import interruptible
from specdec.lab.method import mark_of
from specdec.lab.prompts import load_prompts, unused_fields
from specdec.lab.runs import RunFolder
from specdec.lab.settings import (
    CONFIGS,
    ERRORS,
    Refused,
    Settings,
    SweepFolder,
    continuing,
    message_of,
    out_of,
    resolved,
)
from specdec.lab.terminal import Live, show_summary, show_sweep
from specdec.lab.tracking import Careful, Tracker
from specdec.models.load import Models
from specdec.sampling import SamplingParams

VOLATILE = frozenset({"resume", "tracker", "out", "choices"})  # may differ when a run is resumed
LIMITS = ("max_new_tokens", "batch_size")
STRINGS = list[Annotated[str, Field(min_length=1)]] | None
FLAGS = ("ignore_eos", "baseline")
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
        with interruptible():
            _hydra_main()
    except (Refused, *ERRORS) as error:
        _refuse(message_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        SweepFolder.forget()
    if len(_finished) + len(_refused) > 1:
        show_sweep(_finished, _refused, Console())
    sys.exit(2 if _refused else 0)


@hydra.main(config_path=CONFIGS, config_name="run", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    """One run; returns what a sweeper maximises: the speedup, or tokens/s without a baseline."""
    job = HydraConfig.get()
    words, console = [str(word) for word in job.overrides.task], Console()
    sweep = job.mode == RunMode.MULTIRUN
    if sweep:
        console.rule(f"{job.job.num}: {' '.join(words)}", align="left")
    try:
        settings = resolved(config, job.runtime.choices)
        place = out_of(settings)
        out = place / str(job.job.num) if sweep else place
        again = continuing(sys.argv[1:], place)
        summary = run(settings, out, console, title=" ".join(words), again=again, sweep=sweep)
    except (ValueError, *ERRORS) as error:
        _refuse(message_of(error), words)  # a sweep goes on with its other jobs
        return None
    _finished.append((words, summary))
    return summary.get("speedup") or summary["tokens_per_second"]


def run(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    title: str = "",
    again: str = "",
    sweep: bool = False,
) -> dict[str, Any]:
    """Decode as the settings say, print the table and return the summary.

    Args:
        out: the folder of this run.
        title: what trackers call the run; its drafter if empty.
        again: the command that continues it, for the one who interrupts it.
        sweep: whether it is one of several, in the folder of all of them.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """
    resume = typed("resume", settings["resume"], bool)
    folder = RunFolder(out, config=settings, resume=resume, volatile=VOLATILE, may_begin=sweep)
    with folder:
        try:
            tracker, experiment = _tracker(settings, console), _experiment(settings, console)
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
                name=f"{mark_of(method.marks)} {title or method.drafter_name}".strip(),
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


def _tracker(settings: Settings, console: Console) -> Tracker:
    kind = pkgutil.resolve_name(settings["tracker"]["_target_"])
    tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    return Careful(build(kind, "tracker", settings["tracker"]), tell)


def _experiment(settings: Settings, console: Console) -> Experiment:
    """Everything is checked before a model is loaded, as far as that is possible."""
    method = method_of(settings)
    limits = {name: typed(name, settings[name], int) for name in LIMITS}
    flags = {name: typed(name, settings[name], bool) for name in FLAGS}
    models, asked = Models(placement_of(settings)), _asked(settings, method.sampling, console)
    target = models.load(str(settings["target"]["path"]), setting="target.path")
    method.load(target, models)
    return Experiment(
        target=target,
        method=method,
        baseline=baseline_of(settings) if flags["baseline"] else None,
        cache=cache_of(settings),
        stop_tokens=stop_tokens(target, ignore_eos=flags["ignore_eos"]),
        label=str(settings["target"]["path"]),
        **limits,
        **asked,
    )


def _asked(settings: Settings, sampling: SamplingParams, console: Console) -> dict[str, Any]:
    """What is decoded: prompts, samples of each, whether a chat template is applied, and texts
    that end an output."""
    strings = typed("stop_strings", settings["stop_strings"], STRINGS)
    kinds = {**get_type_hints(load_prompts), "chat": str, "samples": int}
    source = {}
    for name, value in settings["prompts"].items():
        if name not in kinds:
            raise ValueError(f"prompts.{name}={value}: there is no such setting")
        source[name] = typed(f"prompts.{name}", value, kinds[name])
    chat, samples = source.pop("chat"), source.pop("samples")
    if samples < 1:
        raise ValueError(f"prompts.samples={samples}: must be at least 1")
    if samples > 1 and sampling.greedy:
        raise ValueError(
            f"prompts.samples={samples}: at temperature 0 all of them are the same; use "
            f"sampling=sample or prompts.samples=1"
        )
    prompts = load_prompts(**source)
    unused = unused_fields(prompts)
    if unused:
        said = f"fields of the prompts that are not used: {', '.join(unused)}"
        console.print(said, soft_wrap=True, markup=False)
    return {"prompts": prompts, "samples": samples, "chat": chat, "stop_strings": strings}


def _refuse(message: str, words: Sequence[str] = ()) -> None:
    """Note and print what is wrong, in one line."""
    _refused.append((list(words), message))
    print(f"error: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
