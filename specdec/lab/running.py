"""One run: from resolved settings to a finished folder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from specdec.heads.formats import check_whole
from specdec.lab.baselines import SharedBaseline
from specdec.lab.build import (
    baseline_of,
    cache_of,
    method_of,
    placement_of,
    shares_pages,
)
from specdec.lab.experiment import Experiment, stop_tokens
from specdec.lab.identity import GROWING, Identity, identity_of
from specdec.lab.lengths import TOO_LONG, fitted
from specdec.lab.lines import tell
from specdec.lab.method import Method
from specdec.lab.options import nearest
from specdec.lab.progress import Live
from specdec.lab.prompts import CHAT_MODES, load_prompts, unused_fields
from specdec.lab.records import RecordSettings
from specdec.lab.runs import RunFolder, read_config
from specdec.lab.settings import Settings
from specdec.lab.setup import General, Source, general_of, record_of, target_of, tracker_of
from specdec.lab.terminal import show_summary
from specdec.lab.together import Task, check_together, own_folder, started
from specdec.lab.tracked import tracked_run
from specdec.lab.tracking import Careful, NoTracker, Tracker
from specdec.lab.unused import without_effect
from specdec.lab.values import shown, typed
from specdec.models.load import Models
from specdec.models.placement import Placement
from specdec.ranks import here
from specdec.reasons import in_memory
from specdec.sampling import SamplingParams

MOST_TEXTS = 1_000_000  # of a run
SMALLER = "choose smaller models, dtype=bfloat16 or target.quantize=fp8"
_kept: list[tuple[Source, Models]] = []  # target of the last run of this process, and its models


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run that can begin.

    Args:
        folder: open, with `summary` if there is nothing left to do; then there is no `experiment`.
        tracker: started.
        shared: plain decoding of the sweep it belongs to.
    """

    folder: RunFolder
    experiment: Experiment | None
    tracker: Tracker
    shared: SharedBaseline | None


def run(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    words: Sequence[str] = (),
    again: str = "",
    sweep: bool = False,
    began: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Decode as the settings say, print the table and return the summary; with `folder`, where it
    is, and `done_already`, if nothing was left to do.

    Args:
        out: the folder of this run, or that of the sweep in which it has its own, named by what it
            is.
        words: what was typed, which is what trackers call the run; its drafter if there are none.
        again: the command that continues it, to be told when it is interrupted; none in a sweep.
        sweep: whether it is one of several.
        began: is told the folder that is this run's from now on.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """
    settings, out = continued(settings, words, out)
    source = target_of(settings)
    if here().size == 1 and source.tp > 1:
        checked = check_settings(settings, Console(quiet=True))
        began(checked.place(out, sweep=sweep))
        cpu = checked.placement.device.type == "cpu"
        size, wait = source.tp, source.tp_wait
        task = Task(settings, str(out), list(words), again, sweep, size=size, wait=wait, cpu=cpu)
        return started(task)
    begun = partial(opened, words=words, again=again, sweep=sweep, began=began)
    with begun(settings, out, console) as job:
        folder = job.folder
        if job.experiment is None:
            summary = dict(folder.summary or {}, done_already=True)
            tell(console, f"done already: {folder.path}")
        else:
            summary = job.experiment.run(folder, job.tracker, Live(console), job.shared)
    show_summary(summary, console)
    tell(console, f"results in {folder.path}")
    return {**summary, "folder": str(folder.path)}


@contextmanager
def opened(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    words: Sequence[str] = (),
    again: str = "",
    sweep: bool = False,
    began: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Opened]:
    """A run whose settings are checked, whose folder is open and whose models are loaded, as far
    as there is anything to do. Arguments as of `run`.

    Raises:
        ValueError: a setting that cannot be used, before a model is loaded where that is possible.
    """
    checked = check_settings(settings, console)
    # Whether plain decoding can be shared is decided by the clock.
    sharing = sweep and checked.general.baseline and here().size == 1
    method = checked.method
    folder = checked.folder(out, sweep=sweep)
    with folder:
        began(folder.path)
        chosen = NoTracker() if here().rank else tracker_of(settings)
        tracker = Careful(chosen, partial(tell, console))
        if folder.summary is not None:
            yield Opened(folder=folder, experiment=None, tracker=tracker, shared=None)
            return
        for line in without_effect(settings, method, checked.placement.kernels.impl, words):
            tell(console, line)
        try:
            with in_memory(SMALLER):
                experiment = experiment_of(checked, console)
            folder.identify(experiment.resolved)
            shown = {**settings, "resolved": experiment.resolved}
            tracker.start(tracked_run(folder.path, shown, method.marks, words))
            shared = SharedBaseline(out, checked.identity) if sharing else None
            yield Opened(folder=folder, experiment=experiment, tracker=tracker, shared=shared)
        except KeyboardInterrupt:
            said = f"interrupted: {folder.finished} finished texts are in {folder.path}"
            tell(console, said + f"; this continues: {again}" * bool(again and folder.resumable))
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What settings describe, as far as that needs no model.

    Args:
        path: of the target.
        asked: prompts, how often and in which form.
    """

    settings: Settings
    general: General
    placement: Placement
    method: Method
    source: Source
    record: RecordSettings
    asked: dict[str, Any]
    identity: Identity

    def place(self, out: Path, *, sweep: bool) -> Path:
        """Of the run's folder; in that of a sweep it is named by what it is."""
        method = self.method
        name = f"{method.drafter_name}-{method.tree_name}-{self.identity.method[:8]}"
        return out / name if sweep else out

    def folder(self, out: Path, *, sweep: bool) -> RunFolder:
        """That of the run; of a rank but the first one of its own."""
        prompts = self.asked["prompts"]
        return RunFolder(
            own_folder(self.place(out, sweep=sweep)),
            config=self.settings,
            resume=self.general.resume,
            identity=self.identity,
            texts={one.index: len(one.turns) * self.asked["samples"] for one in prompts},
            job=sweep,
        )


def check_settings(settings: Settings, console: Console) -> Checked:
    general, placement = general_of(settings), placement_of(settings)
    method, source = method_of(settings), target_of(settings)
    check_together(settings, source.tp, source.path, placement)
    asked = _asked(settings, method.sampling, console)
    check_whole(source.path, "target.path")
    method.drafter.find()
    return Checked(
        settings=settings,
        general=general,
        placement=placement,
        method=method,
        source=source,
        record=record_of(settings),
        asked=asked,
        identity=identity_of(settings, asked["prompts"], placement, share=shares_pages(settings)),
    )


def continued(settings: Settings, words: Sequence[str], out: Path) -> tuple[Settings, Path]:
    """The settings and the folder of a run, which are those of the folder that `resume` names.

    Raises:
        ValueError: there is no such folder, or words stand beside it that would change the run.
    """
    resume = settings.get("resume")
    if not isinstance(resume, str) or resume == "auto":
        return settings, out
    folder = Path(resume).expanduser()
    if (folder / "multirun.yaml").is_file():
        raise ValueError(
            f"resume={resume}: is the folder of a sweep; repeat its words with out={resume}, and "
            f"what is finished is skipped"
        )
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"resume={resume}: must be true, false, auto or the folder of a run")
    stored = read_config(folder / "config.yaml")
    for word in words:
        name = word.partition("=")[0].lstrip("+")
        if name != "resume" and name.split(".")[0] != "tracker" and name not in GROWING:
            raise ValueError(
                f"{word}: cannot stand beside resume={resume}, which has settings of its own; "
                f"leave it out, or choose another folder with out="
            )
        if name in GROWING:
            stored["prompts"][name.split(".")[1]] = settings["prompts"][name.split(".")[1]]
    stored = {name: v for name, v in stored.items() if name not in ("schema", "resolved")}
    if any(word.startswith("tracker") for word in words):
        stored["tracker"] = settings["tracker"]
    return {**stored, "resume": True, "out": str(folder)}, folder.absolute()


