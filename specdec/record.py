"""The command that records: `specdec record target=zoo drafter=small_llama sampling=sample
out=records/zoo`. Words are those of `specdec run`; tree and acceptance do not matter, for nothing
of a draft is kept. Prompts, samples, sampling and processors are part of a record.

    specdec record run=runs/pld drafter=small_llama out=records/small_llama

records the texts of a finished lossless run, whose settings then need not be said.

Whatever is wrong with the settings ends in one line on stderr and exit code 2, a full GPU in 1, an
interruption in 130; resume=true continues with the next shard.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.lab.build import baseline_of
from specdec.lab.command import ended
from specdec.lab.environment import describe_environment
from specdec.lab.experiment import Experiment
from specdec.lab.files import check_folder, read_object
from specdec.lab.fingerprints import digest
from specdec.lab.identity import NO_PART, code
from specdec.lab.lines import tell
from specdec.lab.lock import Lock
from specdec.lab.options import usage
from specdec.lab.running import Checked, check_settings, experiment_of
from specdec.lab.settings import Settings, find_own_code, folders_of, out_of, settings_of, split
from specdec.reasons import in_memory
from specdec.replay.finished import Finished
from specdec.replay.rates import write_rates
from specdec.replay.record import DONE, PLAN, SCHEMA, Record, shard_path, write_json, write_shard
from specdec.replay.recording import HEADS, RECORDED, check_drafter, record_prompts, watching

SHARD = 8  # prompts
NOT_RECORDED = ("tree", "acceptance", "batch_size", *NO_PART)


def main() -> None:
    """Console entry point."""
    find_own_code()
    sys.exit(command(sys.argv[1:]))


def command(arguments: Sequence[str]) -> int:
    """Do what was typed; returns the exit code."""
    return ended(partial(_command, list(arguments)))


def _command(arguments: list[str]) -> None:
    words, flags = split(arguments)
    if {"--help", "-h"} & set(flags):
        print(usage(folders_of(flags), "run", __doc__ or ""))
        return
    if many := {"--multirun", "-m"} & set(flags):
        raise ValueError(f"{many.pop()}: a record is one; make one after the other")
    given = [word for word in words if not word.startswith("run=")]
    runs = [Path(word.removeprefix("run=")) for word in words if word not in given]
    if len(runs) > 1:
        raise ValueError(f"run={runs[1]}: given twice; a record is of one run, leave one out")
    finished = Finished.read(runs[0]) if runs else None
    words = finished.words(given) if finished else given
    settings = settings_of([*words, "tracker=none", "kernels.graphs=false", *flags])
    with in_memory(f"lower batch_size={settings['batch_size']}, or choose smaller models"):
        make(settings, out_of(settings), Console(), finished)


def make(
    settings: Settings, out: Path, console: Console, finished: Finished | None = None
) -> Record:
    """Record what is not recorded yet.

    Args:
        finished: a run whose texts are recorded, instead of decoding any.

    Raises:
        ValueError: a setting that cannot be used, or a folder that holds something else.
    """
    check_drafter(settings["choices"]["drafter"])
    settings = {**settings, "baseline": False}
    check_folder(out, "a record")
    checked = check_settings(settings, console)
    if finished is not None:
        finished.check(checked.identity, checked.asked["prompts"], checked.asked["samples"])
    told = finished.texts if finished else {}
    plan = {**_plan(checked), **({"texts": digest(told)} if told else {})}
    lock = Lock(out / "lock", f"out={out}")
    try:
        if (out / DONE).exists() or (out / PLAN).exists():
            _continue(settings, out, plan)
        if not (out / DONE).exists():
            write_json(out / PLAN, plan)
            experiment = experiment_of(checked, console)
            _record(settings, experiment, out, plan, told, console)
    finally:
        lock.release()
    tell(console, f"record in {out}")
    return Record.open(out)


def _plan(checked: Checked) -> dict[str, Any]:
    parts = checked.identity
    kept = {
        name: value
        for name, value in parts.settings.items()
        if name.partition(".")[0] not in NOT_RECORDED
    }
    return {"schema": SCHEMA, "identity": [kept, dict(parts.contents), dict(parts.prompts)]}


def _continue(settings: Settings, out: Path, plan: dict[str, Any]) -> None:
    """Raise ValueError unless the folder's record is this one, and may go on."""
    if settings["resume"] not in (True, "auto"):
        raise ValueError(f"out={out}: holds a record already; resume=true continues it")
    if read_object(out / PLAN) != plan:
        raise ValueError(
            f"out={out}: holds a record of other settings, models or prompts; choose another "
            f"folder"
        )


def _record(
    settings: Settings,
    experiment: Experiment,
    out: Path,
    plan: dict[str, Any],
    told: Mapping[int, Sequence[int]],
    console: Console,
) -> None:
    method, watch = watching(experiment.method, baseline_of(settings).rule)
    experiment.method = method
    session = experiment.session(method)
    prompts = list(experiment.prompts)
    parts = [prompts[first : first + SHARD] for first in range(0, len(prompts), SHARD)]
    for number, part in enumerate(parts):
        path = shard_path(out, number)
        if path.exists():
            continue
        arrays, names = record_prompts(experiment, session, watch, part, told)
        write_json(path.with_suffix(".json"), names)
        write_shard(path, arrays)
        tell(console, f"{min((number + 1) * SHARD, len(prompts))} of {len(prompts)} prompts")
    kept = [read_object(shard_path(out, n).with_suffix(".json")) or {} for n in range(len(parts))]
    about = {
        "schema": SCHEMA,
        "shards": len(parts),
        "drafts": method.drafter_name in (*RECORDED, *HEADS),
        "levels": method.tree.budget if method.drafter_name in HEADS else None,
        "categories": [name for one in kept for name in one["category"]],
        "ids": [name for one in kept for name in one["id"]],
        "settings": {name: v for name, v in settings.items() if name not in ("tracker", "out")},
        "identity": plan["identity"],
        "code": code(),
        "resolved": experiment.resolved,
        "vocab_size": experiment.target.vocab_size,
        **describe_environment(experiment.target.device),
    }
    write_rates(Record(path=out, about=about), method.drafter, experiment.target)
    write_json(out / DONE, about)


if __name__ == "__main__":
    main()
