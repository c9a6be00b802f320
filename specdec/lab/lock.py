"""Lock: a file that says who works in a folder, and is held by one process at a time."""

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO


class TakenError(ValueError):
    """Another process works there; `sure` if it runs on this host."""

    def __init__(self, message: str, *, sure: bool) -> None:
        super().__init__(message)
        self.sure = sure


class Lock:
    """Held until it is released or the process ends, however that comes about: the system knows
    (flock). The file has the owner's pid, host and time, for messages, and for file systems that
    other hosts see as well.

    Args:
        path: of the file; folders above it are made.
        name: what error messages begin with.

    Raises:
        TakenError: another process holds it, or may hold it on another host.
        ValueError: the file cannot be written.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.made: list[Path] = []  # folders, the deepest first
        self._file: TextIO | None = None
        try:
            self.made = missing(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
            self._file.truncate(0)
            self._file.write(json.dumps(_this_process()) + "\n")
            self._file.flush()
        except BaseException as error:
            self.release()
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or error
            raise ValueError(f"{name}: cannot be used, {reason}; choose another place") from None

    def release(self) -> None:
        """Remove the file, and the folders that were made for it, if there is nothing else in
        them."""
        if self._file is not None:
            with suppress(OSError):
                self.path.unlink()
            with suppress(OSError):  # of a full disk
                self._file.close()
            self._file = None
        for folder in self.made:
            with suppress(OSError):
                folder.rmdir()

    def _locked(self) -> TextIO:
        """The file, locked.

        Raises:
            TakenError: it is another's.
        """
        while True:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            except OSError:  # a file system without locks
                held = alive(_owner(file))
            if not held and not _same(file, self.path):
                file.close()  # its owner has removed it in between
                continue
            owner = _owner(file)
            elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
            if not held and not elsewhere:
                return file
            file.close()
            raise TakenError(self._taken(owner, sure=held), sure=held)

    def _taken(self, owner: dict[str, Any], *, sure: bool) -> str:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        since = f"since {owner.get('time', '?')}"
        if sure:
            return f"{self.name}: {who} works there {since}; wait for it, or choose another place"
        return (
            f"{self.name}: {who} may work there {since}, which cannot be seen from here; delete "
            f"{self.path} if that run is dead"
        )


def missing(path: Path) -> list[Path]:
    """Those of a path and the folders above it that do not exist, the deepest first.

    Raises:
        OSError: there cannot be such a path.
    """
    found = []
    for place in (path, *path.parents):
        if place.exists():
            break
        found.append(place)
    return found


def _this_process() -> dict[str, Any]:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "time": now}


def _owner(file: TextIO) -> dict[str, Any]:
    """What the file says; nothing of one that is not whole."""
    file.seek(0)
    try:
        found = json.loads(file.read(4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _same(file: TextIO, path: Path) -> bool:
    """Whether the file is still that of the path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def alive(owner: Mapping[str, Any]) -> bool:
    """Whether a process, by `host` and `pid`, is another one of this host and runs."""
    if owner.get("host") != socket.gethostname() or owner.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, ValueError, KeyError, TypeError):
        return False
    except PermissionError:
        pass
    return True
