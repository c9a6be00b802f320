"""What all plots share."""

from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#117733")


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure, inches wide and high, and its panels [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def by_powers_of_two(axes: Any, ticks: list[int], labels: list[str] | None = None) -> None:
    """An axis of sizes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels or list(map(str, ticks)))
    axes.minorticks_off()