def experiment_of(checked: Checked, console: Console) -> Experiment:
    """With the models loaded."""
    settings, general, source = checked.settings, checked.general, checked.source
    method, asked = checked.method, dict(checked.asked)
    models = _models(source, checked.placement)
    target = source.load(models)
    fit = fitted(
        asked.pop("prompts"),
        target.tokenizer,
        context=target.max_context,
        max_new_tokens=general.max_new_tokens,
        chat=asked["chat"],
        too_long=asked.pop("too_long"),
    )
    if fit.told:
        tell(console, fit.told)
    method.load(target, models)
    for model in (target, method.drafter.own_model):
        for note in [] if model is None else model.notes:
            tell(console, note)
    if method.drafter.reads_states and cache_of(settings).share is None:
        mend = "; with cache.share=true they do" if method.drafter.page_successors else ""
        tell(
            console,
            f"cache.share: {method.drafter_name} reads hidden states of whole prompts, so prompts "
            f"share no pages, neither here nor in plain decoding{mend}",
        )
    return Experiment(
        target=target,
        method=method,
        baseline=baseline_of(settings) if general.baseline else None,
        cache=cache_of(settings),
        max_new_tokens=general.max_new_tokens,
        batch_size=general.batch_size,
        stop_tokens=stop_tokens(target, ignore_eos=general.ignore_eos),
        stop_strings=general.stop_strings,
        label=source.path,
        record=checked.record,
        prompts=fit.prompts,
        too_long={"skipped": fit.skipped, "truncated": fit.truncated},
        **asked,
    )


def forget_models() -> None:
    """Give up those that are kept for the next run of this process."""
    _kept.clear()


def _models(target: Source, placement: Placement) -> Models:
    """Those of the last run of this process, if it had the same target at the same place: the jobs
    of a sweep load it once."""
    if not _kept or (_kept[0][0], _kept[0][1].placement) != (target, placement):
        _kept.clear()  # before others take their memory
        _kept.append((target, Models(placement)))
    return _kept[0][1]


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
        tell(console, said)
    return {"prompts": prompts, "samples": samples, "chat": chat, "too_long": too_long}
