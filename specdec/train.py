"""The command line that trains a drafter: `python -m specdec.train data=FOLDER minutes=6.5`.

Whatever is wrong with the settings ends in one line on stderr and exit code 2, before any model is
loaded where that is possible. Other exit codes: 0 all is well, 130 it was interrupted, 1 anything
else: a full GPU in one line, what nobody thought of with a traceback. One training, no sweep: `-m`
is refused.
"""

import sys
from functools import partial

import transformers
from rich.console import Console

from specdec import __version__
from specdec.lab.command import ended
from specdec.lab.files import check_folder
from specdec.lab.options import usage
from specdec.lab.settings import (
    FOLDERS,
    continuing,
    find_own_code,
    folders_of,
    out_of,
    settings_of,
    split,
)
from specdec.reasons import in_memory
from specdec.training.run import train

HELP = """\
python -m specdec.train [--config-dir FOLDER] WORDS

Trains a drafter for a target on texts, and on text that the target writes. A word is group=option,
or setting=value with the value in YAML, as in
    python -m specdec.train method=eagle3 target=zoo data=[texts,python] minutes=6.5 out=heads/mine
Of a group one option counts; its settings follow, with their defaults. ??? must be given.
--config-dir FOLDER adds options of your own, --version the version."""


def main() -> None:
    """Console entry point."""
    find_own_code()
    sys.exit(ended(partial(_command, sys.argv[1:])))


def _command(arguments: list[str]) -> None:
    """Do what was typed."""
    words, flags = split(arguments)
    if {"--version", "--help", "-h"} & set(flags):
        about = f"specdec {__version__}"
        print(about if "--version" in flags else usage(folders_of(flags), "train", HELP))
        return
    for flag in flags:
        if flag.startswith("-") and flag.partition("=")[0] not in FOLDERS:
            raise ValueError(f"{flag}: training has no such option; --help lists them")
    transformers.utils.logging.set_verbosity_error()
    settings = settings_of([*words, *flags], "train")
    out = out_of(settings)
    check_folder(out, "a training")
    again = continuing(arguments, out, "train", "auto")
    with in_memory("lower batch, chunk or own_text.batch"):
        train(settings, out, Console(), words=words, again=again)


if __name__ == "__main__":
    main()
