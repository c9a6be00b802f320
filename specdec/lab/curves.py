"""What trackers show of a run, whichever they are: curves over its steps and tokens, and what it
came to. All of it follows from the records in the folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.flight import Step
from specdec.lab.values import flat

Record = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # columns and rows
COLUMNS = ("prompt", "turn", "category", "tokens", "accepted_length", "finish_reason", "text")


class Curves:
    """Points of curves: means over some steps at a time, and what the run has come to so far.

    Args:
        every: steps of a point.

    Raises:
        ValueError: none.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"tracker.every={every}: must be at least 1")
        self.every = every
        self.known = 0  # steps whose points are where they belong, as of a run that is resumed
        self._pending: list[Step] = []
        self._total: Counter[str] = Counter()
        self._seconds = 0.0

    def add(self, step: Step) -> dict[str, float] | None:
        """The point that this step completes, if it does.

        Returns:
            steps and tokens so far, which are the x axes; means of the steps of the point, as
            `step/batch` (sequences), `step/accepted_length` (tokens), `step/nodes` and
            `time/VERB_ms`; and of all steps so far `so_far/accepted_length`,
            `so_far/acceptance_rate` (accepted of the drafted nodes) and
            `so_far/tokens_per_second`. What nothing was counted of is left out.
        """
        self._pending.append(step)
        self._total += Counter(
            steps=1,
            rows=len(step.requests),
            tokens=sum(step.tokens),
            drafted=sum(step.nodes),
            accepted=sum(step.accepted),
        )
        self._seconds += sum(step.seconds.values())
        return self.rest() if len(self._pending) == self.every else None

    def rest(self) -> dict[str, float] | None:
        """The point of the steps since the last one, if there are any."""
        steps, self._pending = self._pending, []
        total = self._total
        if not steps or total["steps"] <= self.known:
            return None
        count, rows = len(steps), sum(len(step.requests) for step in steps)
        point = {"steps": total["steps"], "tokens": total["tokens"], "step/batch": rows / count}
        if rows:  # the last step may have run for sequences that had already ended
            point["step/accepted_length"] = sum(sum(step.tokens) for step in steps) / rows
            point["step/nodes"] = sum(sum(step.nodes) for step in steps) / rows
        for step in steps:
            for verb, seconds in step.seconds.items():
                name = f"time/{verb}_ms"
                point[name] = point.get(name, 0.0) + seconds * 1e3 / count
        return point | self._so_far()

    def _so_far(self) -> dict[str, float]:
        total = self._total
        ratios = {
            "so_far/accepted_length": (total["tokens"], total["rows"]),
            "so_far/acceptance_rate": (total["accepted"], total["drafted"]),
            "so_far/tokens_per_second": (total["tokens"], self._seconds),
        }
        return {name: amount / per for name, (amount, per) in ratios.items() if per}

    def figures(self, summary: Record) -> dict[str, Any]:
        """What the run came to: summary.json with its keys joined by slashes, and as numbers that
        can be compared across runs `acceptance/length` (tokens per step, pooled),
        `acceptance/rate` (accepted of the drafted nodes) and `acceptance/depth_1`, ... (of the
        trees that reached that depth, the share whose accepted path did)."""
        by_depth = summary.get("acceptance_by_depth", ())
        others = {k: v for k, v in summary.items() if k != "acceptance_by_depth"}
        found = flat(others, joint="/")
        found["acceptance/length"] = summary["mean_accepted_length"]["pooled"]
        if self._total["drafted"]:
            found["acceptance/rate"] = self._total["accepted"] / self._total["drafted"]
        return found | {f"acceptance/depth_{d}": rate for d, rate in enumerate(by_depth, start=1)}


def texts(generations: Sequence[Record]) -> Table:
    """A row for each text."""
    return COLUMNS, [[generation[column] for column in COLUMNS] for generation in generations]
