"""Figures, table and plot of what `end_to_end.py` measures; needs no GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from specdec.experiments.figures.canvas import COLOURS, by_powers_of_two, canvas, save
from specdec.experiments.figures.markdown import device, number

BARS = {  # what the plot shows, by the beginning of a method's name
    "none": "none",
    "ngram": "ngram",
    "generate": "transformers generate",
    "prompt lookup": "transformers prompt lookup",
    "assisted": "transformers assisted",
}


def measured(part: Mapping[str, Any]) -> dict[str, Any]:
    """The methods of a part that have figures."""
    return {name: one for name, one in part["methods"].items() if "figures" in one}


def best(part: Mapping[str, Any], beginning: str = "") -> tuple[str, Any] | None:
    """The fastest method of the grid whose name begins so; None if none was measured."""
    able = [
        (name, one)
        for name, one in measured(part).items()
        if name.startswith(beginning) and (beginning or name != "none")
    ]
    return max(able, default=None, key=lambda pair: pair[1]["figures"]["all"]["tokens_per_second"])


def title(part: Mapping[str, Any]) -> str:
    return f"T={part['temperature']:g}, batch {part['batch']}, {part['part']}"


def table(result: Mapping[str, Any], *, best_only: bool = False) -> Group:
    """A line for each method; a star marks the fastest of each part. Under it what went wrong."""
    found = Table(
        *("T", "batch", "method", "tok/s", "accepted", "over none", "HumanEval", "MT-Bench"),
        "identical",
        title=f"{result['settings']['target']}, {result['settings']['tokens']} new tokens",
    )
    notes = []
    for part in result["parts"].values():
        fastest = best(part)
        for name, one in measured(part).items():
            star = fastest is not None and name == fastest[0]
            if best_only and not star and name != "none":
                continue
            every = one["figures"]["all"]
            sets = [one["figures"].get(key, {}) for key in ("humaneval", "mt_bench")]
            checked = one.get("agreement", {})
            found.add_row(
                f"{part['temperature']:g}",
                str(part["batch"]),
                f"{name} *" if star else name,
                number(every["tokens_per_second"], 1),
                number(every["accepted_length"], 2),
                f"{every['speedup']:.2f} ({every['interval'][0]:.2f}-{every['interval'][1]:.2f})",
                *(number(of_set.get("tokens_per_second"), 1) for of_set in sets),
                f"{checked['identical']}/{checked['checked']}" if checked else "-",
            )
        for name, one in part["methods"].items():
            if "fault" in one:
                notes.append(f"{title(part)}: {name}: {one['fault']}")
            if one.get("graphs", {}).get("obstacle"):
                notes.append(f"{title(part)}: {name}: no graphs: {one['graphs']['obstacle']}")
            for gap in one.get("agreement", {}).get("divergences", []):
                if not gap["explained"]:
                    notes.append(f"{title(part)}: {name}: unexplained: {gap}")
    found.caption = caption(result)
    return Group(found, *map(Text, notes))


def caption(result: Mapping[str, Any]) -> str:
    """Beside the lines: what a larger verification costs, and the noise of logits."""
    said = [
        f"{one['nodes']} nodes cost {one['ratio']:.2f} plain steps at batch {one['batch']}"
        for one in result.get("verify_cost", {}).get("ratios", [])
    ]
    if "noise" in result:
        said.append(f"passes differ by {max(result['noise'].values()):.1f} ulp of a logit at most")
    return "; ".join(said)


def bars(result: Mapping[str, Any], temperature: float, batch: int) -> dict[str, tuple[str, Any]]:
    """What the plot shows of a temperature and a batch: label -> (method, figures of all)."""
    found: dict[str, tuple[str, Any]] = {}
    for part in result["parts"].values():
        if (part["temperature"], part["batch"]) != (temperature, batch):
            continue
        for beginning in ("none", "small_llama", "ngram", "generate", "prompt lookup", "assisted"):
            one = best(part, beginning)
            if one is not None:
                label = BARS.get(beginning, part["part"])
                found.setdefault(label, (one[0], one[1]["figures"]["all"]))
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Tokens per second at batch 1 for each temperature, and how they grow with the batch."""
    temperatures = sorted({part["temperature"] for part in result["parts"].values()})
    batches = sorted({part["batch"] for part in result["parts"].values()})
    columns = len(temperatures) + 1
    figure, (panels,) = canvas(4.0 * columns, 4.2, 1, columns)
    labels = list(
        dict.fromkeys(label for t in temperatures for b in batches for label in bars(result, t, b))
    )
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    for axes, temperature in zip(panels, temperatures, strict=False):
        shown = bars(result, temperature, batches[0])
        speeds = [one["tokens_per_second"] for _, one in shown.values()]
        drawn = axes.barh(list(shown), speeds, color=[colours[label] for label in shown])
        notes = [f"{one['tokens_per_second']:.0f}" for _, one in shown.values()]
        axes.bar_label(drawn, notes, padding=2, fontsize="small")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s, decoding alone")
        axes.set_title(f"batch {batches[0]}, temperature {temperature:g}", fontsize="medium")
    axes = panels[-1]
    for label in labels:
        points = [
            (batch, bars(result, temperatures[0], batch)[label][1]["tokens_per_second"])
            for batch in batches
            if label in bars(result, temperatures[0], batch)
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=colours[label], label=label)
    by_powers_of_two(axes, batches)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"by batch, temperature {temperatures[0]:g}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="x-small")
    figure.suptitle(f"{result['settings']['target']} on {device(result)}", fontsize="medium")
    save(figure, path)
