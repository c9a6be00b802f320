"""AcceptanceRates: how often a drafted node is accepted, for tree policies that choose shapes by
it.

`python -m specdec.experiments.tools.measure_acceptance` measures such rates.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specdec.models.fingerprint import fingerprint
from specdec.tables import load_table

if TYPE_CHECKING:
    from specdec.protocols import Loaded

Rates = float | list[float | list[float]]
"""Stated ones: a number for the only child of every node; or by depth, the last entry for all
deeper levels too, each a number or numbers by rank."""
MEASURE = "python -m specdec.experiments.tools.measure_acceptance measures them"


class AcceptanceRates:
    """Chances of drafted nodes by depth and rank: the positional acceptance of Sequoia (Chen et
    al. 2024, section 3.1), though by depth as well, or the accuracies of Medusa's heads (Cai et
    al. 2024, section 2.3.3).

    Args:
        values: [D, R]; values[d, r] is the probability that, given a node at depth d (the root has
            depth 0) was accepted, its child tried as number r is the one accepted next: that of
            rank r among top-k children, the r-th draw among sampled ones.
        about: of what they are: path of their file; drafter, target and draft, by name; models,
            their fingerprints.

    Raises:
        ValueError: no rectangle of numbers from 0 to 1, or a row that sums to more than 1.
    """

    def __init__(self, *, values: Any, about: Mapping[str, Any] | None = None) -> None:
        self.about = about or {}
        self.values: NDArray[np.float64] = _rectangle(values)
        for depth, row in enumerate(self.values):
            if not ((row >= 0.0) & (row <= 1.0)).all():
                raise ValueError(f"rates at depth {depth}: each must be from 0 to 1")
            if row.sum() > 1.0 + 1e-6:
                raise ValueError(
                    f"rates at depth {depth}: siblings exclude each other and must sum to 1 at "
                    f"most, not {row.sum():g}"
                )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        children: str,
        temperature: float,
        top_p: float | None = None,
        setting: str | None = None,
    ) -> "AcceptanceRates":
        """Read a file of `specdec.experiments.tools.measure_acceptance`.

        Its cases are measurements for children chosen one way, at one temperature. That of the
        nearest temperature counts, though never one at temperature 0 for one above or the reverse;
        of several that of the nearest top-p.

        Args:
            path: the file, or the name of one in `specdec/data/acceptance`.
            children: as in `Proposal.children`.
            temperature, top_p: of the target.
            setting: the option that gave `path`, for error messages.

        Raises:
            ValueError: no such file or name, one that holds no such rates, or none for such
                children and temperature; one line that names it.
        """

        def parse(data: Any) -> AcceptanceRates:
            named = data.get("settings") or {}
            about = {name: named.get(name) for name in ("drafter", "target", "draft")}
            about |= {"path": str(path), "models": data.get("models")}
            rates = _case(data["cases"], children, temperature, top_p)["rates"]
            return cls(values=rates, about=about)

        return load_table(path, parse, mend=MEASURE, packaged="acceptance", setting=setting)

    def origin(self, run: "Loaded") -> str:
        """Where they come from, in words, and whether they are of this drafter and these
        models."""
        name, models = self.about.get("path", "given"), self.about.get("models")
        if not models:
            return f"{name}, which does not say of which models it is"
        lm = run.drafter.own_model
        here = {"target": fingerprint(run.target), "draft": lm and fingerprint(lm)}
        drafter = str(self.about["drafter"]).partition(" ")[0]
        if models == here and run.drafter.name == drafter:
            return f"{name}, measured with these models"
        draft = f" of {self.about['draft']}" if models["draft"] else ""
        return (
            f"{name}, measured with {drafter}{draft} for {self.about['target']}, NOT with this "
            f"drafter and these models; {MEASURE}"
        )

    def row(self, depth: int) -> NDArray[np.float64]:
        """[R] chances of the children of a node at this depth; of the last one that was measured
        if it lies deeper."""
        row: NDArray[np.float64] = self.values[min(depth, len(self.values) - 1)]
        return row

    def at(self, depth: int, rank: int) -> float:
        """The same of one child; 0 for ranks beyond those that were measured."""
        row = self.row(depth)
        return float(row[rank]) if rank < row.size else 0.0


def _case(cases: Any, children: str, temperature: float, top_p: float | None) -> Mapping[str, Any]:
    """The case that comes nearest."""

    def fits(case: Mapping[str, Any]) -> bool:
        same_kind = (case["temperature"] == 0) == (temperature == 0)
        return same_kind and bool(case["children"] == children)

    def distance(case: Mapping[str, Any]) -> tuple[float, float]:
        share = 1.0 if top_p is None else top_p
        return abs(case["temperature"] - temperature), abs((case.get("top_p") or 1.0) - share)

    fitting: list[Mapping[str, Any]] = [case for case in cases if fits(case)]
    if not fitting:
        held = dict.fromkeys(f"{case['children']} at {case['temperature']:g}" for case in cases)
        raise ValueError(
            f"holds no rates of children={children} at temperature {temperature:g} "
            f"({', '.join(held) or 'nothing'}); choose other children or another table, "
            f"or {MEASURE}"
        )
    return min(fitting, key=distance)


def _rectangle(values: Any) -> NDArray[np.float64]:
    try:
        found = np.asarray(values)
    except ValueError:  # rows of different lengths
        found = np.empty(0)
    if found.ndim != 2 or not found.size or found.dtype.kind not in "iuf":
        raise ValueError("rates must be lists of numbers, all equally long, in a list")
    return found.astype(np.float64)


def by_depth(rates: Rates, setting: str = "drafter.rates") -> list[list[float]]:
    """Stated rates of each level by rank.

    Raises:
        ValueError: no rates, one outside 0 to 1, or siblings that ascend or sum to more than 1.
    """
    levels = rates if isinstance(rates, list) else [rates]
    rows = [level if isinstance(level, list) else [level] for level in levels]
    for place, row in enumerate(rows or [[]]):
        reason = None
        if not row:
            reason = "there must be at least one"
        elif not all(0.0 <= rate <= 1.0 for rate in row):
            reason = "each must be from 0 to 1"
        elif sorted(row, reverse=True) != row:
            reason = "siblings must be in descending order"
        elif sum(row) > 1.0 + 1e-9:
            reason = f"siblings exclude each other and must sum to 1 at most, not {sum(row):g}"
        if reason:
            raise ValueError(f"{setting}={rates}: depth {place + 1} has {row}; {reason}")
    return rows
