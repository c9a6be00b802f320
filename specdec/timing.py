"""Stopwatch: where the time of a step goes, by device events on a GPU and by the clock on a
CPU."""

import time

import torch


class Stopwatch:
    """Divides the time since `start` into named laps.

    On CUDA a lap ends when the device has done the work queued so far, which costs no
    synchronisation until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """What happened since the last mark was `name`; the same name may return."""
        self._marks.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name, all laps since `start`."""
        seconds: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) or isinstance(after, float):
                elapsed = after - before  # type: ignore[operator]
            else:
                elapsed = before.elapsed_time(after) / 1e3
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
