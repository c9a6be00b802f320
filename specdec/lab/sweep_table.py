"""The table at the end of a sweep, from what its jobs have left on disk."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.lab.jobs import DONE, FAILED, FINISHED, INTERRUPTED, NEVER, REFUSED, Job, differing
from specdec.lab.method import mark_of

Summary = dict[str, Any]
ENDED_WELL = (FINISHED, DONE)
COLUMNS = ("tok/s", "speedup", "accepted", "nodes", "lossless")
ORDER = (REFUSED, FAILED, INTERRUPTED, NEVER)


def show_sweep(jobs: Sequence[Job], summaries: Sequence[Summary | None], console: Console) -> None:
    """Print the jobs of a sweep beneath each other, named by the words that differ, with their
    figures; then those that have not finished, and why.

    Args:
        summaries: of each job, if it has one.
    """
    names = differing(job.words for job in jobs)
    if any(summaries):
        console.print(_finished(jobs, names, summaries))
    for state in sorted({job.state for job in jobs} - {*ENDED_WELL}, key=_place):
        reasons: dict[str, list[str]] = {}
        for job, name in zip(jobs, names, strict=True):
            if job.state == state:
                reasons.setdefault(job.reason or "", []).append(name)
        console.print(_reasons(state, reasons))


def _finished(
    jobs: Sequence[Job], names: Sequence[str], summaries: Sequence[Summary | None]
) -> Table:
    """Jobs with figures."""
    table = Table(title="sweep", title_justify="left", title_style="bold")
    table.add_column("run", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    remarks = [
        _remarks(job) if summary else "" for job, summary in zip(jobs, summaries, strict=True)
    ]
    if any(remarks):
        table.add_column("")
    for name, summary, remark in zip(names, summaries, remarks, strict=True):
        if summary is not None:
            cells = [*_figures(summary), *[remark] * any(remarks)]
            table.add_row(Text(name), *cells)
    return table


def _place(state: str) -> int:
    return ORDER.index(state) if state in ORDER else len(ORDER)


def _reasons(state: str, runs: dict[str, list[str]]) -> Table:
    """Names of runs by what became of them."""
    table = Table(title=state, title_justify="left", title_style="bold", show_lines=True)
    if any(runs):
        table.add_column("reason", ratio=2)
    table.add_column("runs", ratio=3, overflow="fold")
    for reason, names in runs.items():
        cells = [reason] if any(runs) else []
        table.add_row(*(Text(cell) for cell in (*cells, "\n".join(names))))
    return table


def _remarks(job: Job) -> str:
    """What to know of the figures of a job."""
    return ", ".join([job.state] * (job.state != FINISHED) + ["shared"] * job.shared)


def _figures(summary: Summary) -> list[str]:
    speedup = summary.get("speedup")
    return [
        f"{summary['tokens_per_second']:.1f}",
        f"{speedup:.2f}x" if speedup else "-",
        f"{summary['mean_accepted_length']['pooled']:.2f}",
        f"{summary['drafted_per_step']:.1f}",
        _lossless_cell(summary),
    ]


def _lossless_cell(summary: Summary) -> str:
    lossless, mark = summary["lossless"], mark_of(summary)
    figure = "" if mark else "-"
    if lossless.get("p_value") is not None:
        figure = f"p={lossless['p_value']:.2g}"
    elif lossless.get("checked"):
        figure = f"{lossless['identical']} of {lossless['checked']}"
    if lossless["verdict"] == "failed":
        mark = "[bold red]FAILED[/]"
    return f"{mark} {figure}".strip()
