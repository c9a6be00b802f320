"""RunFolder: what a run leaves on disk, written as it goes, so that an interrupted run can
continue.

generations.jsonl   one line for each decoded prompt (for each turn of a conversation)
steps.jsonl         one line for each step
trees.jsonl         one line for each tree that is recorded
evidence.jsonl      one line for each text whose evidence is recorded
energy.jsonl        one line for each process that measured what the GPU uses
baseline/           the same two files for plain decoding
config.yaml         every setting, resolved
identity.json       by what the run is known
summary.json        the figures
error.txt           the traceback, if the drafter failed
tracking.json       by what trackers know the run
lock                who works there, as long as it does
"""

import os
import shutil
import traceback
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml

from specdec.lab.energy import ENERGY
from specdec.lab.files import check_folder, read_object, replace_file, to_json, writing
from specdec.lab.identity import IDENTITY, Identity
from specdec.lab.lock import Lock
from specdec.lab.records import EVIDENCE, GENERATIONS, STEPS, TRACKING, TREES, Record, RecordFile

SCHEMA = 2  # of these files, as docs/outputs.md has them
CONFIG, ERROR = "config.yaml", "error.txt"
OWN = (
    *(CONFIG, IDENTITY, "generations.jsonl", "steps.jsonl", "trees.jsonl"),
    *("evidence.jsonl", "energy.jsonl", "baseline", "summary.json", "wandb", TRACKING),
)


