"""One training: from settings to a head in a folder."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from specdec.heads.formats import check_whole
from specdec.lab.build import Settings
from specdec.lab.environment import describe_environment
from specdec.lab.experiment import stop_tokens
from specdec.lab.files import replace_file, to_json
from specdec.lab.lines import tell
from specdec.lab.lock import Lock
from specdec.lab.setup import target_of, tracker_of
from specdec.lab.tracked import tracked_training
from specdec.lab.tracking import Careful
from specdec.lab.values import flat
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.training.batches import EXTRA, Batch, Batches, OwnRows
from specdec.training.checkpoint import STATE
from specdec.training.corpus import MANIFEST, Corpus, Encoding, Ids, corpus_of, slow_words
from specdec.training.course import HEAD, Budget, Course, Progress
from specdec.training.optimise import Optimisers
from specdec.training.own_text import OwnText
from specdec.training.settings import Plan, method_of_training, parts_of, plan_of
from specdec.training.show import Bar
from specdec.training.teacher import Teacher, plain
from specdec.training.texts import files_of
from specdec.training.trainee import Surroundings

RESULT = "training.json"
# What a training may be continued with in other ways than it was begun.
FREE = ("out", "resume", "tracker", "choices", "device", "compile", "measure.every")


def train(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    words: Sequence[str] = (),
    again: str = "",
) -> dict[str, Any]:
    """Train as the settings say, and return what training.json holds.

    Args:
        out: the folder of the training.
        words: what was typed.
        again: the command that continues it, to be told when it is interrupted.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """
    job = Job(settings, out, console)
    lock = Lock(out / "lock", f"out={out}")
    try:
        return job.run(words)
    except KeyboardInterrupt:
        tell(console, "interrupted" + f"; this continues: {again}" * bool(again))
        raise
    finally:
        lock.release()


def _resumes(plan: Plan, out: Path) -> bool:
    """Whether there is a training to be continued.

    Raises:
        ValueError: there is one, or none, where `resume` says otherwise.
    """
    there = (out / STATE).exists()
    if there and plan.resume is False:
        raise ValueError(
            f"out={out}: holds a training already; resume=true continues it, or choose another"
        )
    if not there and plan.resume is True and not (out / "data").exists():
        raise ValueError(f"resume=true: there is no training to continue in out={out}")
    return there


class Job:
    """A training whose settings are checked, as far as that needs no model.

    Raises:
        ValueError: as `train`.
    """

    def __init__(self, settings: Settings, out: Path, console: Console) -> None:
        self.settings, self.out, self.console = settings, out, console
        self.plan, self.method = plan_of(settings), method_of_training(settings)
        self.corpus_settings, self.own_settings, self.measure = parts_of(settings)
        self.tracker = Careful(tracker_of(settings), partial(tell, console))
        self.placement = Placement.named(device=self.plan.device, dtype=self.plan.dtype)
        self.source = target_of(settings)
        self.path = self.source.path
        check_whole(self.path, "target.path")
        for source in self.plan.sources:
            files_of(source)
        self.folder = Path(self.corpus_settings.folder or out / "data").expanduser()
        self.target: PagedLM  # once it is loaded, with its device and how many sequences fit it
        self.device: torch.device
        self.size: int

    def run(self, words: Sequence[str]) -> dict[str, Any]:
        """Texts first, then the training."""
        resumes = _resumes(self.plan, self.out)
        self.target = self.source.load(Models(self.placement))
        self.method.check(self.target)
        self.device = self.target.device
        self.size = self.plan.batch or (128 if self.device.type == "cuda" else 4)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        corpus = self._corpus()
        held_own, own = self._own(corpus)
        with plain(self.target.model) as model:
            course = self._course(model, corpus, held_own, own)
            if resumes:
                course.resume()
            self.tracker.start(tracked_training(self.out, self.settings, words))
            with Bar(self.console, course.progress, course.budget) as bar:
                course.told = partial(_shown, bar, self.tracker)
                try:
                    progress = course.run()
                except BaseException:
                    self.tracker.abandon()
                    raise
        result = self._result(progress, corpus, own)
        replace_file(self.out / RESULT, to_json(result, indent=1) + "\n")
        self._end(progress)
        self.tracker.close(_figures(progress))
        return result

    def _corpus(self) -> Corpus:
        ends = stop_tokens(self.target, ignore_eos=False)
        ids = self.target.tokenizer.eos_token_id
        if not (self.folder / MANIFEST).exists() and (slow := slow_words()):
            tell(self.console, slow)
        corpus = corpus_of(
            self.plan.sources,
            self.corpus_settings,
            Encoding(
                tokenizer=self.target.tokenizer,
                end=ids if ids is not None else next(iter(ends), None),
                vocab=self.target.vocab_size,
            ),
            self.folder,
            width=self.plan.length + EXTRA,
            seed=self.plan.seed,
        )
        counts = corpus.manifest["counts"]
        tell(
            self.console,
            f"corpus: {counts['texts']:,} texts, {counts['trained']:,} tokens to train on, "
            f"{counts['held_out']:,} held out; left out {counts['repeated']:,} repeated, "
            f"{counts['shared']:,} that share words with texts for evaluation",
        )
        if counts["held_out"] > counts["trained"]:
            asked = self.corpus_settings.held_out
            said = f"corpus.held_out={asked}: leaves less to train on than is held out"
            tell(self.console, f"{said}; give more texts, or lower it")
        return corpus

    def _own(self, corpus: Corpus) -> tuple[OwnRows | None, OwnRows | None]:
        """Own text, held out and to be trained on."""
        if not self.own_settings.share:
            return None, None
        text = OwnText(
            corpus,
            self.target,
            self.own_settings,
            self.folder,
            slots=self.plan.length,
            held_out=self.corpus_settings.held_out,
            seed=self.plan.seed,
        )
        with Bar(self.console, None, None, title="own text") as bar:
            text.write(bar.share)
        held, own = text.read()
        tell(self.console, f"own text: {len(held.rows):,} held out, {len(own.rows):,} others")
        return held, own

    def _course(
        self, model: Any, corpus: Corpus, held_own: OwnRows | None, own: OwnRows | None
    ) -> Course:
        plan = self.plan
        compiled = self.device.type == "cuda" if plan.compile == "auto" else bool(plan.compile)
        surroundings = Surroundings(
            target=self.target,
            counts=_counts(corpus, own, self.target.vocab_size),
            chunk=plan.chunk,
            compiled=compiled,
            seed=plan.seed,
        )
        trainee = self.method.make(surroundings)
        return Course(
            trainee,
            None if trainee.is_target else Teacher(model, trainee.taps),
            Batches(
                corpus,
                own,
                slots=plan.length,
                size=self.size,
                share=self.own_settings.share,
                seed=plan.seed,
            ),
            self._held_out(corpus, held_own),
            Optimisers(trainee, self.method),
            budget=Budget(
                seconds=None if plan.minutes is None else 60 * plan.minutes,
                tokens=None if plan.tokens is None else int(plan.tokens),
            ),
            measure=self.measure,
            folder=self.out,
            settings=fixed(self.settings),
            device=self.device,
            target_name=self.path,
        )

    def _held_out(self, corpus: Corpus, own: OwnRows | None) -> dict[str, list[Batch]]:
        rows = corpus.held_out_rows(self.plan.length + EXTRA)
        masks = np.ones((len(rows), self.plan.length), bool)
        found = {"corpus": _batches(rows, masks, self.size)}
        if own is not None and len(own.rows):
            found["own"] = _batches(*own.batch(np.arange(len(own.rows))), self.size)
        return found

    def _result(self, progress: Progress, corpus: Corpus, own: OwnRows | None) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "steps": progress.steps,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": _figures(progress)["tokens_per_second"],
            "corpus": corpus.manifest["counts"],
            "own_texts": 0 if own is None else len(own.rows),
            "best": progress.best,
            "curve": progress.curve,
            **describe_environment(self.device),
        }

    def _end(self, progress: Progress) -> None:
        best = progress.best
        said = [
            f"{kind} {best[f'{kind}/greedy']:.2f} greedy, {best[f'{kind}/sampled']:.2f} sampled"
            for kind in ("corpus", "own")
            if f"{kind}/greedy" in best
        ]
        first = next(point for point in progress.curve if "score" in point)
        said += [
            f"{kind} text {first[name]:.3f} nats a token before, {best[name]:.3f} now"
            for kind in ("corpus", "own")
            if (name := f"{kind}/nats") in best
        ]
        tell(
            self.console,
            f"{progress.tokens:,} tokens in {progress.seconds:.0f} s; best after "
            f"{best['tokens']:,}, accepted length on held out text: {'; '.join(said)}",
        )
        head = str(self.out / HEAD)
        words = self.method.using(head, self.path, self.target.model.config)
        using = shlex.join(["python", "-m", "specdec.run", *words])
        tell(self.console, f"head in {head}; this uses it: {using}")


def fixed(settings: Settings) -> dict[str, Any]:
    """Those that a training must keep when it is continued, by full name."""

    return {
        name: value
        for name, value in flat(settings).items()
        if name not in FREE and name.split(".")[0] not in FREE
    }


def _shown(bar: Bar, tracker: Careful, point: dict[str, Any]) -> None:
    """Show a point of the curve to whoever looks."""
    bar.point(point)
    tracker.point({name: value for name, value in point.items() if not isinstance(value, list)})


def _figures(progress: Progress) -> dict[str, float]:
    """What a training came to, as numbers that can be compared."""
    best = {f"best/{name}": value for name, value in progress.best.items()}
    whole = {"steps": progress.steps, "tokens": progress.tokens, "seconds": progress.seconds}
    found = {**whole, "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9), **best}
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def _batches(rows: Ids, masks: Ids, size: int) -> list[Batch]:
    """In parts of equal size, or nearly so."""
    parts = -(-len(rows) // size)
    return [
        Batch(tokens=torch.from_numpy(some.astype(np.int64)), mask=torch.from_numpy(marks))
        for some, marks in zip(
            np.array_split(rows, parts), np.array_split(masks, parts), strict=True
        )
    ]


def _counts(corpus: Corpus, own: OwnRows | None, vocab: int) -> Tensor:
    """[V], how often each token occurs in what is trained on."""
    counts = np.bincount(corpus.tokens, minlength=vocab)
    if own is not None:
        places = np.arange(own.rows.shape[1])
        written = (places >= own.spans[:, :1]) & (places < own.spans[:, 1:])
        counts = counts + np.bincount(np.asarray(own.rows)[written], minlength=vocab)
    return torch.from_numpy(counts)
