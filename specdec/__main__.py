"""The commands: `specdec run drafter=ngram`, `specdec compare FOLDER`, `specdec sync FOLDER`.
Without a command it is `run`, so `specdec drafter=ngram` is enough."""

import sys
from collections.abc import Callable
from importlib import import_module

from specdec import __version__
from specdec.lab.options import nearest

COMMANDS = {  # whose modules are imported when they are asked for
    "run": "specdec.run",
    "compare": "specdec.compare.command",
    "audit": "specdec.audit",
    "sync": "specdec.sync",
    "train": "specdec.train",
    "record": "specdec.record",
    "replay": "specdec.replay.command",
}


def main() -> None:
    """Console entry point."""
    words = sys.argv[1:]
    first = words[0] if words else ""
    if first == "--version":
        print(f"specdec {__version__}")
        return
    name = first if first in COMMANDS else "run"
    if first == name:
        del sys.argv[1]
    elif first.isidentifier():
        print(
            f"error: {first}: no such command{nearest(first, COMMANDS)}; there are "
            f"{', '.join(COMMANDS)}, and settings are name=value",
            file=sys.stderr,
        )
        sys.exit(2)
    command: Callable[[], int | None] = import_module(COMMANDS[name]).main
    sys.exit(command())


if __name__ == "__main__":
    main()
