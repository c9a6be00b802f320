"""Compare runs: which method wins where, and is it more than chance?

    specdec compare runs/sweep
    specdec compare runs/ngram runs/pld out=compare/lookups

Prints tables and three sentences for all runs that did the same work, and writes report.html,
compare.csv and compare.json.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from specdec.compare.comparing import compare
from specdec.compare.figures import Comparison
from specdec.compare.files import write_all
from specdec.compare.read import is_run
from specdec.compare.shown import show
from specdec.lab.command import option, run_main
from specdec.lab.files import make_folder
from specdec.lab.lines import tell


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    runs: tuple[Path, ...] = option(about="folders of runs or of sweeps", free=True)
    out: Path | None = option(None, "folder of the files; the sweep's, or compare")


def work(options: Options) -> None:
    out = options.out or _place(options.runs)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: must be a folder")
    found = compare(options.runs)
    make_folder(out)  # before pages of tables
    finish(found, out, Console())


def finish(comparison: Comparison, out: Path, console: Console) -> list[Path]:
    """Show a comparison and write its files into a folder; returns them."""
    show(comparison, console)
    paths = write_all(comparison, out)
    tell(console, f"report in {paths[0]}")
    return paths


def _place(runs: tuple[Path, ...]) -> Path:
    """The folder of a sweep that is compared alone, else `compare`."""
    alone = len(runs) == 1 and runs[0].is_dir() and not is_run(runs[0])
    return runs[0] if alone else Path("compare")


main = partial(run_main, Options, work, doc=__doc__)
