"""An operation, its definition, and how long both take."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.experiments.bench.clock import GraphClock, describe, recover
from specdec.tree import Acceptance


class Operation(NamedTuple):
    """Something a step does.

    Args:
        ours: safe to capture; takes the number of a copy of the inputs.
        torch: the same by the definition, for comparison.
        check: raises ArithmeticError if they disagree.
    """

    ours: Callable[[int], Any]
    torch: Callable[[], Any]
    check: Callable[[], None]


def measure(operation: Operation, copies: int, clock: GraphClock | None) -> dict[str, Any]:
    """us, its range and torch_us of an operation that agrees with its definition; else the
    fault. Without a clock for graphs both by the clock on the wall, without a range."""
    try:
        operation.check()
        if clock is None:
            return {"us": wall_us(lambda: operation.ours(0)), "torch_us": wall_us(operation.torch)}
        timing = clock.time(lambda: lambda copy: _leading(operation.ours(copy)), copies)
        again = _leading(operation.ours(0))
        if again is not None and not torch.equal(timing.output, again):
            raise ArithmeticError("wrong: a replayed graph gives something else")
        return {
            "us": timing.us,
            "least": timing.least,
            "most": timing.most,
            "torch_us": wall_us(operation.torch),
        }
    except Exception as fault:
        recover()
        return {"fault": describe(fault)}


def unlike(mine: Acceptance, wanted: Acceptance) -> Tensor:
    """[B] bool: where two acceptances differ, nodes after the accepted ones aside."""
    past = torch.arange(mine.path.shape[1], device=mine.path.device) >= wanted.length[:, None]
    same = ((mine.path == wanted.path) | past).all(1)
    same &= (mine.length == wanted.length) & (mine.next_token == wanted.next_token)
    return ~same


def _leading(found: Any) -> Tensor | None:
    """One tensor that stands for what an operation gives."""
    if isinstance(found, Acceptance):
        return found.next_token
    one: Tensor | None = found[0] if isinstance(found, tuple) else found
    return one


def wall_us(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median by the clock on the wall, the wait for the device included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    found = []
    for _ in range(repeats + 3):
        wait()
        begun = time.perf_counter()
        call()
        wait()
        found.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(found[3:])
