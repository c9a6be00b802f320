"""Ranks in tests: forks of this process, which has imported torch already."""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from specdec.models.shards import cuts_unevenly
from specdec.ranks import Ranks, RanksError, join

PATIENCE = 60.0  # seconds until ranks are taken to hang
GRACE = 2.0  # seconds until those are ended that outlive rank 0, as a run ends them


def tokens(wanted: int) -> int:
    """So many in a vocabulary, or a few less, of which four ranks can have equal parts, where
    transformers gives them no others."""
    return wanted if cuts_unevenly() else wanted // 4 * 4


def together(
    folder: Path, work: Callable[[Ranks], Any], *, size: int = 2, wait: float = 20.0
) -> list[Any]:
    """What `work` returns on each of so many ranks, or the exception that it raises there.

    Raises:
        TimeoutError: they hang.
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = {_fork(folder, work, rank, size, wait): rank for rank in range(size)}
    begun, found = time.monotonic(), dict[int, Any]()
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            rank = children.pop(child)
            file = folder / f"{rank}.pickle"
            code = os.waitstatus_to_exitcode(status)
            found[rank] = pickle.loads(file.read_bytes()) if file.exists() else code
            begun = time.monotonic() if rank == 0 else begun
        elif time.monotonic() - begun > (max(PATIENCE, 2 * wait) if 0 not in found else GRACE):
            for child, rank in children.items():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found[rank] = TimeoutError("hangs")
            children.clear()
            if isinstance(found[0], TimeoutError):
                raise found[0]
        else:
            time.sleep(0.01)
    return [found[rank] for rank in range(size)]


def _fork(folder: Path, work: Callable[[Ranks], Any], rank: int, size: int, wait: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        store = dist.FileStore(str(folder / "store"), size)
        found: Any
        try:
            found = work(join(store, rank=rank, size=size, wait=wait))
        except Exception as error:
            traceback.print_exc()
            plain = isinstance(error, ValueError | RanksError)  # others may need more to be made
            found = error if plain else RuntimeError(f"{type(error).__name__}: {error}")
        (folder / f"{rank}.part").write_bytes(pickle.dumps(found))
        (folder / f"{rank}.part").rename(folder / f"{rank}.pickle")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
