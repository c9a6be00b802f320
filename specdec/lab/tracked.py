"""What trackers call a run: name, group, tags and config, from its folder and its settings. What
was made up when it began is kept there, so that it is the same run when it continues."""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from specdec.lab.files import read_object, replace_file, to_json
from specdec.lab.fingerprints import digest
from specdec.lab.lock import Lock
from specdec.lab.method import MARKS, mark_of
from specdec.lab.records import TRACKING
from specdec.lab.runs import CONFIG
from specdec.lab.tracking import TrackedRun
from specdec.lab.values import flat

NOTED = ("id", "name")
SUMMARY = "summary.json"
NOT_SHOWN = ("schema", "choices", "contents", "tracker", "resume")
NOT_NAMED = ("out=", "resume=", "tracker.", "tracker=")  # words that say nothing of the run
LONGEST_NAME, LONGEST_TAG = 128, 64  # of wandb


def tracked_run(
    folder: Path, settings: Mapping[str, Any], marks: Mapping[str, Any], words: Sequence[str] = ()
) -> TrackedRun:
    """What trackers are told of a run.

    Args:
        settings: of config.yaml, `resolved` among them.
        marks: of its method, or its summary.
        words: what was typed, by which it is named; its drafter and folder if there are none.
    """
    mark = mark_of(marks)
    name = f"{mark} {_said(words, settings['choices']['drafter'], folder)}".strip()
    tags = [mark] if mark else []
    return TrackedRun(
        **_known(folder, name),
        group=_group(folder),
        tags=[*tags, *_tags(settings)],
        config=_config(settings) | {one: True for one in MARKS if marks.get(one)},
    )


def tracked_comparison(folder: Path) -> TrackedRun:
    """What trackers are told of the comparison of a sweep: it belongs to the group of the runs."""
    group = _named(folder)
    return TrackedRun(
        **_known(folder, f"comparison of {group}"),
        job_type="comparison",
        group=group,
        tags=["comparison"],
    )


def tracked_training(
    folder: Path, settings: Mapping[str, Any], words: Sequence[str] = ()
) -> TrackedRun:
    """What trackers are told of a training.

    Args:
        settings: all of them.
        words: what was typed, by which it is named.
    """
    method = settings["choices"]["method"]
    return TrackedRun(
        **_known(folder, f"train {_said(words, method, folder)}"),
        job_type="training",
        tags=["training", method, str(settings["target"]["path"])[-LONGEST_TAG:]],
        config=_config(settings),
    )


def _said(words: Sequence[str], option: str, folder: Path) -> str:
    """What was typed, less what says nothing of the run; else what it is of, and its folder."""
    said = [word for word in words if not word.lstrip("+~").startswith(NOT_NAMED)]
    return " ".join(said or [option, folder.name])


def _known(folder: Path, name: str) -> dict[str, Any]:
    """The folder, with name and id as they were when it began. The id has the host and the time in
    it: another machine may have a folder of the same path, and this one may have had it for
    another run."""
    path = folder / TRACKING
    found = read_object(path) or {}
    if all(isinstance(found.get(key), str) for key in NOTED):
        return {"folder": folder, **{key: found[key] for key in NOTED}}
    place = str(folder.absolute())
    known = {"id": digest([place, socket.gethostname(), time.time_ns()]), "name": name}
    known["name"] = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    with suppress(ValueError):  # a folder that cannot be written to
        replace_file(path, to_json({"schema": 1, **known}) + "\n")
    return {"folder": folder, **known}


def _group(folder: Path) -> str | None:
    """Of a run in the folder of a sweep."""
    sweep = folder.absolute().parent
    of_sweep = (sweep / "jobs").is_dir() or (sweep / "multirun.yaml").is_file()
    return _named(sweep) if of_sweep else None


def _named(sweep: Path) -> str:
    return "-".join(sweep.absolute().parts[-2:])[-LONGEST_NAME:].lstrip("/")


def _tags(settings: Mapping[str, Any]) -> list[str]:
    choices, resolved = settings["choices"], settings.get("resolved", {})
    tags = [
        str(settings["target"]["path"]),
        choices["drafter"],
        choices["tree"],
        str(resolved.get("acceptance", choices["acceptance"])),
        f"T={settings['sampling']['temperature']:g}",
        f"batch={settings['batch_size']}",
        str(choices.get("experiment") or ""),
    ]
    return list(dict.fromkeys(tag[-LONGEST_TAG:] for tag in tags if tag))


def _config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """By flat name, with the option of each group under the name of the group."""
    shown = {name: value for name, value in settings.items() if name not in NOT_SHOWN}
    options = {name: one for name, one in settings["choices"].items() if name != "tracker"}
    return {**options, **flat(shown, joint="/")}


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and summary of a run that has ended.

    Raises:
        ValueError: there is none, or it is at work.
    """
    Lock(folder / "lock", str(folder)).release()
    found: list[Any] = []
    for name, read in ((CONFIG, yaml.safe_load), (SUMMARY, json.loads)):
        try:
            found.append(read((folder / name).read_bytes()))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise ValueError(
                f"{folder / name}: cannot be read, {reason}; it must be the folder of a run that "
                f"has ended, and resume=true ends one that has not"
            ) from None
    config, summary = found
    if not isinstance(config.get("choices"), dict) or "mean_accepted_length" not in summary:
        raise ValueError(f"{folder}: its files are of an older version; decode it again")
    return config, summary
