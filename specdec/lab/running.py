"""One run: from resolved settings to a finished folder."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from specdec.lab.build import (
    baseline_of,
    cache_of,
    method_of,
    placement_of,
)
from specdec.lab.experiment import Experiment, stop_tokens
from specdec.lab.fingerprints import contents_of, digest
from specdec.lab.lengths import TOO_LONG, fitted
from specdec.lab.options import nearest
from specdec.lab.prompts import CHAT_MODES, load_prompts, unused_fields
from specdec.lab.runs import RunFolder
from specdec.lab.settings import Settings
from specdec.lab.setup import General, general_of, record_of, target_of, tracker_of
from specdec.lab.terminal import Live, show_summary
from specdec.lab.tracked import tracked_run
from specdec.lab.tracking import Careful
from specdec.lab.unused import without_effect
from specdec.lab.values import shown, typed
from specdec.models.load import Models, find_model
from specdec.sampling import SamplingParams

# What may differ when a run is resumed.
VOLATILE = frozenset({"resume", "tracker", "out", "choices", "record"})
MOST_TEXTS = 1_000_000  # of a run


def run(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    words: Sequence[str] = (),
    again: str = "",
    sweep: bool = False,
    others: bool = False,
) -> dict[str, Any]:
    """Decode as the settings say, print the table and return the summary.

    Args:
        out: the folder of this run.
        words: what was typed, which is what trackers call the run; its drafter if there are none.
        again: the command that continues it, for the one who interrupts it.
        sweep: whether it is one of several, in the folder of all of them, and
        others: whether some of those are finished.

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
            prompts = digest([asdict(prompt) for prompt in experiment.prompts])
            folder.identify(
                resolved=experiment.resolved,
                contents={**contents_of(settings), "prompts": prompts},
            )
            shown = {**settings, "resolved": experiment.resolved}
            tracker.start(tracked_run(out, shown, experiment.method.marks, words))
            summary = experiment.run(folder, tracker, Live(console))
        except KeyboardInterrupt:
            said = f"interrupted: {folder.finished} finished texts are in {out}"
            if folder.resumable or (sweep and others):
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
    method, path, record = method_of(settings), target_of(settings), record_of(settings)
    models, asked = Models(placement_of(settings)), _asked(settings, method.sampling, console)
    find_model(path, setting="target.path")
    method.drafter.find()
    for line in without_effect(settings, method, models.placement.kernels.impl, words):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    target = models.load(path, setting="target.path")
    fit = fitted(
        asked.pop("prompts"),
        target.tokenizer,
        context=target.max_context,
        max_new_tokens=general.max_new_tokens,
        chat=asked["chat"],
        too_long=asked.pop("too_long"),
    )
    if fit.told:
        console.print(fit.told, soft_wrap=True, markup=False, highlight=False)
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
        prompts=fit.prompts,
        too_long={"skipped": fit.skipped, "truncated": fit.truncated},
        record=record,
        **asked,
    )


def _asked(settings: Settings, sampling: SamplingParams, console: Console) -> dict[str, Any]:
    """What is decoded: prompts, samples of each, whether a chat template is applied, and what
    becomes of prompts that are too long."""
    kinds = {**get_type_hints(load_prompts), "chat": str, "samples": int, "too_long": str}
    source: dict[str, Any] = {"path": None, "field": None, "limit": None}
    source |= {"chat": "auto", "samples": 1, "too_long": "refuse"}
    for name, value in settings["prompts"].items():
        if name not in kinds:
            near = nearest(f"prompts.{name}", (f"prompts.{one}" for one in kinds))
            raise ValueError(f"prompts.{name}={shown(value)}: there is no such setting{near}")
        source[name] = typed(f"prompts.{name}", value, kinds[name])
    chat, samples, too_long = (source.pop(name) for name in ("chat", "samples", "too_long"))
    for name, value, known in (("chat", chat, CHAT_MODES), ("too_long", too_long, TOO_LONG)):
        if value not in known:
            raise ValueError(f"prompts.{name}={value}: must be one of {', '.join(known)}")
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
    return {"prompts": prompts, "samples": samples, "chat": chat, "too_long": too_long}
