"""CUDA graphs of what a step does, so that the host launches one thing instead of hundreds."""

import logging
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from specdec.ranks import here
from specdec.reasons import first_line

T = TypeVar("T")
log = logging.getLogger(__name__)


class Graphs:
    """Functions over tensors that stay where they are, called the first time, captured the second
    and replayed from then on. Where capturing is off they are always called.

    What a function returns lives in memory that its next replay, and that of any other graph,
    may write to: it is of use within a step. Graphs of one `Graphs` must run one after the other,
    in the same order, and those that read each other's results must be captured in the same step.

    Args:
        enabled: whether to capture.

    Attributes:
        counts: how often functions were called, captured and replayed, by the first part of their
            key.
        obstacle: why capturing was given up, None if it was not.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.obstacle: str | None = None
        self.counts: dict[str, dict[str, int]] = {}
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def run(self, name: str, key: Hashable, function: Callable[[], T]) -> T:
        """What `function` returns; (name, key) says which one it is, and with which tensors."""
        key = name, key
        found = self._captured.get(key)
        if found is None and self.enabled and key in self._seen:
            found = self._capture(key, function)
            self._count(name, "captured", found is not None)
        self._seen.add(key)
        if found is None:
            self._count(name, "called")
            return function()
        graph, result = found
        graph.replay()
        self._count(name, "replayed")
        again: T = result
        return again

    def _capture(
        self, key: Hashable, function: Callable[[], Any]
    ) -> tuple[torch.cuda.CUDAGraph, Any] | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, result, obstacle = torch.cuda.CUDAGraph(), None, ""
        # NCCL has a thread that watches over its operations, and may go on.
        mode = "global" if here().size == 1 else "thread_local"
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
                result = function()
        except RuntimeError as error:  # something in the model waits for the device
            obstacle = first_line(error)
        if not here().least(int(not obstacle)):  # on any rank: all must launch the same
            self.enabled = False
            self._captured.clear()  # what was captured leaves no trace in Python objects
            self.obstacle = obstacle or "another rank could not capture them"
            log.warning("steps run without CUDA graphs: %s", self.obstacle)
            torch.cuda.synchronize()
            return None
        self._captured[key] = graph, result
        return graph, result

    def _count(self, name: str, what: str, by: int = 1) -> None:
        counts = self.counts.setdefault(name, {"called": 0, "captured": 0, "replayed": 0})
        counts[what] += by
