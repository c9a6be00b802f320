"""Draw what a result file holds; needs no GPU.

    python -m specdec.experiments.figures.draw kernel_attention.json tree_lengths.json

The plot of a file lies beside it and has its name, or that of the plot if a file has several.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specdec.experiments.figures import (
    acceptance_plot,
    end_to_end_plot,
    kernels,
    trees_and_rules_plot,
)
from specdec.lab.command import option, run_main

Plot = Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tuple[Path, ...] = option(about="JSON files of results", free=True)


def plots(result: dict[str, Any], path: Path) -> dict[Path, Plot]:
    """What there is to draw of a result, by the file it goes to.

    Raises:
        ValueError: nothing.
    """
    picture = path.with_suffix(".png")
    part = result.get("part", "anatomy" if isinstance(result.get("cases"), dict) else None)
    if part in kernels.PLOTS:
        return {picture: kernels.PLOTS[part]}
    if isinstance(result.get("cases"), list):
        return {picture: acceptance_plot.plot}
    if result.get("settings", {}).get("grid") == "lengths":
        return {
            path.with_name(f"{name}.png"): plot
            for name, plot in trees_and_rules_plot.PLOTS.items()
        }
    if any("methods" in one for one in result.get("parts", {}).values()):
        return {picture: end_to_end_plot.plot}
    raise ValueError(f"{path}: has no plot; choose a file of another experiment")


def work(options: Options) -> None:
    for path in options.files:
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        try:
            result = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path}: not JSON; give a file of results") from None
        for picture, plot in plots(result, path).items():
            plot(result, picture)
            print(picture)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