class Side:
    """The records of one decoder: `generations`, `steps`, and `trees`, `evidence` and `energy`, of
    which there are files if some are recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generations = RecordFile(folder / "generations.jsonl", GENERATIONS)
        self.steps = RecordFile(folder / "steps.jsonl", STEPS)
        self.trees = RecordFile(
            folder / "trees.jsonl", TREES, lost="its tree is missing then", kept=False
        )
        self.energy = RecordFile(
            folder / "energy.jsonl", ENERGY, lost="what it measured is missing then"
        )
        self.evidence = RecordFile(
            folder / "evidence.jsonl", EVIDENCE, lost="its text is not audited then"
        )
        self.files = self.generations, self.steps
        self.others = self.trees, self.evidence, self.energy

    def read(self) -> list[str]:
        """Take over what was finished; returns what became of records that cannot stay.

        A text counts once, if all its steps are there, and all turns before it.
        """
        for file in (*self.files, *self.others):
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

        What a step did for them is done again, and timed then.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        done = {generation["request"] for generation in self.generations.records}
        kept = of_requests(self.steps.records, done)
        self.generations.rewrite(self.generations.records)
        self.steps.rewrite(kept)
        if self.trees.path.exists():
            self.trees.rewrite([tree for tree in self.trees.records if tree["request"] in done])
        if self.evidence.path.exists():
            known = {line["request"]: line for line in self.evidence.records}
            self.evidence.rewrite([line for n, line in known.items() if n in done])
        if self.energy.path.exists():
            self.energy.rewrite(self.energy.records)

    def flush(self) -> None:
        """What was added without waiting for the disk is there."""
        for file in (self.trees, self.evidence, self.steps):
            file.flush()

    def close(self) -> None:
        with ExitStack() as last:  # all of it, whatever a full disk says of one file
            for file in (*self.files, *self.others):
                last.callback(file.close)


def of_requests(steps: Iterable[Record], wanted: Collection[int]) -> list[Record]:
    """Steps as if they had run for these requests alone, with the share of their time that those
    have in their sequences; their lists are by request."""
    kept = []
    for step in steps:
        requests = step["requests"]
        places = [i for i, request in enumerate(requests) if request in wanted]
        if places:
            lists = {
                name: [values[i] for i in places]
                for name, values in step.items()
                if isinstance(values, list) and len(values) == len(requests)
            }
            share = len(places) / len(requests)
            times = {verb: seconds * share for verb, seconds in step["seconds"].items()}
            kept.append({**step, **lists, "seconds": times})
    return kept


class RunFolder:
    """The output folder of a run, which is the only one to work in it until it is closed.

    As a context it closes itself, and what a ValueError ends before anything is finished leaves
    nothing behind. A folder goes on with the same run (`Identity`) alone: with what is missing of
    it, or with more prompts. If nothing is missing, `summary` is that of the finished run.

    Args:
        path: made if missing.
        config: every setting of the run, resolved.
        resume: continue an unfinished run; `auto` begins if there is none.
        identity: by what the run is known; its settings, if left out.
        texts: how many it has of each prompt, by its place in the set.
        job: whether it is one of a sweep, whose folders are continued without being told.

    Raises:
        ValueError: the folder cannot be used, another run works in it or has left results there;
            or `resume` finds nothing, other settings, or files that are missing or broken.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        resume: bool | str,
        identity: Identity | None = None,
        texts: Mapping[int, int] | None = None,
        job: bool = False,
    ) -> None:
        self.path = path
        self.notes: list[str] = []  # what to tell of a resumption
        self.summary: Record | None = None
        self.identity = identity or Identity(settings=config)
        self._texts = texts or {}
        self._config: Record = {**config, "resolved": {}}
        self._resolved: Mapping[str, Any] = {}  # that of the run that goes on
        self.main = Side(path)
        self.baseline = Side(path / "baseline") if config.get("baseline") else None
        self.sides = [side for side in (self.main, self.baseline) if side is not None]
        self._lock = Lock(path / "lock", f"out={path}")
        try:
            check_folder(path, "a run")
            self._before = set(os.listdir(path))
            if not self._empty:
                self._go_on(wanted=bool(resume) or job)
            elif resume is True and not job:
                raise ValueError(
                    f"resume=true: there is nothing to continue in out={path}; leave it out, or "
                    f"name the folder of a run"
                )
        except BaseException:
            self._lock.release()
            raise

    @property
    def _heads(self) -> list[Path]:
        return [self.path / CONFIG, self.path / IDENTITY]

    @property
    def _empty(self) -> bool:
        files = [file.path for side in self.sides for file in side.files]
        return not any(map(_size, [*self._heads, *files]))

    def _go_on(self, *, wanted: bool) -> None:
        """Read what the folder holds.

        Args:
            wanted: whether that was asked for; if not, only a finished run goes on.
        """
        summary = read_object(self.path / "summary.json")
        if not wanted and not (summary or {}).get("finished"):
            if not any(_size(side.generations.path) for side in self.sides):
                return  # it ended before anything was finished
            raise ValueError(
                f"out={self.path}: holds results already; resume=true continues them, or choose "
                f"another folder"
            )
        begun = [side for side in self.sides if side.folder.exists()]
        files = [file.path for side in begun for file in side.files]
        absent = [file for file in files if not file.exists()] if any(map(_size, files)) else []
        absent = [f for f in self._heads if not f.exists()] + absent
        if absent:
            raise ValueError(
                f"{absent[0]}: is missing; put it back, or choose another folder with out="
            )
        self._resolved = read_config(self.path / CONFIG)["resolved"]
        self._take_over(_read_identity(self.path / IDENTITY))
        for side in self.sides:
            self.notes += side.read()
        if summary and summary.get("finished") and self._complete(summary):
            self.summary = summary

    def _take_over(self, record: Mapping[str, Any]) -> None:
        """The prompts of the run that goes on, if it is the same one."""
        mine, theirs = self.identity.prompts, record["prompts"]
        other = [name for name in mine if theirs.get(name, mine[name]) != mine[name]]
        changed = self.identity.differences(record["parts"])
        self._refuse(changed or [f"prompt {name}" for name in other[:3]])
        if mine.keys() - theirs and theirs.keys() - mine:
            raise ValueError(
                f"out={self.path}: holds other prompts than those asked for; choose another "
                f"folder, or ask for those of it and more"
            )
        self.identity = replace(self.identity, prompts={**theirs, **mine})

    def _complete(self, summary: Mapping[str, Any]) -> bool:
        """Whether no text is missing, on any side, but for prompts that were too long."""
        skipped = summary.get("too_long", {}).get("skipped", 0)
        sides = [self.main]
        place = summary.get("baseline_from")
        if self.baseline is not None and not (place and (self.path / place).is_dir()):
            sides.append(self.baseline)
        for side in sides:
            found = Counter(record["prompt"] for record in side.generations.records)
            lacking = [index for index, count in self._texts.items() if found[index] != count]
            if len(lacking) > skipped or any(found[index] for index in lacking):
                return False
        return bool(self._texts) and not self.notes

    def identify(self, resolved: Mapping[str, Any]) -> None:
        """Note what settings that leave it open came to here, by their names.

        Raises:
            ValueError: they have changed since the run that is resumed.
        """
        self._config["resolved"] = dict(resolved)
        if self._resolved:
            names = sorted({*resolved, *self._resolved} - {"device"})
            self._refuse([n for n in names if self._resolved.get(n) != resolved.get(n)])

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            differ = "differs" if len(changed) == 1 else "differ"
            raise ValueError(
                f"out={self.path}: {', '.join(changed)} {differ} from the run there; use the same "
                f"settings, which resume={self.path} takes from there, or choose another folder"
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
        replace_file(self.path / IDENTITY, to_json(self.identity.record(), indent=1) + "\n")
        (self.path / ERROR).unlink(missing_ok=True)
        for side in self.sides:
            if side is self.main or side.generations.records:
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


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run, as its folder has them.

    Raises:
        ValueError: the file is broken.
    """
    try:
        found = yaml.safe_load(path.read_bytes())
        whole = isinstance(found, dict) and isinstance(found.get("resolved"), dict)
        reason = "" if whole else "it is cut off, or of an older version"
    except (yaml.YAMLError, ValueError) as error:
        whole, reason = False, " ".join(str(error).split())
    if not whole:
        raise ValueError(
            f"{path}: cannot be read, {reason}; put it back, or choose another folder with out="
        )
    return found


def _read_identity(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None or not all(isinstance(found.get(n), dict) for n in ("parts", "prompts")):
        raise ValueError(
            f"{path}: cannot be read, it is cut off; put it back, or choose another folder with "
            f"out="
        )
    return found
