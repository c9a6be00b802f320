"""Show a finished run in a tracker, from its folder alone: after an upload that failed, on a
machine without a network, or of a run with tracker=none. A run that is there already is made
whole, not shown twice. Of a sweep, each of its runs and their comparison.

    specdec sync outputs/2026-11-27/12-30-00
    specdec sync runs/sweep tracker=trackio tracker.project=drafters
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from specdec.compare.comparing import compare
from specdec.compare.files import write_all
from specdec.compare.track import show_in
from specdec.lab.command import option, run_main
from specdec.lab.runs import CONFIG, Side
from specdec.lab.settings import settings_of
from specdec.lab.setup import tracker_of
from specdec.lab.tracked import SUMMARY, read_run, tracked_run
from specdec.lab.tracking import NoTracker, Tracker, replay


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
    with told(folder, tracker):
        tracker.start(tracked_run(folder, config, summary))
        replay(side.steps.records, tracker)
        return tracker.finish(summary, side.generations.records)


def sync_comparison(folder: Path, tracker: Tracker) -> str | None:
    """Show what the runs of a sweep say together, with the files of it made anew. Returns and
    raises as `sync`."""
    comparison = compare([folder])
    files = write_all(comparison, folder)
    with told(folder, tracker):
        return show_in(tracker, folder, comparison, files)


@contextmanager
def told(folder: Path, tracker: Tracker) -> Iterator[None]:
    """Say in one line what a tracker says."""
    try:
        yield
    except Exception as error:
        tracker.abandon()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: {type(tracker).__name__} failed, {reason}") from error


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
    for folder in named:
        runs = runs_of(folder)
        for run in runs:
            config, _ = read_run(run)
            where = sync(run, tracker_for(config, options.tracker, words))
            print(where or f"{run}: done")
        if len(runs) > 1:
            tracker = tracker_for(config, options.tracker, words)
            print(sync_comparison(folder, tracker) or f"{folder}: done")


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
