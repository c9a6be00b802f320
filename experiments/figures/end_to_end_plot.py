"""Figures, table and plot of what `end_to_end.py` measures; needs no GPU."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markdown import Markdown
from rich.text import Text

from specdec.compare.canvas import COLOURS, by_powers_of_two, canvas, save
from specdec.experiments.figures.markdown import (
    device,
    interval,
    number,
    piece,
    source,
    weights_of,
)

ENTRIES = {  # what a page shows, by the beginning of a method's name
    "none": "`none`",
    "small_llama": "`small_llama`, {part}: {detail}",
    "{drafter} ": "`{part}`: {detail}",  # whose name its part has: ngram and heads
    "generate": "transformers `generate`",
    "assisted": "transformers assisted, {detail}",
    "prompt lookup": "transformers prompt lookup",
}
BARS = {  # what the plot calls them, if not by the part
    "none": "none",
    "generate": "transformers generate",
    "prompt lookup": "transformers prompt lookup",
    "assisted": "transformers assisted",
}


def measured(part: Mapping[str, Any]) -> dict[str, Any]:
    """The methods of a part that have figures."""
    return {name: one for name, one in part["methods"].items() if "figures" in one}


def best(part: Mapping[str, Any], beginning: str = "") -> tuple[str, Any] | None:
    """The fastest method of the grid whose name begins so; None if none was measured."""
    able = [one for one in measured(part).items() if one[0].startswith(beginning)]
    return max(able, default=None, key=lambda pair: pair[1]["figures"]["all"]["tokens_per_second"])


def fastest(part: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Of each entry that a part has: its key, the fastest method's label and what it measured."""
    drafter = part["part"].partition(" ")[0]
    for entry, label in ENTRIES.items():
        beginning = entry.format(drafter=drafter)
        found = best(part, beginning)
        if found is not None:
            detail = found[0].removeprefix(beginning).strip(" ,")
            yield entry, label.format(part=part["part"], detail=detail), found[1]


def end_to_end(*results: Mapping[str, Any], files: Sequence[str] = ("end_to_end",)) -> str:
    """The table of a page: the fastest tree of each grid. Several results are of other settings,
    and only the first says how they are measured; `files` hold them."""
    first, *others = results
    tokens = first["settings"]["tokens"]
    about = (
        f"{_measured_on(first)}. Tokens/s is {tokens - 1} over "
        f"the time of such a run less that of a run of one token, by the clock, which flatters "
        f"methods with few steps by up to 1 / steps; the next column, all tokens over the device "
        f"time of all steps, does not. Of each grid of trees the fastest is shown; over `none` in "
        f"the same turns, with 95 % jackknife intervals over prompts (batch 1). Identical: "
        f"outputs equal to those of `none`, token for token; of the others, how many part at a "
        f"gap of logits within the rounding bound of `specdec/lab/lossless.py` "
        f"({source(first, files[0])}):"
    )
    heads = ["T, batch", "method", "tokens/s", "by steps", "HumanEval", "MT-Bench"]
    heads += ["accepted length", "over `none`", "identical", "explained"]
    pieces = [piece(about, heads, _rows(first))]
    for one, file in zip(others, files[1:], strict=True):
        about = f"The same of {_measured_on(one)} ({source(one, file)}):"
        pieces.append(piece(about, heads, _rows(one)))
    return "\n\n".join(pieces)


def _measured_on(result: Mapping[str, Any]) -> str:
    settings, versions = result["settings"], result["versions"]
    exact = " in exact mode (`kernels.exact=true`)" if settings.get("exact") else ""
    return (
        f"`{settings['target']}`{weights_of(result)} in {settings['dtype']}{exact} on one "
        f"{device(result)}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"raw prompts of HumanEval and MT-Bench ({settings['prompts']} each at batch 1, else the "
        f"first of each file together), {settings['tokens']} new tokens"
    )


def _rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """The fastest tree of each grid; `none` once for each temperature and batch."""
    shown: set[tuple[Any, ...]] = set()
    parts = result["parts"].values()
    for part in sorted(parts, key=lambda part: (part["batch"], part["temperature"])):
        place = part["temperature"], part["batch"]
        for entry, label, method in fastest(part):
            if entry != "none" or place not in shown:
                shown.add(place)
                yield _row(part, label, method)


def gain(found: Mapping[str, Any]) -> str:
    """The speedup over `none`, with its interval if there is one."""
    low, high = found["interval"]
    return interval(found["speedup"], low, high) if low < high else number(found["speedup"])


def _row(part: Mapping[str, Any], title: str, method: Mapping[str, Any]) -> list[str]:
    every, checked = method["figures"]["all"], method.get("agreement")
    cells = [
        f"{part['temperature']:g}, {part['batch']}",
        title,
        f"{every['tokens_per_second']:.0f}",
        number(every.get("step_tokens_per_second"), 0),
        *(
            number(method["figures"].get(name, {}).get("tokens_per_second"), 0)
            for name in ("humaneval", "mt_bench")
        ),
        number(every["accepted_length"]),
        "" if title == "`none`" else gain(every),
        f"{checked['identical']} of {checked['checked']}" if checked else "",
        "",
    ]
    if checked and checked["divergences"]:
        explained = sum(one["explained"] for one in checked["divergences"])
        cells[-1] = f"{explained} of {len(checked['divergences'])}"
    return cells


def table(result: Mapping[str, Any]) -> Group:
    """The same for a terminal, and under it what went wrong."""
    said = []
    if "noise" in result:
        said.append(f"passes differ by {max(result['noise'].values()):.1f} ulp of a logit at most")
    for part in result["parts"].values():
        for name, one in part["methods"].items():
            place = f"T={part['temperature']:g}, batch {part['batch']}, {part['part']}: {name}"
            if "fault" in one:
                said.append(f"{place}: {one['fault']}")
            if one.get("graphs", {}).get("obstacle"):
                said.append(f"{place}: no graphs: {one['graphs']['obstacle']}")
            for gap in one.get("agreement", {}).get("divergences", []):
                if not gap["explained"]:
                    said.append(f"{place}: unexplained: {gap}")
    return Group(Markdown(end_to_end(result)), *map(Text, said))


def bars(result: Mapping[str, Any], temperature: float, batch: int) -> dict[str, Any]:
    """What the plot shows of a temperature and a batch: label -> figures of all."""
    found: dict[str, Any] = {}
    for part in result["parts"].values():
        if (part["temperature"], part["batch"]) != (temperature, batch):
            continue
        for entry, _, method in fastest(part):
            found.setdefault(BARS.get(entry, part["part"]), method["figures"]["all"])
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
        speeds = [one["tokens_per_second"] for one in shown.values()]
        drawn = axes.barh(list(shown), speeds, color=[colours[label] for label in shown])
        notes = [f"{one['tokens_per_second']:.0f}" for one in shown.values()]
        axes.bar_label(drawn, notes, padding=2, fontsize="small")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s, decoding alone")
        axes.set_title(f"batch {batches[0]}, temperature {temperature:g}", fontsize="medium")
    axes = panels[-1]
    for label in labels:
        points = [
            (batch, bars(result, temperatures[0], batch)[label]["tokens_per_second"])
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
