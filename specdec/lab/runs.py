"""RunFolder: what a run leaves on disk, written as it goes, so that an interrupted run can
continue.

generations.jsonl   one line for each decoded prompt (for each turn of a conversation)
steps.jsonl         one line for each step
trees.jsonl         one line for each tree that is recorded
baseline/           the same two files for plain decoding
config.yaml         every setting, resolved
summary.json        the figures
error.txt           the traceback, if the drafter failed
tracking.json       by what trackers know the run
lock                who works there, as long as it does
"""

import os
import shutil
import traceback
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import yaml

from specdec.lab.files import replace_file, to_json, writing
from specdec.lab.lock import Lock
from specdec.lab.records import GENERATIONS, STEPS, TRACKING, TREES, Record, RecordFile

SCHEMA = 1  # of these files, as docs/outputs.md has them
CONFIG, ERROR = "config.yaml", "error.txt"
FACTS = ("resolved", "contents")
OWN = (
    *(CONFIG, "generations.jsonl", "steps.jsonl", "trees.jsonl"),
    *("baseline", "summary.json", "wandb", TRACKING),
)


class Side:
    """The records of one decoder: `generations`, `steps`, and `trees`, of which there is a file if
    some are recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generations = RecordFile(folder / "generations.jsonl", GENERATIONS)
        self.steps = RecordFile(folder / "steps.jsonl", STEPS)
        self.trees = RecordFile(
            folder / "trees.jsonl", TREES, lost="its tree is missing then", kept=False
        )
        self.files = self.generations, self.steps

    def read(self) -> list[str]:
        """Take over what was finished; returns what became of records that cannot stay.

        A text counts once, if all its steps are there, and all turns before it.
        """
        for file in (*self.files, self.trees):
            file.read()
        lengths: dict[int, list[int]] = defaultdict(list)
        for step in self.steps.records:
            for request, tokens in zip(step["requests"], step["tokens"], strict=True):
                lengths[request].append(tokens)
        found, kept, turns = self.generations.records, dict[int, Record](), set()
        for record in found:
            request, turn = record["request"], record["turn"]
            conversation = record["prompt"], record["sample"]
            whole = lengths[request] == record.get("accepted_lengths", [])
            if whole and request not in kept and (not turn or (conversation, turn - 1) in turns):
                kept[request] = record
                turns.add((conversation, turn))
        lost = {record["request"] for record in found} - kept.keys()
        twice = sum(record["request"] in kept for record in found) - len(kept)
        self.generations.records = list(kept.values())
        said = {
            "without all their steps and turns are decoded again": len(lost),
            "that came twice count once": twice,
        }
        where = self.generations.path
        return [f"{count} texts of {where} {what}" for what, count in said.items() if count]

    def begin(self) -> None:
        """Forget steps of prompts that have no generation yet; those are decoded again from the
        start.

        A step it shares with finished prompts keeps the share of its time that those have in its
        sequences: what it did for the others is done again, and timed then. Its lists are by
        request.
        """
        with writing(self.folder):
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
                share = len(places) / len(requests)
                times = {verb: seconds * share for verb, seconds in step["seconds"].items()}
                kept.append({**step, **lists, "seconds": times})
        self.generations.rewrite(self.generations.records)
        self.steps.rewrite(kept)
        if self.trees.path.exists():
            self.trees.rewrite([tree for tree in self.trees.records if tree["request"] in done])

    def flush(self) -> None:
        """What was added without waiting for the disk is there."""
        for file in (self.trees, self.steps):
            file.flush()

    def close(self) -> None:
        with ExitStack() as last:  # all of it, whatever a full disk says of one file
            for file in (*self.files, self.trees):
                last.callback(file.close)


class RunFolder:
    """The output folder of a run, which is the only one to work in it until it is closed.

    As a context it closes itself, and what a ValueError ends before anything is finished leaves
    nothing behind.

    Args:
        path: made if missing.
        config: every setting of the run, resolved.
        resume: continue what the folder holds.
        volatile: settings that may differ between a run and its resumption.
        may_begin: whether one that is to be continued may not have begun, as of a sweep.

    Raises:
        ValueError: the folder cannot be used, another run works in it or has left results there;
            or `resume` finds nothing, other settings, or files that are missing or broken.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        resume: bool,
        volatile: frozenset[str] = frozenset(),
        may_begin: bool = False,
    ) -> None:
        self.path = path
        self.notes: list[str] = []  # what to tell of a resumption
        self._config: Record = {**config, **{name: {} for name in FACTS}}
        self._found: Mapping[str, Any] = {}
        self.main = Side(path)
        self.baseline = Side(path / "baseline") if config.get("baseline") else None
        self.sides = [side for side in (self.main, self.baseline) if side is not None]
        self._lock = Lock(path / "lock", f"out={path}")
        try:
            self._before = set(os.listdir(path))
            if resume and not (may_begin and self._empty):
                self._found = self._resume(volatile)
            elif any(_size(side.generations.path) for side in self.sides):
                raise ValueError(
                    f"out={path}: holds results already; "
                    f"resume=true continues them, or choose another folder"
                )
        except BaseException:
            self._lock.release()
            raise

    @property
    def _empty(self) -> bool:
        files = [file.path for side in self.sides for file in side.files]
        return not (self.path / CONFIG).exists() and not any(map(_size, files))

    def _resume(self, volatile: frozenset[str]) -> Mapping[str, Any]:
        """Read what the folder holds; returns its config.yaml."""
        files = [file.path for side in self.sides for file in side.files]
        place = self.path / CONFIG
        absent = [file for file in (place, *files) if not file.exists()]
        if self._empty:
            raise ValueError(
                f"resume=true: there is nothing to continue in out={self.path}; leave it out, or "
                f"name the folder of a run"
            )
        if place in absent or (absent and any(map(_size, files))):
            raise ValueError(
                f"{absent[0]}: is missing; put it back, or choose another folder with out="
            )
        found = _read_config(place)
        names = sorted({*found, *self._config} - volatile - {"schema", *FACTS})
        changed = [name for name in names if found.get(name) != self._config.get(name)]
        self._refuse(changed)
        for side in self.sides:
            self.notes += side.read()
        return found

    def identify(self, **facts: Mapping[str, Any]) -> None:
        """Note what the settings came to here: `resolved`, values of settings that leave it open,
        and `contents`, fingerprints of what they name.

        Raises:
            ValueError: they have changed since the run that is resumed.
        """
        self._config |= {name: dict(values) for name, values in facts.items()}
        if self._found:
            before = {name: self._found[name] for name in facts}
            self._refuse(
                [
                    f"{name} of {key}" if name == "contents" else key
                    for name, values in facts.items()
                    for key in sorted({*values, *before[name]})
                    if before[name].get(key) != values.get(key)
                ]
            )

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise ValueError(
                f"resume=true: {', '.join(changed)} differ from the run in out={self.path}; "
                f"use the same settings, or choose another folder"
            )

    @property
    def finished(self) -> int:
        """Texts."""
        return sum(len(side.generations.records) for side in self.sides)

    @property
    def resumable(self) -> bool:
        """Whether there is anything to continue."""
        return (self.path / CONFIG).exists()

    def begin(self) -> None:
        """Write the settings, and forget what an interrupted run left half done."""
        replace_file(
            self.path / CONFIG,
            yaml.safe_dump({"schema": SCHEMA, **self._config}, sort_keys=False),
        )
        (self.path / ERROR).unlink(missing_ok=True)
        for side in self.sides:
            side.begin()

    def write_error(self, error: Exception) -> Path:
        """The file that holds its traceback from now on."""
        path = self.path / ERROR
        replace_file(path, "".join(traceback.format_exception(error)))
        return path

    def write_summary(self, summary: Record) -> None:
        replace_file(self.path / "summary.json", to_json(summary, indent=1) + "\n")

    def close(self) -> None:
        """Let others work there."""
        with ExitStack() as last:  # all of it, whatever a full disk says of one file
            last.callback(self._lock.release)
            for side in self.sides:
                last.callback(side.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        nothing = not self.finished and not (self.path / ERROR).exists()
        if isinstance(error, ValueError) and nothing and CONFIG not in self._before:
            self._discard()
        self.close()

    def _discard(self) -> None:
        """Remove what this run has written."""
        for name in set(OWN) - self._before:
            path = self.path / name
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
        whole = isinstance(found, dict) and all(isinstance(found.get(f), dict) for f in FACTS)
        reason = "" if whole else "it is cut off, or of an older version"
    except (yaml.YAMLError, ValueError) as error:
        whole, reason = False, " ".join(str(error).split())
    if not whole:
        raise ValueError(
            f"{path}: cannot be read, {reason}; put it back, or choose another folder with out="
        )
    return found
