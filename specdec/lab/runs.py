"""RunFolder: what a run leaves on disk, written as it goes, so that an interrupted run can
continue.

generations.jsonl   one line for each decoded prompt (for each turn of a conversation)
steps.jsonl         one line for each step
baseline/           the same two files for plain decoding
config.yaml         every setting, resolved
summary.json        the figures
error.txt           the traceback, if the drafter failed
"""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from specdec.lab.records import Record, RecordFile, replace_file, to_json

SCHEMA = 1  # of these files, as docs/outputs.md has them


class Side:
    """The records of one decoder: `generations` and `steps`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generations = RecordFile(folder / "generations.jsonl")
        self.steps = RecordFile(folder / "steps.jsonl")

    def begin(self) -> None:
        """Forget steps of prompts that have no generation yet; those are decoded again from the
        start.

        A step it shares with finished prompts keeps its whole time: it was spent on those as well.
        Its lists are by request.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = {generation["request"] for generation in self.generations.records}
        kept = []
        for step in self.steps.records:
            requests = step["requests"]
            places = [i for i, request in enumerate(requests) if request in done]
            if places:
                lists = {
                    name: [values[i] for i in places]
                    for name, values in step.items()
                    if isinstance(values, list) and len(values) == len(requests)
                }
                kept.append({**step, **lists})
        self.generations.rewrite(self.generations.records)
        self.steps.rewrite(kept)

    def close(self) -> None:
        self.generations.close()
        self.steps.close()


class RunFolder:
    """The output folder of a run.

    Args:
        path: made if missing.
        config: every setting of the run, resolved.
        resume: continue what the folder holds.
        volatile: settings that may differ between a run and its resumption.

    Raises:
        ValueError: the folder holds another run's results, or `resume` finds other settings.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        resume: bool,
        volatile: frozenset[str] = frozenset(),
    ) -> None:
        self.path = path
        self._config = dict(config)
        self.main = Side(path)
        self.baseline = Side(path / "baseline") if config.get("baseline") else None
        self.sides = [side for side in (self.main, self.baseline) if side is not None]
        if not any(side.generations.records for side in self.sides):
            return
        if not resume:
            raise ValueError(
                f"out={path}: holds results already; "
                f"resume=true continues them, or choose another folder"
            )
        before = yaml.safe_load((path / "config.yaml").read_text())
        settings = sorted({*before, *config} - volatile - {"schema"})
        changed = [name for name in settings if before.get(name) != config.get(name)]
        if changed:
            raise ValueError(
                f"resume=true: {', '.join(changed)} differ from the run in out={path}; "
                f"use the same settings, or choose another folder"
            )

    @property
    def finished(self) -> int:
        """Texts."""
        return sum(len(side.generations.records) for side in self.sides)

    def begin(self) -> None:
        """Write the settings, and forget what an interrupted run left half done."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(
            self.path / "config.yaml",
            yaml.safe_dump({"schema": SCHEMA, **self._config}, sort_keys=False),
        )
        (self.path / "error.txt").unlink(missing_ok=True)
        for side in self.sides:
            side.begin()

    def write_error(self, error: Exception) -> Path:
        """The file that holds its traceback from now on."""
        path = self.path / "error.txt"
        replace_file(path, "".join(traceback.format_exception(error)))
        return path

    def write_summary(self, summary: Record) -> None:
        replace_file(self.path / "summary.json", to_json(summary, indent=1) + "\n")

    def close(self) -> None:
        for side in self.sides:
            side.close()
