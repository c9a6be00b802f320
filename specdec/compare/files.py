"""A comparison as files: compare.json with all of it, compare.csv for a spreadsheet, report.html
to read."""

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.compare.figures import Comparison, Entry, Estimate, Group, Share
from specdec.lab.files import make_folder, replace_file, to_json, writing

SCHEMA = 1
JSON, CSV, REPORT = "compare.json", "compare.csv", "report.html"
NUMBERS = (
    *("repetitive", "tokens_per_second", "tokens_per_pass", "nodes_per_step"),
    *("energy", "idle_watts", "predicted_speedup", "repeats", "expected_speed"),
)
ENDS = ("low", "high", "least", "most")


def write_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the three files into a folder, which is made if there is none; returns them.

    Raises:
        ValueError: one cannot be written.
    """
    from specdec.compare import report  # draws, which takes a while to import

    paths = [folder / name for name in (REPORT, CSV, JSON)]
    make_folder(folder)
    replace_file(paths[2], to_json({"schema": SCHEMA, **asdict(comparison)}, indent=1) + "\n")
    replace_file(paths[1], table_of(comparison))
    with writing(paths[0]):
        report.write(comparison, paths[0])
    return paths


def table_of(comparison: Comparison) -> str:
    """As CSV: a row for each method and category, `all` for all of them."""
    rows = [row for group in comparison.groups for row in _rows(group)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(group: Group) -> Iterator[dict[str, Any]]:
    for one in group.entries:
        head = {"group": group.name, "method": one.name, "mark": one.mark, **one.labels}
        head["seeds"] = " ".join(map(str, one.seeds))
        yield {**head, "category": "all", **_figures(one), **_differences(group, one)}
        for name, share in one.by_category.items():
            yield {**head, "category": name or "none", **_share(share)}


def _figures(one: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"conversations": one.conversations, "tokens": one.tokens}
    for name in ("accepted_length", "speedup", "per_request", "unrepetitive"):
        found |= _estimate(name, getattr(one, name))
    found |= {name: getattr(one, name) for name in NUMBERS}
    found |= {f"ms_{verb}": value for verb, value in (one.anatomy or {}).items()}
    found["lossless"] = " ".join(str(run.get("verdict")) for run in one.lossless)
    depths = enumerate(one.acceptance_by_depth, start=1)
    return found | {f"acceptance_{depth}": rate for depth, rate in depths}


def _differences(group: Group, one: Entry) -> dict[str, Any]:
    """What the best of each quantity is to this one."""
    found: dict[str, Any] = {}
    for other in group.differences:
        if other.second == one.name:
            name = f"best_over_this_{other.quantity}"
            found |= {f"best_{other.quantity}": other.first, **_estimate(name, other.ratio)}
            found |= {f"p_{other.quantity}": other.p, f"p_holm_{other.quantity}": other.p_holm}
    return found


def _share(share: Share) -> dict[str, Any]:
    found = {"conversations": share.conversations}
    return (
        found
        | _estimate("accepted_length", share.accepted_length)
        | _estimate("speedup", share.speedup)
    )


def _estimate(name: str, one: Estimate | None) -> dict[str, float | None]:
    """A value with the ends of its interval, or of the range where there is none."""
    ends = {f"{name}_{end}": getattr(one, end, None) for end in ENDS}
    return {name: getattr(one, "value", None), **ends}
