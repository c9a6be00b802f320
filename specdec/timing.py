"""Stopwatch: where the time of a run goes, by device events on a GPU and by the clock on a CPU."""

import time

import torch

Mark = tuple[str, float | torch.cuda.Event]


class Stopwatch:
    """Divides time into named laps without gaps: one begins where the last ended.

    On CUDA a lap ends when the device has done the work queued so far; marking it waits for
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget what was before."""
        self._marks: list[Mark] = [("", self._now())]

    def lap(self, name: str) -> None:
        """What happened since the last mark was `name`; the same name may return."""
        self._marks.append((name, self._now()))

    def take(self) -> "Laps":
        """The laps since the last `take` or `start`."""
        marks, self._marks = self._marks, self._marks[-1:]
        return Laps(marks)

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Laps:
    """Some laps of a stopwatch."""

    def __init__(self, marks: list[Mark]) -> None:
        self._marks = marks

    def read(self) -> dict[str, float]:
        """Seconds by name. On CUDA this waits for the last of them."""
        last = self._marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) or isinstance(after, float):
                elapsed = after - before  # type: ignore[operator]
            else:
                elapsed = before.elapsed_time(after) / 1e3
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds
