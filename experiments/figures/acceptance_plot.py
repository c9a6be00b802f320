"""The plot of acceptance rates, as `measure_acceptance.py` writes them; needs no models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec.compare.canvas import canvas, save

FLOOR = 2e-4  # rates below it are not drawn


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each case, a line for each depth: rate by rank, with its standard error."""
    from matplotlib import colormaps

    cases = result["cases"]
    lines = list(dict.fromkeys(case["children"] for case in cases))
    columns = sorted(
        {(case["temperature"], case["top_p"]) for case in cases},
        key=lambda law: (law[0], law[1] is not None, law[1] or 0.0),
    )
    size = (3.6 * len(columns) + 0.6, 3.0 * len(lines))
    figure, panels = canvas(*size, len(lines), len(columns))
    drawn = []
    deepest = max(len(case["rates"]) for case in cases)
    for case in cases:
        column = columns.index((case["temperature"], case["top_p"]))
        axes = panels[lines.index(case["children"])][column]
        drawn.append(axes)
        for depth, (rates, errors) in enumerate(zip(case["rates"], case["errors"], strict=True)):
            shown = [
                (rank + 0.06 * (depth - (deepest - 1) / 2), rate, error)
                for rank, (rate, error) in enumerate(zip(rates, errors, strict=True))
                if rate >= FLOOR
            ]
            if shown:
                x, y, spread = zip(*shown, strict=True)
                colour = colormaps["viridis"](0.9 * depth / max(1, deepest - 1))
                axes.errorbar(
                    x, y, yerr=spread, fmt="o-", ms=3, lw=1, color=colour, label=f"depth {depth}"
                )
        top_p = "" if case["top_p"] is None else f", top-p {case['top_p']:g}"
        axes.set_title(f"{case['children']}, T={case['temperature']:g}{top_p}", fontsize="medium")
        axes.set_yscale("log")
        axes.set_ylim(FLOOR, 1.5)
        axes.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("accepted, given its parent")
        for axes in row:
            if axes not in drawn:
                axes.set_axis_off()
            axes.set_xlabel("rank")
            axes.set_xticks(range(result["settings"]["ranks"]))
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    settings = result["settings"]
    figure.suptitle(f"{settings['drafter']} for {settings['target']}", fontsize="medium")
    save(figure, path)
