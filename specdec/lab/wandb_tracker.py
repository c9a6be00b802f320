"""Weights & Biases. The only file that imports wandb."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specdec.flight import Step
from specdec.lab.curves import Curves, Table, texts
from specdec.lab.tracking import Record, TrackedRun

# By the axis they are drawn over, and what the summary has of them.
AXES = {"step/*": ("steps", "mean"), "time/*": ("steps", "mean"), "so_far/*": ("tokens", "last")}
INIT, FINISH = 12, 30  # seconds


class WandbTracker:
    """tracker=wandb: config, curves, figures, a table of texts, acceptance by depth.

    Online when the user is logged in, else offline, without a question. Settings go before
    variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_RUN_GROUP, WANDB_NAME, WANDB_TAGS,
    WANDB_JOB_TYPE, WANDB_RUN_ID of a run by itself, WANDB_RESUME, WANDB_DIR), and variables
    before what would be taken otherwise.

    Args:
        project, entity: where the run goes; null is specdec, and the account's own.
        mode: auto, online, offline or disabled.
        group, name: null is the sweep, and the words of the command.
        tags: beside those of target, drafter, tree, acceptance, temperature, batch and experiment.
        every: steps that are averaged into one point.

    Raises:
        ValueError: a setting out of range.
    """

    MODES = ("auto", "online", "offline", "disabled")

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        mode: str = "auto",
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        every: int = 10,
    ) -> None:
        for setting, value in {"project": project, "entity": entity}.items():
            if value is not None and not re.fullmatch(r"[^/\\#?%:]{1,128}", value):
                raise ValueError(
                    f"tracker.{setting}={value}: must be 1 to 128 characters, without / \\ # ? % :"
                )
        for setting, value, most in (("group", group, 128), ("name", name, 128)):
            if value is not None and not 1 <= len(value) <= most:
                raise ValueError(f"tracker.{setting}={value}: must be 1 to {most} characters")
        for tag in tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"tracker.tags={tag}: each must be 1 to 64 characters")
        if mode not in self.MODES:
            raise ValueError(f"tracker.mode={mode}: must be one of {', '.join(self.MODES)}")
        self.project, self.entity, self.mode = project, entity, mode
        self.group, self.name, self.tags = group, name, list(tags)
        self._curves = Curves(every)
        self._run: Any = None

    def start(self, run: TrackedRun) -> None:
        with _hooks_kept():
            self._start(run)

    def _start(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = _or("WANDB_MODE", None if self.mode == "auto" else self.mode, "auto")
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        options = self._options(run)
        try:
            self._run = wandb.init(mode=mode, **options)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError):
            # Results must not depend on a network; an offline run can be synced later.
            wandb.teardown(1)  # which still has a run of that id
            self._run = wandb.init(mode="offline", **options)
        axes = {"*": ("steps", "last")} if run.job_type == "training" else AXES
        for name, (axis, summary) in axes.items():
            self._run.define_metric(name, step_metric=axis, summary=summary)
        if self._run.resumed:
            self._curves.known = int(self._run.summary.get("steps") or 0)

    def _options(self, run: TrackedRun) -> dict[str, Any]:
        import wandb

        own = os.environ.get("WANDB_TAGS", "")
        tags = self.tags or [tag for tag in own.split(",") if tag]
        id_ = None if run.group or run.job_type != "run" else os.environ.get("WANDB_RUN_ID")
        return {
            "project": _or("WANDB_PROJECT", self.project, "specdec"),
            "entity": _or("WANDB_ENTITY", self.entity, None),
            "group": _or("WANDB_RUN_GROUP", self.group, run.group),
            "name": _or("WANDB_NAME", self.name, run.name),
            "job_type": _or("WANDB_JOB_TYPE", None, run.job_type),
            "tags": list(dict.fromkeys([*run.tags, *tags])),
            "config": dict(run.config),
            "dir": _or("WANDB_DIR", None, str(run.folder)),
            "id": id_ or run.id,
            "resume": _or("WANDB_RESUME", None, "allow"),
            "settings": wandb.Settings(
                silent=True,
                console="off",
                reinit="create_new",  # the user may have a run of their own
                init_timeout=INIT,
                finish_timeout=FINISH,
                finish_timeout_raises=True,
            ),
        }

    def step(self, step: Step) -> None:
        point = self._curves.add(step)
        if point is not None:
            self._run.log(point)

    def finish(self, summary: Record, generations: Sequence[Record]) -> str | None:
        import wandb

        point = self._curves.rest()
        if point is not None:
            self._run.log(point)
        self._run.summary.update(self._curves.figures(summary))
        by_depth = [[d, rate] for d, rate in enumerate(summary["acceptance_by_depth"], start=1)]
        table = wandb.Table(columns=["depth", "acceptance"], data=by_depth)
        chart = wandb.plot.bar(table, "depth", "acceptance", title="Acceptance by depth")
        shown = {"generations": _table(texts(generations)), "acceptance/by_depth": chart}
        return self._last(lambda: self._run.log(shown))

    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None:
        import wandb

        self.start(run)
        shown: dict[str, Any] = {f"compare/{name}": _table(one) for name, one in tables.items()}
        artifact = wandb.Artifact(f"report-{run.id}", type="report")
        for file in files:
            artifact.add_file(str(file))
            if file.suffix == ".html":
                shown["compare/report"] = wandb.Html(file.read_text(), inject=False)

        def show() -> None:
            self._run.log(shown)
            self._run.log_artifact(artifact)

        return self._last(show)

    def point(self, point: Mapping[str, float]) -> None:
        if point["steps"] > self._curves.known:
            self._run.log(dict(point))

    def close(self, figures: Record) -> str | None:
        return self._last(lambda: self._run.summary.update(dict(figures)))

    def _last(self, work: Callable[[], Any]) -> str | None:
        """Finish the run, whatever becomes of that work; where it is."""
        url, place = self._run.url, self._run.settings.sync_dir
        mode = self._run.settings.mode
        try:
            work()
        finally:
            self._run.finish()
        if mode == "offline":
            return f"wandb: {shlex.join(['wandb', 'sync', str(place)])} sends it"
        return f"wandb: {url}" if url else None

    def abandon(self) -> None:
        """End wandb's process, for whose end Python would wait."""
        import wandb

        with suppress(Exception):  # there is no public way
            wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]
        wandb.teardown(1)


@contextmanager
def _hooks_kept() -> Iterator[None]:
    """wandb puts functions of its own in the place of these, to learn how the process ends; how a
    run ends it is told."""
    before = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = before


def _table(table: Table) -> Any:
    import wandb

    columns, rows = table
    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _or(variable: str, setting: str | None, default: str | None) -> str | None:
    """The setting, else the variable of the environment, else the default."""
    return setting if setting is not None else os.environ.get(variable) or default
