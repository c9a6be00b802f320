"""Show a finished run in a tracker, from its folder alone: after an upload that failed, on a
machine without a network, or of a run with tracker=none. A run that is there already is made
whole, not shown twice. Of a sweep, each of its runs.

    specdec sync outputs/2026-11-27/12-30-00
    specdec sync runs/sweep tracker=trackio tracker.project=drafters
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from specdec.lab.command import option, run_main
from specdec.lab.lock import Lock
from specdec.lab.runs import CONFIG, Side
from specdec.lab.settings import settings_of
from specdec.lab.setup import tracker_of
from specdec.lab.tracked import tracked_run
from specdec.lab.tracking import NoTracker, Tracker, replay

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    folders: tuple[str, ...] = option(
        about="of runs or sweeps, and settings as tracker.NAME=VALUE", free=True
    )
    tracker: str | None = option(None, "wandb or trackio; without it that of the run, else wandb")


def sync(folder: Path, tracker: Tracker) -> str | None:
    """Show the run of a folder.

    Returns:
        Where it can be seen, or how, in one line.

    Raises:
        ValueError: it is not the folder of a run that has ended, or the tracker fails.
    """
    config, summary = read_run(folder)
    side = Side(folder)
    side.read()
    try:
        tracker.start(tracked_run(folder, config, summary))
        replay(side.steps.records, tracker)
        return tracker.finish(summary, side.generations.records)
    except Exception as error:
        tracker.abandon()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: {type(tracker).__name__} failed, {reason}") from error


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


def runs_of(folder: Path) -> list[Path]:
    """The folder, if it is that of a run; else those in it that are.

    Raises:
        ValueError: there is none.
    """
    if (folder / CONFIG).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{SUMMARY}"))
    if not found:
        raise ValueError(f"{folder}: must be the folder of a run that has ended, or of a sweep")
    return found


def tracker_for(config: Mapping[str, Any], option: str | None, words: Sequence[str]) -> Tracker:
    """Of the option, else that of the run, else wandb; with settings of these words.

    Raises:
        ValueError: there is no such option or setting.
    """
    group = config["tracker"]
    if option is not None or group.get("_target_", "").endswith(f".{NoTracker.__name__}"):
        group = settings_of([f"tracker={option or 'wandb'}"])["tracker"]
    group = dict(group)
    for word in words:
        name, _, value = word.partition("=")
        group[name.removeprefix("tracker.")] = yaml.safe_load(value)
    return tracker_of({"tracker": group})


def work(options: Options) -> None:
    words = [word for word in options.folders if word.startswith("tracker.")]
    named = [Path(word) for word in options.folders if word not in words]
    if not named:
        raise ValueError("folders: must be given; those of runs, or of sweeps")
    for folder in [run for path in named for run in runs_of(path)]:
        config, _ = read_run(folder)
        where = sync(folder, tracker_for(config, options.tracker, words))
        print(where or f"{folder}: done")


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
