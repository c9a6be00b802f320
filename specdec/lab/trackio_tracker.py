"""trackio: a tracker that keeps its runs on this machine, or in a Space of Hugging Face. The only
file that imports it."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specdec.flight import Step
from specdec.lab.curves import Curves, Table, texts
from specdec.lab.tracking import Record, TrackedRun


class TrackioTracker:
    """tracker=trackio: config, curves, figures, a table of texts. TRACKIO_DIR, TRACKIO_SPACE_ID
    and its other variables are honoured.

    Args:
        project: where the run goes.
        group, name: null is the sweep, and the words of the command.
        tags: beside those of target, drafter, tree, acceptance, temperature, batch and experiment;
            part of the config, as trackio has none.
        every: steps that are averaged into one point.

    Raises:
        ValueError: a setting out of range, or trackio is not installed.
    """

    def __init__(
        self,
        *,
        project: str = "specdec",
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        every: int = 10,
    ) -> None:
        for setting, value in (("project", project), ("group", group), ("name", name)):
            if value == "":
                raise ValueError(f"tracker.{setting}=: must not be empty")
        if find_spec("trackio") is None:
            raise ValueError(
                "tracker=trackio: is not installed; pip install 'specdec-lab[trackio]', or use "
                "tracker=none"
            )
        self.project, self.group, self.name, self.tags = project, group, name, list(tags)
        self._curves = Curves(every)
        self._run: Any = None

    def start(self, run: TrackedRun) -> None:
        trackio = _trackio()
        # Runs are told apart, and found again, by their names.
        name = f"{self.name or run.name} {run.id[:6]}"
        self._run = trackio.init(
            project=self.project,
            name=name,
            group=self.group or run.group,
            config={**run.config, "tags": [*run.tags, *self.tags], "job_type": run.job_type},
            resume="allow",
            embed=False,
            auto_log_gpu=False,  # it would be at work while steps are measured
            auto_log_cpu=False,
        )
        self._curves.known = self._run._next_step - 1

    def step(self, step: Step) -> None:
        self._log(self._curves.add(step))

    def finish(self, summary: Record, generations: Sequence[Record]) -> str | None:
        self._log(self._curves.rest())
        shown = {**self._curves.figures(summary), "generations": _table(texts(generations))}
        self._run.log(shown, step=summary["steps"])
        return self._end()

    def compare(
        self, run: TrackedRun, tables: Mapping[str, Table], files: Sequence[Path]
    ) -> str | None:
        trackio = _trackio()
        self.start(run)
        shown: dict[str, Any] = {f"compare/{name}": _table(one) for name, one in tables.items()}
        artifact = trackio.Artifact(f"report-{run.id}", type="report")
        for file in files:
            artifact.add_file(str(file))
            if file.suffix == ".html":
                shown["compare/report"] = trackio.Html(file, inject=False)
        self._run.log(shown)
        self._run.log_artifact(artifact)
        return self._end()

    def point(self, point: Mapping[str, float]) -> None:
        if point["steps"] > self._curves.known:
            self._log(point)

    def close(self, figures: Record) -> str | None:
        self._run.log(dict(figures), step=int(figures["steps"]))
        return self._end()

    def _log(self, point: Mapping[str, float] | None) -> None:
        if point is not None:
            self._run.log(dict(point), step=int(point["steps"]))

    def _end(self) -> str:
        self._run.finish()
        return f"trackio: {shlex.join(['trackio', 'show', '--project', self.project])} shows it"

    def abandon(self) -> None:
        pass  # its threads end with the process


def _trackio() -> Any:
    """The module, without what it prints."""
    import trackio
    from trackio import run, utils

    for module in (trackio, run, utils):
        vars(module)["print"] = lambda *_, **__: None
    return trackio


def _table(table: Table) -> Any:
    columns, rows = table
    return _trackio().Table(columns=list(columns), data=[list(row) for row in rows])
