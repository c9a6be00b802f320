"""What torch.compile makes of the small operations of a layer, beside a kernel that does next to
nothing: the difference is all that a kernel written by hand could gain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor import metrics

from specdec.experiments.bench.clock import GraphClock, Timed
from specdec.experiments.bench.operation import Operation, measure
from specdec.lab.command import option

# Llama-3-8B
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
ROWS, REPETITIONS = (1, 64), 200


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    out: Path = option(Path("kernel_elementwise.json"), "result file")


@triton.jit
def touch_kernel(out_ptr):  # type: ignore[no-untyped-def]
    """Next to nothing: what is left is the cost of a launch."""
    tl.store(out_ptr + tl.program_id(0), 1.0)


def _touch(place: Tensor, programs: int, _: int) -> None:
    touch_kernel[(programs,)](place)


def add_norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and its RMS norm (Zhang & Sennrich 2019)."""
    residual = residual + hidden
    wide = residual.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return residual, weight * normal.to(hidden.dtype)


def rotate_and_write(
    key_tree: Tensor, value_tree: Tensor, joined: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Rotary positions (Su et al. 2021) of joined projections [R, (HQ + 2 HKV) * D]; keys and
    values [HKV, R, D] go to the scratch, queries are returned."""
    heads = joined.unflatten(-1, (-1, cos.shape[-1])).transpose(0, 1)  # [HQ + 2 HKV, R, D]
    value_heads = key_tree.shape[0]
    rotating = heads[:-value_heads]
    low, high = rotating.chunk(2, -1)
    rotated = rotating * cos + torch.cat([-high, low], -1) * sin
    key_tree.copy_(rotated[-value_heads:])
    value_tree.copy_(heads[-value_heads:])
    return rotated[:-value_heads]


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) * up of joined projections [R, 2 I] (Shazeer 2020)."""
    gate, up = joined.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def elementwise_inputs(
    rows: int, device: torch.device
) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Functions by name, with inputs of the 8B shape."""

    def noise(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device)

    trees = [noise(KV_HEADS, rows, HEAD_DIM) for _ in "kv"]
    joined = noise(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = [noise(rows, HEAD_DIM) for _ in "cs"]
    return {
        "residual + RMS norm": (
            add_norm,
            (noise(rows, HIDDEN), noise(rows, HIDDEN), noise(HIDDEN)),
        ),
        "rotary + scratch write": (rotate_and_write, (*trees, joined, *angles)),
        "SwiGLU product": (swiglu, (noise(rows, 2 * INTERMEDIATE),)),
    }


def elementwise(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """us of each operation and of a kernel that does next to nothing, to result["rows"] and
    result["floor"]."""
    device = torch.device("cuda")
    clock = GraphClock(calls=REPETITIONS, replays=options.replays)
    place = torch.empty(132, device=device)
    result["floor"] = {
        f"{programs} programs": clock.time(partial(partial, _touch, place, programs), 1).us
        for programs in (1, 132)
    }
    result["rows"] = []
    for rows in ROWS:
        record: dict[str, Any] = {"rows": rows, "operations": {}}
        result["rows"].append(record)
        for name, (function, arguments) in elementwise_inputs(rows, device).items():
            metrics.reset()
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            operation = Operation(
                partial(_run, compiled, arguments),
                partial(function, *arguments),
                partial(_check_compiled, compiled, function, arguments),
            )
            found = measure(operation, 1, clock)
            found["kernels"] = metrics.generated_kernel_count
            found["bytes"] = sum(tensor.nbytes for tensor in arguments)
            record["operations"][name] = found
        save()


def _run(compiled: Callable[..., Any], arguments: tuple[Tensor, ...], _: int) -> Any:
    return compiled(*arguments)


def _check_compiled(
    compiled: Callable[..., Any], function: Callable[..., Any], arguments: tuple[Tensor, ...]
) -> None:
    mine, wanted = ([tensor.clone() for tensor in arguments] for _ in range(2))
    pairs = [(compiled(*mine), function(*wanted)), *zip(mine, wanted, strict=True)]
    if isinstance(pairs[0][0], tuple):
        pairs[:1] = zip(*pairs[0], strict=True)
    for ours, theirs in pairs:
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        if not difference < 0.01:
            raise ArithmeticError(f"wrong: relative difference {float(difference):.1e}")
