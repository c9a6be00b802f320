"""The page of a comparison that is committed: sentences, methods and categories of each group."""

from collections.abc import Mapping
from typing import Any

from specdec.experiments.figures.markdown import Result, interval, number, table

HEADS = ["method", "accepted length", "speedup", "nodes per step", "texts that loop", "lossless"]


def comparison(result: Result) -> str:
    """All groups of a compare.json."""
    report = (
        "Charts, differences by conversation and trees are in the [report](by_category.html), "
        "every number in [JSON](../../experiments/results/by_category.json)."
    )
    pieces = [f"{_machine(result)} {report}"]
    for group in result["groups"]:
        pieces.append(f"## {group['name']}")
        pieces.append(" ".join(group["verdict"]))
        pieces.append("\n".join(table(HEADS, [_row(entry) for entry in group["entries"]])))
        pieces.append("Accepted length by category, of the best setting of each drafter:")
        pieces.append(_by_category(group["entries"]))
    return "\n\n".join(pieces)


def verdict(result: Result) -> str:
    """What the README says of it: three sentences of the first group."""
    group = result["groups"][0]
    return f"**{group['name']}**: {' '.join(group['verdict'])}"


def _machine(result: Result) -> str:
    first = next(iter(result["environment"].values()))
    hardware, versions = first["hardware"], first["versions"]
    return (
        f"{hardware['threads']} threads of {hardware['cpu']}, torch {versions['torch']}; methods "
        f"in turns, 95 % intervals over conversations."
    )


def _row(entry: Mapping[str, Any]) -> list[str]:
    found = sorted({one["verdict"] for one in entry["lossless"]})
    speedup = entry["speedup"]
    return [
        f"`{entry['name']}`",
        _estimate(entry["accepted_length"]),
        _estimate(speedup) if speedup else "",
        number(entry["nodes_per_step"], 1),
        f"{entry['repetitive']:.0%}",
        ", ".join(found),
    ]


def _estimate(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return number(one["value"])
    return interval(one["value"], one["low"], one["high"])


def _by_category(entries: list[Mapping[str, Any]]) -> str:
    best: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        drafter, length = entry["labels"]["drafter"], entry["accepted_length"]["value"]
        if drafter not in best or length > best[drafter]["accepted_length"]["value"]:
            best[drafter] = entry
    names = list(next(iter(best.values()))["by_category"])
    rows = [
        [
            name,
            *(
                number(one["by_category"][name]["accepted_length"]["value"])
                for one in best.values()
            ),
        ]
        for name in names
    ]
    return "\n".join(table(["category", *(f"`{name}`" for name in best)], rows))
