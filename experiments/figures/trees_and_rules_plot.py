"""Tables and plots of what `trees_and_rules.py` measures: what tree policies and acceptance rules
are worth over a tuned chain with token-wise sampling. Needs no GPU."""

from collections.abc import Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from specdec.compare.canvas import COLOURS, by_powers_of_two, canvas, save
from specdec.experiments.figures.markdown import device, interval, piece, source, table
from specdec.lab.metrics import pooled
from specdec.lab.statistics import Ratio, ratio

Entry = Mapping[str, Any]
SHORT = {"top_k": "top-k", "sample": "sampled", "sample_with_replacement": "with replacement"}
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


def compared(entry: Entry, other: Entry, key: str = "steps") -> Ratio:
    """How many times fewer steps (or seconds) than another for the same tokens, with its 95 %
    jackknife interval over prompts, or over batches, whose prompts share their seconds."""
    names = [name for name in other["prompts"] if name in entry["prompts"]]
    sums: dict[str, list[float]] = {"mine": [], "theirs": []}
    for _, group in groupby(names, lambda name: (key == "steps" and name, _seconds(other, name))):
        together = list(group)
        for side, one in (("mine", entry), ("theirs", other)):
            sums[side].append(sum(one["prompts"][name][key] for name in together))
    return ratio(sums["theirs"], sums["mine"])


def _seconds(entry: Entry, name: str) -> float:
    seconds: float = entry["prompts"][name]["seconds"]
    return seconds


def accepted_length(entry: Entry) -> Ratio:
    """Pooled over all prompts."""
    prompts = entry["prompts"].values()
    return ratio([one["tokens"] for one in prompts], [one["steps"] for one in prompts])


def budgets_of(result: Entry) -> list[int]:
    return sorted({entry["budget"] for entry in result["methods"].values()})


def lengths(result: Entry, axis: str) -> list[str]:
    """A table: accepted length by budget, of the best setting of each."""
    budgets = budgets_of(result)
    found = {budget: best(result, axis, budget) for budget in budgets}
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    rows = []
    for name in names:
        word, _, rest = name.partition(" ")
        cells = (
            interval(*accepted_length(entries[name]).around) if name in entries else ""
            for entries in found.values()
        )
        rows.append([f"`{word}` {rest}".strip(), *cells])
    return table([axis, *(f"{budget} nodes" for budget in budgets)], rows)


def tree_lengths(result: Entry) -> str:
    """The tables of `--grid lengths`."""
    settings = result["settings"]
    count = len(next(iter(result["methods"].values()))["prompts"])
    lines = [
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, temperature 1: "
        f"{count} prompts of HumanEval and MT-Bench, {settings['tokens']} new tokens each, tokens "
        f"over steps of all prompts with 95 % jackknife intervals over prompts; at every budget "
        f"of nodes the best setting of each policy ({source(result, 'tree_lengths')}). "
        f"{worth(result)} Policies with sampled children and recursive rejection, chains with "
        f"token-wise sampling; `cost_aware` is after speed, here that of a CPU, where nodes are "
        f"dear. Settings were chosen on these prompts; some of them are among those that "
        f"`rates=zoo` was measured on:",
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
        gain = interval(*compared(found[name], chain_of(result, budget)).around)
        said.append(f"the best {'tree' if axis == 'policy' else axis}, `{name}`, {gain}")
    return (
        f"With up to {budget} nodes the accepted length of the tuned chain with token-wise "
        f"sampling is multiplied by: {'; '.join(said)}."
    )


def tree_speed(result: Entry) -> str:
    """The table of `--grid speed`."""
    settings, methods = result["settings"], result["methods"]
    plain = methods["none"]
    chains = [one for one in methods.values() if one.get("rule") == "tokenwise"]
    chain = max(chains, key=_speed)
    fixed = [one for one in methods.values() if one["policy"] in ("static", "chain")]
    top = max(fixed, key=_speed)
    aware = next(
        one for one in methods.values() if (one["policy"], one["axis"]) == ("cost_aware", "policy")
    )
    against = interval(*compared(aware, top, "seconds").around)
    units = "prompts" if settings["batch"] == 1 else "batches"
    file = f"tree_speed{'' if settings['batch'] == 1 else '_batch' + str(settings['batch'])}"
    about = (
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, one "
        f"{device(result)}, temperature 1, batch {settings['batch']}: "
        f"{len(plain['prompts'])} prompts, {settings['tokens']} new tokens each, all methods in "
        f"turns, by device time of all steps, with 95 % jackknife intervals over {units} "
        f"({source(result, file)}). `cost_aware` chose its tree beforehand, "
        f"from acceptance (measured on a few of these prompts) and costs; its speed over that of "
        f"the fastest fixed tree of the grid ({_named(top)}, chosen afterwards) is {against}:"
    )
    others = (entry for entry in methods.values() if entry is not plain)
    shown = [*sorted(others, key=_speed, reverse=True), plain]
    rows = []
    for entry in shown:
        found = pooled(entry)
        over = [
            interval(*compared(entry, other, "seconds").around) if entry is not plain else ""
            for other in (plain, chain)
        ]
        children, nodes = SHORT.get(entry.get("children", ""), ""), str(entry.get("nodes", 0))
        speed, length = f"{found['tokens_per_second']:.0f}", f"{found['accepted_length']:.2f}"
        rows.append([_named(entry), f"`{entry['rule']}`", children, nodes, speed, length, *over])
    heads = ["tree", "rule", "children", "nodes", "tokens/s", "accepted length", "over `none`"]
    return piece(about, [*heads, "over the tuned chain"], rows)


def _speed(entry: Entry) -> float:
    return pooled(entry)["tokens_per_second"]


def _named(entry: Entry) -> str:
    return f"`{entry['policy']}` {entry.get('setting', '')}".strip()


def plot(result: Entry, path: Path, *, axis: str) -> None:
    """Accepted length over that of the tuned chain with token-wise sampling, by budget."""
    budgets = budgets_of(result)
    figure, ((axes,),) = canvas(7.2, 4.4)
    found = {budget: best(result, axis, budget) for budget in budgets}
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    reference = "chain" if axis == "policy" else "tokenwise (chain)"
    names.remove(reference)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label=reference)
    for place, name in enumerate(names):
        shift = 1.0 + 0.05 * (place - (len(names) - 1) / 2) / len(names) * 4
        points = [
            (budget * shift, *compared(entries[name], chain_of(result, budget)).around)
            for budget, entries in found.items()
            if name in entries
        ]
        x, y, low, high = zip(*points, strict=True)
        below = [middle - end for middle, end in zip(y, low, strict=True)]
        above = [end - middle for middle, end in zip(y, high, strict=True)]
        style = {"fmt": "o-", "ms": 4, "lw": 1.2, "capsize": 2, "elinewidth": 0.8}
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(x, y, yerr=[below, above], color=colour, label=name, **style)
    by_powers_of_two(axes, budgets)
    axes.set_xlabel("nodes drafted per step at most")
    axes.set_ylabel("accepted length over the tuned chain's")
    axes.set_title(f"{TITLES[axis]}, temperature 1", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    save(figure, path)


PLOTS = {"trees": partial(plot, axis="policy"), "rules": partial(plot, axis="rule")}
