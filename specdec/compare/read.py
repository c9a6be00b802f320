"""Folders of runs and of sweeps as they lie on disk. Needs neither torch nor Hydra."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from specdec.compare.sums import Conversation, Sums, read_side, replayed_sums
from specdec.lab.files import MARKS
from specdec.lab.jobs import DONE, FINISHED, Job, differing, jobs_of
from specdec.lab.values import flat

METHOD = ("drafter", "tree", "acceptance")  # groups of settings that make a method
# Settings that change neither what is decoded nor how. Prompts count one by one, by their tokens.
NO_PART = (
    *("schema", "out", "resume", "tracker", "record", "baseline"),
    *("choices", "resolved", "contents"),  # facts among the settings
)
NO_WORK = (*METHOD, "seed", "device", "prompts")  # of the rest, those that may differ
SAMPLES = ("prompts.samples", "prompts.turns")  # of prompts, what a conversation consists of
REPLAY, REPLAY_SCHEMA = "replay.json", 2
LABELS = ("drafter", "tree", "children", "acceptance")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has left.

    Args:
        name: its folder as it was given, or from that of the sweep.
        settings: by full name.
        contents: fingerprints of what they name.
        code: of the package; empty of older runs, which are `unverified`.
        config: of its config.yaml, empty if it has none.
        summary: empty if it was killed.
        texts: by conversation; plain: of plain decoding, None without any.
        plain_name: tells whether two runs share it.
        shared: whether another job ran on its device meanwhile.
        words: its settings as they were typed, if they are known.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    contents: Mapping[str, str]
    code: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    texts: Mapping[Conversation, Sums]
    plain: Mapping[Conversation, Sums] | None
    plain_name: str
    shared: bool = False
    words: Sequence[str] | None = None

    @property
    def unverified(self) -> bool:
        return not self.code

    @property
    def choices(self) -> Mapping[str, str]:
        """Options of groups, by group."""
        return self.config.get("choices") or {}

    def value(self, name: str) -> Any:
        """Of a setting, as it was given; None if it is not known."""
        found: Any = self.config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return self.settings.get(name) if found is None else found

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed") or 0)

    @cached_property
    def method(self) -> dict[str, Any]:
        """What it is besides its workload and seed."""
        return {
            **{k: v for k, v in self.settings.items() if group_of(k) in METHOD},
            **{f"contents of {k}": v for k, v in self.contents.items() if group_of(k) in METHOD},
            **{k: v for k, v in self.choices.items() if k in METHOD},
            **({"replayed": [self.summary[k] for k in LABELS]} if self.replayed else {}),
            "code": self.code,
        }

    @cached_property
    def workload(self) -> dict[str, Any]:
        """What must be equal in runs that are compared."""
        return {
            **{k: v for k, v in self.settings.items() if group_of(k) not in NO_WORK},
            **{k: v for k, v in self.settings.items() if k in SAMPLES},
            **{
                f"contents of {k}": v
                for k, v in self.contents.items()
                if group_of(k) not in NO_WORK
            },
        }

    @property
    def replayed(self) -> bool:
        """Whether it is what a replay expects, and nothing was decoded."""
        return bool(self.summary.get("replayed"))

    @property
    def mark(self) -> str:
        """REPLAYED; SYNTHETIC, LOSSY or FAILED, of what is no lossless method."""
        if self.replayed:
            return "REPLAYED"
        verdict = (self.summary.get("lossless") or {}).get("verdict")
        if self.summary.get("synthetic"):
            return "SYNTHETIC"
        return "LOSSY" if self.summary.get("lossy") else "FAILED" if verdict == "failed" else ""

    @property
    def machine(self) -> str | None:
        """By which times are told apart; None if it is not known."""
        hardware, versions = self.summary.get("hardware"), self.summary.get("versions")
        if not hardware or not versions:
            return None
        where = hardware.get("gpu") or f"{hardware.get('threads')} threads of {hardware['cpu']}"
        named = (f"{k} {v}" for k, v in versions.items() if k != "specdec-lab" and v)
        return f"{where}, {', '.join(named)}"

    @property
    def timed(self) -> bool:
        """Whether its times are its own."""
        return self.machine is not None and not self.shared

    @property
    def steady(self) -> bool:
        """Whether the machine kept the pace of the sweep."""
        anchor = self.summary.get("anchor")
        return anchor is None or bool(anchor.get("used"))


@dataclass(kw_only=True)
class Found:
    """Runs, and what there is that is none.

    Args:
        left_out: folders and jobs that cannot be used, and why.
        sweeps: folders that hold several.
    """

    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    sweeps: list[Path] = field(default_factory=list)
    plain: dict[Path, Mapping[Conversation, Sums]] = field(default_factory=dict)


def find(folders: Sequence[Path]) -> Found:
    """The runs in these folders, each of which is that of a run or of a sweep.

    Raises:
        ValueError: a folder holds none, or a file of it is broken.
    """
    found = Found()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; name those of runs or of a sweep")
        if (folder / REPLAY).is_file():
            found.runs += read_replay(folder, str(folder))
            continue
        if is_run(folder):
            beside = {job.folder: job for job in _ledger(folder.absolute().parent)}
            _add(found, folder, str(folder), beside.get(folder.name))
            continue
        jobs = _ledger(folder)
        inner = sorted(one for one in folder.iterdir() if one.is_dir() and is_run(one))
        if not inner and not jobs:
            raise ValueError(
                f"{folder}: holds no run and no replay; name folders of runs, of a sweep or of "
                f"specdec replay"
            )
        found.sweeps.append(folder)
        several = len(folders) > 1
        by_folder = {job.folder: job for job in jobs}
        for one in inner:
            name = str(folder / one.name) if several else one.name
            _add(found, one, name, by_folder.get(one.name))
        found.left_out |= _unfinished(jobs)
    if not found.runs:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no run that can be used; "
            f"{'; '.join(f'{name}: {why}' for name, why in found.left_out.items())}"
        )
    return found


def read_replay(folder: Path, name: str) -> list[Run]:
    """The methods of `specdec replay`, each with expected steps and nodes of every conversation.

    Raises:
        ValueError: a file of another make, or a broken one.
    """
    path = folder / REPLAY
    found = _json(path)
    try:
        if found["schema"] != REPLAY_SCHEMA:
            raise ValueError(f"it is of schema {found['schema']}, not {REPLAY_SCHEMA}")
        return [_replayed(folder, name, found, row) for row in found["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be used, {error}; specdec replay writes it anew"
        ) from None


def _replayed(folder: Path, name: str, found: Mapping[str, Any], row: Mapping[str, Any]) -> Run:
    labels = {key: str(row[key]) for key in LABELS}
    settings = {k: v for k, v in found["settings"].items() if group_of(k) not in NO_PART}
    return Run(
        name=" ".join(
            (f"{name}:", labels["tree"], str(row["budget"]), *list(labels.values())[2:])
        ),
        folder=folder,
        settings={**settings, "batch_size": found["batch"], "tree.budget": row["budget"]},
        contents=found["contents"],
        code=found["code"],
        config=found["config"],
        summary={
            **labels,
            "replayed": True,
            "acceptance_by_depth": row["acceptance_by_depth"],
            **{key: found.get(key) for key in ("oracle", "costs", "record", "command")},
        },
        texts=replayed_sums(found["conversations"], row),
        plain=None,
        plain_name="",
    )


def is_run(folder: Path) -> bool:
    """Whether it holds a run, and not those of a sweep."""
    return any((folder / name).exists() for name in MARKS["a run"])


def _add(found: Found, folder: Path, name: str, job: Job | None) -> None:
    """Read a run, if there is anything in it."""
    if any(run.folder.resolve() == folder.resolve() for run in found.runs):
        return
    run = read(folder, name, job, found.plain)
    if run.texts:
        found.runs.append(run)
    else:
        found.left_out[name] = "no text is finished"


def read(
    folder: Path,
    name: str,
    job: Job | None,
    known: dict[Path, Mapping[Conversation, Sums]],
) -> Run:
    """A run.

    Args:
        job: what the ledger of its sweep has of it.
        known: plain decoding that was read before, by folder.

    Raises:
        ValueError: a file is missing or broken.
    """
    summary, identity = (_json(folder / file) for file in ("summary.json", "identity.json"))
    parts = identity.get("parts") or {}
    needed = not parts or (folder / "config.yaml").exists()
    config = _config(folder / "config.yaml") if needed else {}
    settings = parts.get("settings") or flat(config, empty=True) | config.get("resolved", {})
    plain = _plain_folder(folder, summary)
    if plain is not None and plain not in known:
        known[plain] = read_side(plain, plain=True)
    return Run(
        name=name,
        folder=folder,
        settings={k: v for k, v in settings.items() if group_of(k) not in NO_PART},
        contents=parts.get("contents") or config.get("contents", {}),
        code=parts.get("code", ""),
        config=config,
        summary=summary,
        texts=read_side(folder),
        plain=None if plain is None else known[plain],
        plain_name=str(plain or ""),
        shared=job is not None and job.shared,
        words=job.words if job else None,
    )


def _plain_folder(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """Where the records of plain decoding are: with the run, or with its sweep if its times there
    are this run's too."""
    own, there = folder / "baseline", summary.get("baseline_from")
    if there is None or not (folder / there).is_dir():
        return own if (own / "generations.jsonl").exists() else None
    return (folder / there).resolve()


def group_of(name: str) -> str:
    return name.partition(".")[0]


def _json(path: Path) -> dict[str, Any]:
    """Of a file; empty if there is none.

    Raises:
        ValueError: it is broken.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read, {error}; leave the run out") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object; leave the run out")
    return found


def _config(path: Path) -> dict[str, Any]:
    """All settings of a run.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        found = yaml.load(path.read_bytes(), Loader=LOADER)
        reason = "" if isinstance(found, dict) else "it holds no settings"
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    if reason:
        raise ValueError(f"{path}: cannot be read, {reason}; leave the run out")
    return dict(found)


def _ledger(folder: Path) -> list[Job]:
    """The jobs of a sweep, of equal words the last."""
    last: dict[tuple[str, ...], Job] = {}
    for job in jobs_of(folder):
        last.pop(tuple(job.words), None)
        last[tuple(job.words)] = job
    return list(last.values())


def _unfinished(jobs: Sequence[Job]) -> dict[str, str]:
    """Jobs that were refused or failed, by the words that others have not, and why."""
    names = differing(job.words for job in jobs)
    return {
        name or "the job": job.state + (f": {job.reason}" if job.reason else "")
        for name, job in zip(names, jobs, strict=True)
        if job.state not in (FINISHED, DONE)
    }
