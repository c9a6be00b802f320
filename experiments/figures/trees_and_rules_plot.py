"""Tables and plots from the files `trees_and_rules.py` has written; needs no GPU.

    python -m specdec.experiments.figures.trees_and_rules_plot experiments/results/tree_lengths.json

draws, beside the file, what tree policies and acceptance rules are worth over a tuned chain with
token-wise sampling.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from specdec.experiments.figures.end_to_end_plot import COLOURS, bootstrap
from specdec.experiments.studies.trees_and_rules import SHORT, pooled

Entry = dict[str, Any]
TITLES = {"policy": "trees, recursive rejection", "rule": "rules, the measured optimal tree"}


def label(entry: Entry) -> str:
    """What a line of a plot or table is called: the policy, or the rule and its children."""
    if entry["axis"] == "policy":
        return str(entry["policy"])
    if entry["policy"] == "chain":
        return f"{entry['rule']} (chain)"
    return f"{entry['rule']} ({SHORT[entry['children']]})"


def best(result: Entry, axis: str, budget: int, key: str = "accepted_length") -> dict[str, Entry]:
    """By label, the entry of the setting with the largest figure."""
    found: dict[str, Entry] = {}
    for entry in result["methods"].values():
        if entry["axis"] != axis or entry["budget"] != budget or not entry["prompts"]:
            continue
        name = label(entry)
        if name not in found or pooled(entry)[key] > pooled(found[name])[key]:
            found[name] = entry
    return found


def chain_of(result: Entry, budget: int) -> Entry:
    """The tuned chain with token-wise sampling."""
    return best(result, "policy", budget)["chain"]


def compared(entry: Entry, other: Entry, key: str = "steps") -> tuple[float, float, float]:
    """How many times fewer steps (or seconds) than another for the same tokens, with its 95 %
    paired bootstrap interval over prompts, or over batches, whose prompts share their seconds."""
    names = [name for name in other["prompts"] if name in entry["prompts"]]
    sums: dict[str, list[float]] = {"mine": [], "theirs": []}
    for _, group in groupby(names, lambda name: (key == "steps" and name, _seconds(other, name))):
        together = list(group)
        for side, one in (("mine", entry), ("theirs", other)):
            sums[side].append(sum(one["prompts"][name][key] for name in together))
    mine, theirs = sums.values()
    low, high = bootstrap(theirs, mine)
    return sum(theirs) / sum(mine), low, high


def _seconds(entry: Entry, name: str) -> float:
    seconds: float = entry["prompts"][name]["seconds"]
    return seconds


def interval(entry: Entry) -> tuple[float, float]:
    """95 % bootstrap interval over prompts of the pooled accepted length."""
    prompts = entry["prompts"].values()
    low, high = bootstrap([one["tokens"] for one in prompts], [one["steps"] for one in prompts])
    return low, high


def budgets_of(result: Entry) -> list[int]:
    return sorted({entry["budget"] for entry in result["methods"].values()})


def lengths(result: Entry, axis: str) -> Iterator[str]:
    """A table: accepted length by budget, of the best setting of each."""
    budgets = budgets_of(result)
    found = {budget: best(result, axis, budget) for budget in budgets}
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    yield f"| {axis} | {' | '.join(f'{budget} nodes' for budget in budgets)} |"
    yield "|---|" + "---|" * len(budgets)
    for name in names:
        cells = []
        for entries in found.values():
            entry = entries.get(name)
            if entry is None:
                cells.append("")
                continue
            low, high = interval(entry)
            length = pooled(entry)["accepted_length"]
            cells.append(f"{length:.2f} ({low:.2f} to {high:.2f})")
        word, _, rest = name.partition(" ")
        yield f"| {f'`{word}` {rest}'.strip()} | {' | '.join(cells)} |"


def tree_lengths(result: Entry) -> str:
    """The tables of `--grid lengths` for the README."""
    settings = result["settings"]
    count = len(next(iter(result["methods"].values()))["prompts"])
    lines = [
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, temperature 1: "
        f"{count} prompts of HumanEval and MT-Bench, {settings['tokens']} new tokens each, tokens "
        f"over steps of all prompts with 95 % bootstrap intervals over prompts; at every budget "
        f"of nodes the best setting of each policy (`{result['command']}`, "
        f"[JSON](experiments/results/tree_lengths.json)). {worth(result)} Policies with sampled "
        f"children and recursive rejection, chains with token-wise sampling; `cost_aware` is "
        f"after speed, here that of a CPU, where nodes are dear. Settings were chosen on these "
        f"prompts; some of them are among those that `rates=zoo` was measured on:",
        "",
        *lengths(result, "policy"),
        "",
        "Rules, for trees on the `optimal` tree of the budget:",
        "",
        *lengths(result, "rule"),
    ]
    return "\n".join(lines)


def worth(result: Entry) -> str:
    """What the best tree and the best rule gain over the tuned chain, in a sentence."""
    budget = budgets_of(result)[-1]
    said = []
    for axis in TITLES:
        found = best(result, axis, budget)
        name = max(found, key=lambda one: pooled(found[one])["accepted_length"])
        ratio, low, high = compared(found[name], chain_of(result, budget))
        said.append(
            f"the best {'tree' if axis == 'policy' else axis}, `{name}`, {ratio:.2f} "
            f"({low:.2f} to {high:.2f})"
        )
    return (
        f"With up to {budget} nodes the accepted length of the tuned chain with token-wise "
        f"sampling is multiplied by: {'; '.join(said)}."
    )


def tree_speed(result: Entry) -> str:
    """The table of `--grid speed` for the README."""
    settings, methods = result["settings"], result["methods"]
    plain = methods["none"]
    chains = [one for one in methods.values() if one.get("rule") == "tokenwise"]
    chain = max(chains, key=_speed)
    fixed = [one for one in methods.values() if one["policy"] in ("static", "chain")]
    top = max(fixed, key=_speed)
    aware = next(
        one for one in methods.values() if (one["policy"], one["axis"]) == ("cost_aware", "policy")
    )
    against = "{:.2f} ({:.2f} to {:.2f})".format(*compared(aware, top, "seconds"))
    units = "prompts" if settings["batch"] == 1 else "batches"
    file = f"tree_speed{'' if settings['batch'] == 1 else '_batch' + str(settings['batch'])}.json"
    device = result["hardware"].get("gpu", result["hardware"]["cpu"])
    lines = [
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, one {device}, "
        f"temperature 1, batch {settings['batch']}: {len(plain['prompts'])} prompts, "
        f"{settings['tokens']} new tokens each, all methods in turns, by device time of all "
        f"steps, with 95 % paired bootstrap intervals over {units} "
        f"(`{result['command']}`, "
        f"[JSON](experiments/results/{file})). `cost_aware` chose its tree beforehand, "
        f"from acceptance (measured on a few of these prompts) and costs; its speed over that of "
        f"the fastest fixed tree of the grid ({_named(top)}, chosen afterwards) is {against}:",
        "",
        "| tree | rule | children | nodes | tokens/s | accepted length | over `none` "
        "| over the tuned chain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = (entry for entry in methods.values() if entry is not plain)
    shown = [*sorted(others, key=_speed, reverse=True), plain]
    for entry in shown:
        found = pooled(entry)
        over = [
            "{:.2f} ({:.2f} to {:.2f})".format(*compared(entry, other, "seconds"))
            if entry is not plain
            else ""
            for other in (plain, chain)
        ]
        cells = [
            _named(entry),
            f"`{entry['rule']}`",
            SHORT.get(entry.get("children", ""), ""),
            str(entry.get("nodes", 0)),
            f"{found['tokens_per_second']:.0f}",
            f"{found['accepted_length']:.2f}",
            *over,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(entry: Entry) -> float:
    return pooled(entry)["tokens_per_second"]


def _named(entry: Entry) -> str:
    return f"`{entry['policy']}` {entry.get('setting', '')}".strip()


def plot(result: Entry, axis: str, path: Path) -> None:
    """Accepted length over that of the tuned chain with token-wise sampling, by budget."""
    from matplotlib.figure import Figure

    budgets = budgets_of(result)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    found = {budget: best(result, axis, budget) for budget in budgets}
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    reference = "chain" if axis == "policy" else "tokenwise (chain)"
    names.remove(reference)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label=reference)
    for place, name in enumerate(names):
        shift = 1.0 + 0.05 * (place - (len(names) - 1) / 2) / len(names) * 4
        points = [
            (budget * shift, *compared(entries[name], chain_of(result, budget)))
            for budget, entries in found.items()
            if name in entries
        ]
        x, y, low, high = zip(*points, strict=True)
        below = [middle - end for middle, end in zip(y, low, strict=True)]
        above = [end - middle for middle, end in zip(y, high, strict=True)]
        axes.errorbar(
            x,
            y,
            yerr=[below, above],
            fmt="o-",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            elinewidth=0.8,
            color=COLOURS[place % len(COLOURS)],
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.minorticks_off()
    axes.set_xlabel("nodes drafted per step at most")
    axes.set_ylabel("accepted length over the tuned chain's")
    axes.set_title(f"{TITLES[axis]}, temperature 1", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="JSON", help="of --grid lengths")
    options = parser.parse_args()
    result = json.loads(options.file.read_text())
    for axis, name in {"policy": "trees", "rule": "rules"}.items():
        plot(result, axis, options.file.with_name(f"{name}.png"))


if __name__ == "__main__":
    main()
