"""Together: one run by several processes that share its target, one to a GPU. torch's own launcher
starts them; each does the whole run, and rank 0 alone writes, tracks and prints.

What a rank may decide by itself is decided by what all ranks have (`specdec/ranks.py`); what goes
by a clock is refused here.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.distributed.rendezvous import rendezvous

from specdec.lab.files import read_object, to_json
from specdec.lab.interrupts import SIGNALS, interruptible
from specdec.lab.jobs import ending
from specdec.models.load import config_of
from specdec.models.placement import Placement
from specdec.models.shards import check_split
from specdec.ranks import Ranks, RanksError, here, join, runs
from specdec.reasons import FailedError, described

FOLDER = "SPECDEC_RANKS"  # in the environment: what the processes of a run have in common
TASK, ANSWER = "task.json", "answer.json"  # there
GRACE = 20.0  # seconds that a process may take to end when it should
LOOK = 0.1  # seconds between two looks whether it should
# NVLink's multicast takes a service of the host's that may be missing, or hang.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True)
class Task:
    """A run that ranks do together; arguments as of `running.run`.

    Args:
        size: how many ranks there are.
        wait: seconds after which it ends if they wait for each other.
        cpu: whether they compute there.
    """

    settings: Mapping[str, Any]
    out: str
    words: Sequence[str]
    again: str
    sweep: bool
    size: int
    wait: float
    cpu: bool


def check_together(
    settings: Mapping[str, Any], size: int, path: str, placement: Placement
) -> None:
    """Raise ValueError, in one line, for what so many ranks cannot do. Without a model."""
    if size == 1:
        return
    said = f"target.tp={size}"
    config = config_of(path, setting="target.path")
    if config is not None:
        check_split(config, size, f"target.path={path}")
    if ":" in str(placement.device):
        raise ValueError(
            f"device={placement.device}: {said} takes a GPU for each rank; use device=cuda, and "
            f"CUDA_VISIBLE_DEVICES to choose them"
        )
    gpus = torch.cuda.device_count() if placement.device.type == "cuda" else size
    if size > gpus:
        raise ValueError(
            f"{said}: takes {size} GPUs, and {gpus} {'is' if gpus == 1 else 'are'} visible here; "
            f"lower it"
        )
    if settings["record"].get("energy"):
        raise ValueError(
            f"record.energy=true: measures one GPU, and {said} takes {size}; leave it out"
        )
    costs = settings["tree"].get("costs")
    if costs in ("auto", "measure"):
        raise ValueError(
            f"tree.costs={costs}: passes are measured in one process; with {said} name a table"
        )
    for part in _mappings(settings["drafter"]):
        if part.get("mode") == "bandit" and part.get("costs") is None:
            raise ValueError(
                f"drafter.mode=bandit: goes by the clock, which is not that of other ranks; with "
                f"{said} give drafter.costs"
            )


def _mappings(found: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(found, Mapping):
        yield found
        for value in found.values():
            yield from _mappings(value)


def started(task: Task) -> dict[str, Any]:
    """Start the processes and wait for them: what `running.run` returns on rank 0.

    Raises:
        ValueError: what it raises there, or a process that ended without a word.
        KeyboardInterrupt: it was interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="specdec-ranks-") as folder:
        (Path(folder) / TASK).write_text(to_json(asdict(task)))
        code, reason = _launch(task, folder)
        answer = read_object(Path(folder) / ANSWER)
    if code == 130:
        raise KeyboardInterrupt
    if answer is None:
        raise FailedError(reason)
    if "error" in answer:
        raise (FailedError if answer["failed"] else ValueError)(answer["error"])
    return answer


