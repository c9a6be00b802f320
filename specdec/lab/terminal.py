"""What a person sees at the end: tables of runs and sweeps."""

from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.lab.method import mark_of
from specdec.lab.metrics import VERBS

Summary = dict[str, Any]
FEEDS = 0.05  # of an accepted length: what degenerate texts may make of it without a word


def show_summary(summary: Summary, console: Console) -> None:
    """Print the figures of a run, beside those of the baseline if there is one."""
    baseline = summary.get("baseline")
    parts = {**summary, **summary.get("own", {})}
    title = (
        f"{parts['drafter']} · tree {parts['tree']} · acceptance {parts['acceptance']} · "
        f"T={summary['temperature']:g} · batch {summary['batch_size']}"
    )
    if summary.get("quantised"):
        title += f" · {summary['quantised']} target"
    if mark := mark_of(summary):
        title = f"{mark} · {title}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("speculative", justify="right")
    sides = [summary]
    if baseline:
        table.add_column("baseline", justify="right")
        sides.append(baseline)

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    if summary["samples"] > 1:
        row("samples of a prompt", [str(summary["samples"])] * len(sides))
    row("tokens", [f"{s['tokens']:,}" for s in sides])
    row("seconds", [f"{s['seconds']:.2f}" for s in sides])
    row("tokens/s", [f"{s['tokens_per_second']:.1f}" for s in sides])
    row("tokens/s without prefill", [f"{s['decode_tokens_per_second']:.1f}" for s in sides])
    if baseline and summary["speedup"]:
        row("speedup", [_speedup(summary), "1.00x"])
    lengths = [s["mean_accepted_length"] for s in sides]
    row("accepted length, pooled", [f"{length['pooled']:.2f}" for length in lengths])
    row(
        "accepted length, mean of requests", [f"{length['per_request']:.2f}" for length in lengths]
    )
    row("tokens per target pass", [f"{s['tokens_per_target_pass']:.2f}" for s in sides])
    row("nodes drafted per step", [f"{s['drafted_per_step']:.1f}" for s in sides])
    for name, count in summary.get("sources", {}).items():
        values = [f"{count['accepted']:,} of {count['drafted']:,}", ""]
        row(f"accepted nodes of {name}", values[: len(sides)])
    for verb in VERBS:
        row(f"time: {verb}", [_share(s["time"][verb], s["seconds"]) for s in sides])
    if summary.get("energy"):
        row("joules per token", [_joules(s) for s in sides])
        row("joules per token above idle", [_joules(s, above=True) for s in sides])
    console.print(table)
    _show_lines(summary, console)


def _show_lines(summary: Summary, console: Console) -> None:
    """What is said below the table."""
    if "energy_reason" in summary:
        console.print(f"energy: not measured, {summary['energy_reason']}", markup=False)
    depths = summary["acceptance_by_depth"]
    if depths:
        console.print(
            "acceptance by depth (accepted lengths are cut at stop and limit, this is not): "
            + "  ".join(f"{i + 1}: {a:.0%}" for i, a in enumerate(depths))
        )
    if line := _repetition_line(summary):
        console.print(line, soft_wrap=True)
    console.print(_lossless_line(summary))


def _speedup(summary: Summary) -> str:
    """With its interval."""
    ends = summary["speedup_interval"]
    about = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"[bold]{summary['speedup']:.2f}x[/bold]{about}"


def _joules(side: Summary, *, above: bool = False) -> str:
    """Of a token; `above` what the card uses when it is idle."""
    used = side.get("energy")
    if not used:
        return "-"
    idle = used["idle_watts"] * used["seconds"] if above else 0.0
    return f"{(used['joules'] - idle) / used['tokens']:.3g}"


def _repetition_line(summary: Summary) -> str:
    """What is to be said if acceptance feeds on texts that repeat themselves; else nothing."""
    found, length = summary["repetitive"], summary["mean_accepted_length"]["pooled"]
    others, texts = found["accepted_length_without"], found["texts"]
    if not texts or (others and abs(length / others["pooled"] - 1) <= FEEDS):
        return ""
    rest = f"is {others['pooled']:.2f} without them" if others else "is that of loops alone"
    return (
        f"[bold]repetition[/bold]: {texts} of {sum(summary['finish_reasons'].values())} texts "
        f"{'loops' if texts == 1 else 'loop'}; the accepted length, {length:.2f}, {rest}"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _lossless_line(summary: Summary) -> str:
    lossless = summary["lossless"]
    loud = {
        "failed": "[bold red]FAILED[/]",
        "suspect": "[bold yellow]SUSPECT[/]",
        "lossy": "LOSSY",
    }
    verdict = loud.get(lossless["verdict"], lossless["verdict"])
    line = f"lossless: {verdict}; {lossless['reason']}"
    for d in lossless.get("divergences", ()):
        gap = "an output ended" if d["logit_gap"] is None else f"logit gap {d['logit_gap']:.3g}"
        gap += ", explained by rounding" if d["explained"] else ", not explained by rounding"
        line += (
            f"\n  prompt {d['prompt']} turn {d['turn']}: differs at token {d['position']}, {gap}"
        )
    return line
