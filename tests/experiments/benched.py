"""What the tests of the benchmarks share: a small case, and a clock that says what was planned."""

from typing import Any

import torch

from specdec.experiments.bench.cases import (
    Case,
    Shape,
)
from specdec.experiments.bench.clock import GraphClock, Timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small_case(
    *, batch: int = 2, context: int = 192, nodes: int = 9, copies: int = 2, **sizes: int
) -> Case:
    shape = Shape(
        batch=batch,
        context=context,
        nodes=nodes,
        **{"heads": 4, "kv_heads": 2, "head_dim": 32, **sizes},
    )
    return Case(shape, copies=copies, page_size=16, dtype=torch.bfloat16, device=DEVICE)


class ScriptedClock(GraphClock):
    """Runs the calls and says they took what was planned, in turn."""

    def __init__(self, *us: float) -> None:
        super().__init__()
        self.us = list(us)

    def time(self, start: Any, copies: int, *, quick: bool = False) -> Timing:
        call = start()
        output, *_ = [call(copy) for copy in range(copies)]
        us = self.us.pop(0) if self.us else 1.0
        return Timing(us, us, us, output)