def _launch(task: Task, folder: str) -> tuple[int, str]:
    """Run them: the exit code of rank 0, or 130; and what to say if it left no answer."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=task.size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    given = {FOLDER: folder, **ENVIRONMENT}
    if task.cpu:  # else transformers would take the GPU
        given["CUDA_VISIBLE_DEVICES"] = ""
    with _environment(given), _signals_kept():
        try:
            elastic_launch(config, sys.executable)("-m", "specdec.lab.together")
        except SignalException:
            return 130, ""
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if codes.get(0) in (1, 2, 130):
                return codes[0], "rank 0 ended without a word"
            rank = next((one for one in sorted(codes) if one), 0)
            return 1, f"rank {rank} {ending(codes[rank])}"
    return 0, "rank 0 ended without a word"


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """What is done at a signal is the same afterwards: the launcher leaves its own."""
    before = {one: signal.getsignal(one) for one in (*SIGNALS, signal.SIGQUIT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# In each of the processes


def own_folder(path: Path) -> Path:
    """Where this rank records: rank 0 there, others in a copy of what is there, which is given up
    with all they say. None begins before all copies are made."""
    ranks = here()
    if ranks.rank:
        copy = Path(os.environ[FOLDER]) / f"rank{ranks.rank}" / path.name
        if path.is_dir():
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns("lock", "jobs", "logs"))
        path = copy
    ranks.least(0)
    return path


def main() -> None:
    """A process of `started`."""
    folder, rank = Path(os.environ[FOLDER]), int(os.environ["RANK"])
    task = Task(**json.loads((folder / TASK).read_text()))
    sys.path.insert(0, str(Path.cwd()))  # for classes of the user's own
    transformers.utils.logging.set_verbosity_error()
    if rank:
        for one in SIGNALS:  # it ends when rank 0 does
            signal.signal(one, signal.SIG_IGN)
    code = 1
    try:
        with nullcontext() if rank else interruptible():
            code = _follow(task) if rank else _lead(task, folder / ANSWER)
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not by way of what still waits for other ranks


def _join(task: Task) -> Ranks:
    store, rank, size = next(iter(rendezvous("env://")))
    if task.cpu:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    where, wait = "cpu" if task.cpu else "cuda", task.wait / 2  # twice that where none reports
    ranks = join(store, rank=rank, size=size, device=where, wait=wait)
    threading.Thread(target=_watch, args=(ranks, os.getppid()), daemon=True).start()
    return ranks


def _run(task: Task, console: Console) -> dict[str, Any]:
    from specdec.lab.running import run

    out = Path(task.out)
    more = {"words": task.words, "again": task.again, "sweep": task.sweep}
    return run(dict(task.settings), out, console, **more)  # type: ignore[arg-type]


def _lead(task: Task, answer: Path) -> int:
    """Rank 0: leaves an answer for the process that started it, and returns the exit code."""
    try:
        _join(task)
        found, code = _run(task, Console()), 0
    except (ValueError, RanksError) as error:
        failed = isinstance(error, FailedError | RanksError)
        found, code = {"error": " ".join(str(error).split()), "failed": failed}, 2 - failed
    answer.write_text(to_json(found))
    return code


def _follow(task: Task) -> int:
    """Another rank: silent, and if it fails alone rank 0 says why."""
    ranks = _join(task)
    with open(os.devnull, "w") as nowhere:
        try:
            _run(task, Console(file=nowhere))
        except Exception as error:
            plain = isinstance(error, ValueError | RanksError)
            said = str(error) if plain else described(error)
            ranks.tell("failed", " ".join(said.split()))
    # Not before rank 0 has said it, which hears it when it waits for this one.
    begun = time.monotonic()
    while time.monotonic() - begun < GRACE and ranks.leader and runs(ranks.leader):
        time.sleep(LOOK)
    return 0


def _watch(ranks: Ranks, parent: int) -> None:
    """End this process when it should: when rank 0 has ended, or who started it; and where a step
    never lands, because a GPU waits for another for ever."""
    while os.getppid() == parent:
        time.sleep(LOOK)
        if ranks.leader is not None and not runs(ranks.leader):
            os._exit(0)
        if ranks.since is not None and time.monotonic() - ranks.since > 2 * ranks.wait:
            break
    else:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(130)
    reason = (
        f"target.tp={ranks.size}: no step has ended for {2 * ranks.wait:g} s; raise "
        f"target.tp_wait if one may take longer"
    )
    with suppress(Exception):
        try:
            ranks.compare()
        except RanksError as error:
            reason = str(error)
    if ranks.leader is None:
        answer = {"error": reason, "failed": True}
        (Path(os.environ[FOLDER]) / ANSWER).write_text(to_json(answer))
    os._exit(1 if ranks.leader is None else 0)


if __name__ == "__main__":
    main()
