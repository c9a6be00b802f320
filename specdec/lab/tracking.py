"""Trackers: where the figures of a run go besides its folder. The only file that imports wandb."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from specdec.flight import Step

Record = Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """Follows one run from `start` to `finish`."""

    def start(self, *, config: Record, folder: Path, group: str | None, name: str) -> None: ...
    def step(self, step: Step) -> None: ...
    def finish(self, summary: Record, generations: Sequence[Record]) -> None: ...


class NoTracker:
    """tracker=none: the run folder is all there is."""

    def start(self, *, config: Record, folder: Path, group: str | None, name: str) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def finish(self, summary: Record, generations: Sequence[Record]) -> None:
        pass


class Careful:
    """A tracker whose faults cost no run anything: the first is told in one line, and then it is
    left alone.

    Args:
        tell: what to do with that line.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        self._tracker, self._tell = tracker, tell

    def start(self, *, config: Record, folder: Path, group: str | None, name: str) -> None:
        with self._careful():
            self._tracker.start(config=config, folder=folder, group=group, name=name)

    def step(self, step: Step) -> None:
        with self._careful():
            self._tracker.step(step)

    def finish(self, summary: Record, generations: Sequence[Record]) -> None:
        with self._careful():
            self._tracker.finish(summary, generations)

    @contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = type(self._tracker).__name__
            self._tracker = NoTracker()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._tell(f"{name} failed, {reason}; the run goes on without it")
            if "wandb" in sys.modules:
                import wandb

                with suppress(Exception):  # its dead process would be told of at the end
                    wandb.teardown(1)


class WandbTracker:
    """tracker=wandb: config, metrics by step, summary, a table of generations, acceptance by
    depth.

    Online when the user is logged in, else offline, without a question; WANDB_MODE has the last
    word.

    Args:
        project, entity: where the run goes.
        mode: auto, online, offline or disabled.
        every: steps that are averaged into one logged point.

    Raises:
        ValueError: a setting out of range.
    """

    MODES = ("auto", "online", "offline", "disabled")

    def __init__(
        self,
        *,
        project: str = "specdec",
        entity: str | None = None,
        mode: str = "auto",
        every: int = 10,
    ) -> None:
        for name, value in {"project": project, "entity": entity}.items():
            if value is not None and not re.fullmatch(r"[^/\\#?%:]{1,128}", value):
                raise ValueError(
                    f"tracker.{name}={value}: must be 1 to 128 characters, without / \\ # ? % :"
                )
        if mode not in self.MODES:
            raise ValueError(f"tracker.mode={mode}: must be one of {', '.join(self.MODES)}")
        if every < 1:
            raise ValueError(f"tracker.every={every}: must be at least 1")
        self.project, self.entity, self.mode, self.every = project, entity, mode, every
        self._run: Any = None
        self._pending: list[Step] = []
        self._steps = 0

    def start(self, *, config: Record, folder: Path, group: str | None, name: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", self.mode)
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        options: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": group,
            "name": name,
            "config": dict(config),
            "dir": str(folder),
            "settings": wandb.Settings(silent=True, init_timeout=30, console="off"),
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError):
            # Results must not depend on a network; an offline run can be synced later.
            self._run = wandb.init(mode="offline", **options)

    def step(self, step: Step) -> None:
        self._pending.append(step)
        self._steps += 1
        if len(self._pending) == self.every:
            self._log_pending()

    def finish(self, summary: Record, generations: Sequence[Record]) -> None:
        import wandb

        self._log_pending()
        columns = (
            "prompt",
            "turn",
            "category",
            "tokens",
            "accepted_length",
            "finish_reason",
            "text",
        )
        rows = [[generation[column] for column in columns] for generation in generations]
        self._run.log({"generations": wandb.Table(columns=list(columns), data=rows)})
        by_depth = [[d + 1, rate] for d, rate in enumerate(summary["acceptance_by_depth"])]
        table = wandb.Table(columns=["depth", "acceptance"], data=by_depth)
        chart = wandb.plot.bar(table, "depth", "acceptance", title="Acceptance by depth")
        self._run.log({"acceptance_by_depth": chart})
        self._run.summary.update(_flat(summary))
        self._run.finish()

    def _log_pending(self) -> None:
        if not self._pending:
            return
        count, rows = len(self._pending), sum(len(step.requests) for step in self._pending)
        point: dict[str, float] = {"step/batch": rows / count}
        if rows:  # the last step may have run for sequences that had already ended
            tokens = sum(sum(step.tokens) for step in self._pending)
            point["step/accepted_length"] = tokens / rows
            point["step/nodes"] = sum(sum(step.nodes) for step in self._pending) / rows
        for step in self._pending:
            for verb, seconds in step.seconds.items():
                point[f"time/{verb}_ms"] = (
                    point.get(f"time/{verb}_ms", 0.0) + seconds * 1e3 / count
                )
        self._run.log(point, step=self._steps)
        self._pending = []


def _flat(record: Record, prefix: str = "") -> dict[str, Any]:
    """Nested dicts with their keys joined by slashes, as the charts of wandb want them."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
