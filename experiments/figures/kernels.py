"""Tables and plots from the files `kernel_bench.py` has written; needs no GPU.

    python -m specdec.experiments.figures.kernel_plot experiments/results/kernel_attention.json
    python -m specdec.experiments.figures.kernel_plot experiments/results/kernel_grid.json

prints the table, and draws a plot beside each file of attention times: the fraction of the roof,
which is what memory or arithmetic allow, whichever is slower.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

PEERS = ("ours, no split", "sdpa", "sdpa + gather", "flex default", "flex tuned", "flex split")
COLOURS = {
    "ours": "#0072b2",
    "ours, no split": "#56b4e9",
    "sdpa": "#d55e00",
    "sdpa + gather": "#e69f00",
    "flex default": "#999999",
    "flex tuned": "#009e73",
    "flex split": "#117733",
}


def table(result: dict[str, Any]) -> Group:
    """What a part has measured, and under it the faults."""
    tables: dict[str, Callable[[dict[str, Any]], Table]] = {
        "attention": attention_table,
        "grid": grid_table,
        "steps": operations_table,
        "elementwise": operations_table,
    }
    return Group(tables[result["part"]](result), *map(Text, faults(result)))


def attention_table(result: dict[str, Any]) -> Table:
    """A line for each shape; peers in times of ours."""
    shapes = result.get("shapes", [])
    names = [name for name in PEERS if any(name in shape["methods"] for shape in shapes)]
    planned = any("ours + plan" in shape["methods"] for shape in shapes)
    found = Table(
        *("B", "context", "nodes", "heads", "roof us", "ours us", "of roof", "GB/s", "TFLOP/s"),
        *(["+ plan us"] if planned else []),
        *names,
        caption=f"others in multiples of ours; roof of {_roof(result)}",
    )
    for shape in shapes:
        methods = shape["methods"]
        ours = methods.get("ours", {})
        cells = [str(shape[key]) for key in ("batch", "context", "nodes", "heads")]
        cells.append(number(shape.get("roof_us"), 1))
        cells += [
            number(ours.get(key), digits)
            for key, digits in (("us", 1), ("of_roof", 2), ("gb_per_s", 0), ("tflop_per_s", 0))
        ]
        if planned:
            cells.append(number(methods.get("ours + plan", {}).get("us"), 1))
        cells += [number(methods.get(name, {}).get("over_ours"), 2) for name in names]
        found.add_row(*cells)
    return found


def grid_table(result: dict[str, Any]) -> Table:
    """A line for each batch and context, a column for each size of the trees."""
    shapes = result.get("shapes", [])
    nodes = sorted({shape["nodes"] for shape in shapes})
    found = Table(
        *("heads", "B", "context"),
        *(f"nodes {count}" for count in nodes),
        caption=f"us (fraction of the roof); roof of {_roof(result)}",
    )
    lines: dict[tuple[int, ...], dict[int, str]] = {}
    for shape in shapes:
        ours = shape["methods"].get("ours", {})
        line = lines.setdefault(tuple(shape[key] for key in ("heads", "batch", "context")), {})
        line[shape["nodes"]] = f"{number(ours.get('us'), 1)} ({number(ours.get('of_roof'), 2)})"
    for line_key, cells in lines.items():
        found.add_row(*map(str, line_key), *(cells.get(count, "") for count in nodes))
    return found


def operations_table(result: dict[str, Any]) -> Table:
    """A column for each batch size or number of rows: us, and us of torch without a graph."""
    records = result.get("batches", result.get("rows", []))
    heads = [
        f"{key} {record[key]}" for record in records for key in ("batch", "rows") if key in record
    ]
    floor = result.get("floor", {})
    found = Table(
        "us in a graph (torch without one)",
        *heads,
        caption="; ".join(f"floor, {name}: {us:.2f} us" for name, us in floor.items()),
    )
    names = dict.fromkeys(name for record in records for name in record["operations"])
    for name in names:
        cells = []
        for record in records:
            one = record["operations"].get(name, {})
            cells.append(f"{number(one.get('us'), 2)} ({number(one.get('torch_us'), 0)})")
        found.add_row(name, *cells)
    return found


def faults(result: dict[str, Any]) -> Iterator[str]:
    """Everything without a time, and why."""
    if "fault" in result:
        yield f"stopped: {result['fault']}"
    yield from (f"compile: {fault}" for fault in result.get("compile_ahead", {}).get("faults", []))
    for record in (*result.get("shapes", []), *result.get("batches", []), *result.get("rows", [])):
        keys = ("batch", "context", "nodes", "heads", "rows")
        place = ", ".join(f"{key} {record[key]}" for key in keys if key in record)
        if "fault" in record:
            yield f"{place}: {record['fault']}"
        for name, method in (record.get("methods") or record.get("operations", {})).items():
            if "us" not in method:
                tried = [method, *method.get("variants", {}).values()]
                reasons = [one["fault"] for one in tried if "fault" in one]
                yield f"{place}: {name}: {'; '.join(dict.fromkeys(reasons)) or 'not measured'}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def plot_attention(result: dict[str, Any], path: Path) -> None:
    """A column of dots for each shape, a colour for each implementation."""
    from matplotlib.figure import Figure

    shapes = result["shapes"]
    figure = Figure(figsize=(1.0 + 0.75 * len(shapes), 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        points = [
            (place, shape["methods"][name]["of_roof"])
            for place, shape in enumerate(shapes)
            if "of_roof" in shape["methods"].get(name, {})
        ]
        if points:
            size = 90 if name == "ours" else 36
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=size, c=colour, label=name, zorder=3)
    axes.axhline(1.0, color="black", linewidth=1)
    labels = [
        f"{shape['batch']}\n{_thousands(shape['context'])}\n{shape['nodes']}" for shape in shapes
    ]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_xlabel("sequences, context, nodes of each tree")
    axes.set_ylabel("fraction of the roof")
    axes.set_ylim(0, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(_title(result), fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def plot_grid(result: dict[str, Any], path: Path) -> None:
    """A panel for each batch size and number of heads, a line for each size of the trees."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shapes = [shape for shape in result["shapes"] if "of_roof" in shape["methods"].get("ours", {})]
    heads, batches, nodes = (
        sorted({shape[key] for shape in shapes}) for key in ("heads", "batch", "nodes")
    )
    size = (1.5 + 3.0 * len(batches), 0.6 + 2.6 * len(heads))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heads), len(batches), sharex=True, sharey=True, squeeze=False)
    colours = colormaps["viridis"].resampled(len(nodes) + 1)
    for row, many_heads in zip(panels, heads, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            for index, size_of_tree in enumerate(nodes):
                line = sorted(
                    (shape["context"], shape["methods"]["ours"]["of_roof"])
                    for shape in shapes
                    if (shape["heads"], shape["batch"], shape["nodes"])
                    == (many_heads, batch, size_of_tree)
                )
                if line:
                    x, y = zip(*line, strict=True)
                    axes.plot(x, y, "o-", ms=4, color=colours(index), label=str(size_of_tree))
            axes.set_title(f"batch {batch}, {many_heads} heads", fontsize="medium")
            axes.set_xscale("log", base=2)
            contexts = sorted({shape["context"] for shape in shapes})
            axes.set_xticks(contexts, [_thousands(context) for context in contexts])
            axes.set_ylim(0, 1.05)
            axes.axhline(1.0, color="black", linewidth=1)
            axes.grid(alpha=0.3)
    figure.supxlabel("context")
    figure.supylabel("fraction of the roof")
    figure.suptitle(_title(result), fontsize="medium")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, title="nodes", loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _roof(result: dict[str, Any]) -> str:
    if "ceilings" not in result:
        return "nothing measured"
    read, compute = (result["ceilings"][key] / 1e12 for key in ("read", "compute"))
    return f"{read:.2f} TB/s, {compute:.0f} TFLOP/s"


def _title(result: dict[str, Any]) -> str:
    return f"Tree attention on one {result['hardware']['gpu']}, roof of {_roof(result)}"


PLOTS = {"attention": plot_attention, "grid": plot_grid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    for file in parser.parse_args().files:
        result = json.loads(file.read_text())
        Console().print(table(result))
        if result["part"] in PLOTS:
            PLOTS[result["part"]](result, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
