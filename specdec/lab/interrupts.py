"""Signals that end a run."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do what Ctrl-C does: KeyboardInterrupt is raised, once. A
    second signal ends the process at once. What is ignored, as under nohup, stays so."""
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: Any) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        ranks: Any = sys.modules.get("specdec.ranks")  # imports torch, which not all have done
        if ranks is not None:
            if ranks.here().parted:
                return  # this process ends already, and says why
            ranks.here().check()  # it may come because another rank is gone
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if signal.getsignal(one) is not signal.SIG_IGN:
                before[one] = signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
