"""How long a call takes on a GPU, and the two ceilings no kernel can beat.

Calls are recorded into a CUDA graph, many in a row, so that launches cost what they cost in a
decoding loop; the graph is replayed and the median replay divided by its calls. Calls take turns
with copies of their inputs, which together exceed the L2 cache.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.lab.command import Positive, option

Call = Callable[[int], Any]  # number of the copy of the inputs -> a tensor or None
Start = Callable[[], Call]  # what one forward pass does before its first call


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Options of everything that is timed in CUDA graphs."""

    replays: Positive = option(25, "of a graph; the median counts")


class Timing(NamedTuple):
    """Median, smallest and largest microseconds of a call, over replays; and what the first call
    gave in the last replay."""

    us: float
    least: float
    most: float
    output: Any


class LostDevice(RuntimeError):  # noqa: N818
    """A kernel has broken the CUDA context; nothing more can be measured in this process."""


def describe(fault: Exception) -> str:
    """A fault in one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def recover() -> None:
    """After a fault: leave the capture it may have broken, and see whether the device answers.

    Raises:
        LostDevice: it does not.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.set_stream(torch.cuda.default_stream())
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError as fault:
        raise LostDevice(describe(fault)) from fault


def copies_beyond_cache(size: int) -> int:
    """How many copies of inputs of `size` bytes take turns, so that none is in the L2 cache when
    its turn comes: four times the cache, and two at least."""
    cache = torch.cuda.get_device_properties(torch.device("cuda")).L2_cache_size
    return max(2, -(-4 * cache // size))


@torch.inference_mode()
def spoil(output: Tensor) -> None:
    """Fill a tensor with what no call gives. What a model's pass gives torch lets be written in
    inference mode alone; every other tensor may be written there too."""
    output.fill_(float("nan") if output.is_floating_point() else -1)


class GraphClock:
    """Times calls inside CUDA graphs.

    Args:
        calls: in one graph; what `start` does is shared by all of them.
        replays: timed ones; the median counts.
        longest: seconds; a graph gets fewer calls if it would take longer to replay.
    """

    def __init__(self, *, calls: int = 32, replays: int = 25, longest: float = 0.03) -> None:
        self.calls, self.replays, self.longest = calls, replays, longest

    def time(self, start: Start, copies: int, *, quick: bool = False) -> Timing:
        """Time the calls of one forward pass.

        Args:
            start: its calls must be safe to capture and must not wait for the device.
            copies: a call gets a number below this.
            quick: few replays, to choose among variants.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call = start()
            for copy in range(min(copies, 3)):  # compiles, allocates, tunes
                call(copy)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(0)
            end.record()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        affordable = int(self.longest / (begin.elapsed_time(end) * 1e-3))
        calls = copies if quick else max(copies, min(self.calls, affordable))

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call = start()
            output = call(0)
            for number in range(1, calls):
                call(number % copies)
        for _ in range(2 if quick else 5):
            graph.replay()
        replays = 5 if quick else self.replays
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        us = [a.elapsed_time(b) * 1e3 / calls for a, b in pairwise(events)]
        if output is not None:  # a replay that writes nothing must not pass for a right one
            spoil(output)
        graph.replay()
        torch.cuda.synchronize()
        return Timing(statistics.median(us), min(us), max(us), output)


@triton.jit
def read_kernel(out_ptr, in_ptr, blocks, programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read blocks of int32 and keep one number of them, so that nothing can be left out."""
    program = tl.program_id(0)
    pointers = in_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.zeros([BLOCK], tl.int32)
    for _ in range(program, blocks, programs):
        kept ^= tl.load(pointers)
        pointers += programs * BLOCK
    tl.store(out_ptr + program, tl.max(kept, 0))


def read_ceiling(clock: GraphClock, *, gigabytes: float = 4.0) -> tuple[float, dict[str, float]]:
    """Bytes per second that a kernel which only reads gets from device memory: of the best launch
    (a median), and of all launches tried (a few replays each)."""
    data = torch.randint(2**31, (int(gigabytes * 2**28),), dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(data.device).multi_processor_count
    starts = {}
    for block, warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8), (16384, 16)):
        for programs in (data.numel() // block, processors * 4, processors * 16):
            read = partial(_read, torch.empty(programs, device="cuda"), data, block, warps)
            starts[f"{programs} programs, {block} words, {warps} warps"] = partial(partial, read)
    tried = {
        name: data.nbytes / (clock.time(start, 1, quick=True).us * 1e-6)
        for name, start in starts.items()
    }
    best = starts[max(tried, key=lambda name: tried[name])]
    return data.nbytes / (clock.time(best, 1).us * 1e-6), tried


def _read(out: Tensor, data: Tensor, block: int, warps: int, _: int) -> Tensor:
    blocks = data.numel() // block
    read_kernel[(len(out),)](out, data, blocks, len(out), BLOCK=block, num_warps=warps)
    return out


def ceilings(clock: GraphClock, result: dict[str, Any]) -> dict[str, float]:
    """Bytes/s and FLOP/s, measured now; the launches tried go to the result."""
    read, result["read_launches"] = read_ceiling(clock)
    return {"read": read, "compute": compute_ceiling(clock)}


def compute_ceiling(clock: GraphClock, *, size: int = 8192) -> float:
    """FLOP per second of a bfloat16 matrix product of random data (zeros would run faster)."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / (clock.time(lambda: lambda _: a @ b, 1).us * 1e-6)
