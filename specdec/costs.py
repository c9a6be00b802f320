"""CostTable: what verifying and drafting cost on a machine, for tree policies that weigh one
against the other.

`python -m specdec.experiments.tools.calibrate` measures such a table; `--help` tells of its file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.tables import load_table

CALIBRATE = "python -m specdec.experiments.tools.calibrate"
LOOP = {f"loop_{name}": name for name in ("level", "step", "start", "accept")}


class CostTable:
    """Seconds by linear interpolation inside a measured grid; outside, those of its edge.

    Args:
        verify_grid: batches, nodes and contexts, ascending.
        verify_seconds: one for each combination.
        draft_grid: batches, widths and, if it was measured at several, contexts, ascending.
        draft_seconds: one for each combination.
        loop_batches, loop_level, loop_step: batches, ascending, and for each the seconds that the
            decoding loop adds to a drafted level and to a step.
        loop_start, loop_accept: likewise to a step that drafts, and for each level that it does;
            None for nothing.
        about: of which models and which machine, as `specdec.calibration.about` says it; None if
            nobody knows.

    Raises:
        ValueError: a grid that is empty or not ascending, or seconds that do not fit it or are not
            positive.
    """

    def __init__(
        self,
        *,
        verify_grid: Sequence[Sequence[float]],
        verify_seconds: Any,
        draft_grid: Sequence[Sequence[float]],
        draft_seconds: Any,
        loop_batches: Sequence[float] = (1.0,),
        loop_level: Sequence[float] = (0.0,),
        loop_step: Sequence[float] = (0.0,),
        loop_start: Sequence[float] | None = None,
        loop_accept: Sequence[float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.about = about
        self._verify = _Grid("verify", verify_grid, verify_seconds)
        self._draft = _Grid("draft", draft_grid, draft_seconds)
        added = [one or [0.0] * len(loop_batches) for one in (loop_start, loop_accept)]
        self._loop = np.asarray([loop_batches, loop_level, loop_step, *added], dtype=np.float64)
        if not (np.isfinite(self._loop) & (self._loop >= 0)).all():
            raise ValueError("loop: seconds that are missing or negative")

    @classmethod
    def load(cls, path: str | Path, *, setting: str | None = None) -> "CostTable":
        """Read a file of `specdec.experiments.tools.calibrate`. A combination that it could not
        measure counts as the same one with the longest context that it could. A draft that was
        measured at a single context costs the same at any.

        Args:
            path: the file, or the name of one in `specdec/data/costs`.
            setting: the option that gave `path`, for error messages.

        Raises:
            ValueError: no such file or name, or one that is no such table; one line that names it.
        """
        mend = f"{CALIBRATE} makes one"
        return load_table(path, cls.of, mend=mend, packaged="costs", setting=setting)

    @classmethod
    def of(cls, data: Any) -> "CostTable":
        """What such a file holds.

        Raises:
            KeyError, TypeError, ValueError: it is no such table.
        """
        verify, draft = data["verify"], data["draft"]
        loop = data.get("loop", {})
        if "todo" in str((verify["seconds"], draft["seconds"], loop)):
            raise ValueError(f"unfinished; {CALIBRATE} with resume=true goes on with it")
        axes = ["batch", "width", *["context"] * isinstance(draft["context"], list)]
        return cls(
            verify_grid=[verify[name] for name in ("batch", "nodes", "context")],
            verify_seconds=_filled(verify["seconds"]),
            draft_grid=[draft[name] for name in axes],
            draft_seconds=_filled(draft["seconds"]) if "context" in axes else draft["seconds"],
            about=data.get("about"),
            loop_batches=loop.get("batch", (1.0,)),
            **{name: loop[key] for name, key in LOOP.items() if key in loop},
        )

    @property
    def verify_batches(self) -> list[int]:
        """Batches at which verification was measured."""
        return [int(batch) for batch in self._verify.axes[0]]

    @property
    def most_nodes(self) -> int:
        """The largest trees whose verification was measured, root included."""
        return int(self._verify.axes[1][-1])

    @property
    def most_width(self) -> int:
        """The widest level whose drafting was measured."""
        return int(self._draft.axes[1][-1])

    def verify(self, batch: float, nodes: float, context: float) -> float:
        """Seconds of a pass of the target over trees of that many nodes, root included, each
        sequence having that many tokens before its tree."""
        return self._verify.at(batch, nodes, context)

    def draft(self, batch: float, width: float, context: float) -> float:
        """Seconds of a pass of the draft over a level of that many nodes for each sequence, each
        having that many tokens before its tree."""
        point = batch, width, context
        return self._draft.at(*point[: len(self._draft.axes)])

    def level(self, batch: float) -> float:
        """Seconds that the loop adds to such a pass."""
        return float(np.interp(batch, self._loop[0], self._loop[1]))

    def step(self, batch: float, levels: int = 0) -> float:
        """Seconds of a step beyond verification and draft, if so many levels were drafted: the
        work of a rule may grow with them."""
        step, accept = (np.interp(batch, self._loop[0], self._loop[row]) for row in (2, 4))
        return float(step + levels * accept)

    def start(self, batch: float) -> float:
        """Seconds that a step takes more than that if it drafts at all."""
        return float(np.interp(batch, self._loop[0], self._loop[3]))


class _Grid:
    """A function known at the points of a grid."""

    def __init__(self, name: str, axes: Sequence[Sequence[float]], values: Any) -> None:
        self.axes = [np.asarray(axis, dtype=np.float64) for axis in axes]
        self.values: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
        for axis in self.axes:
            if axis.ndim != 1 or not axis.size or (np.diff(axis) <= 0).any():
                raise ValueError(f"{name}: a grid of {axis.tolist()} is empty or not ascending")
        expected = tuple(axis.size for axis in self.axes)
        if self.values.shape != expected:
            raise ValueError(f"{name}: seconds of shape {self.values.shape}, expected {expected}")
        if not (self.values > 0).all():
            raise ValueError(f"{name}: seconds that are missing or not positive")

    def at(self, *point: float) -> float:
        values = self.values
        for axis, x in zip(self.axes, point, strict=True):
            above = int(np.clip(np.searchsorted(axis, x), 1, max(axis.size - 1, 1)))
            below, above = above - 1, min(above, axis.size - 1)
            span = axis[above] - axis[below]
            share = float(np.clip((x - axis[below]) / span, 0.0, 1.0)) if span else 0.0
            values = values[below] * (1.0 - share) + values[above] * share
        return float(values)


def _filled(seconds: Any) -> NDArray[np.float64]:
    """[batch, nodes, context], null taken from the next shorter context."""
    values = np.array(seconds, dtype=np.float64)
    for place in range(1, values.shape[-1]):
        here = values[..., place]
        here[...] = np.where(np.isnan(here), values[..., place - 1], here)
    return values
