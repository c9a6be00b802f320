"""How near do products with the weights of an 8B Llama come to the roof, ours and cuBLAS's?

    python -m specdec.experiments.bench.run products rows=[1,64,128,256] tune=true

Each product of a layer, and the output head, by rows of x. Ours are those of exact mode, which
serves up to 64 rows without it too. `tune` tries other launch parameters, of the same splits and
so of the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.bench.clock import (
    Call,
    GraphClock,
    Timed,
    ceilings,
    copies_beyond_cache,
    describe,
    recover,
)
from specdec.lab.command import Positive, option

WEIGHTS = {  # of Llama-3-8B: function, outputs, inputs
    "queries, keys, values": ("linear", 6144, 4096),
    "attention's output": ("linear", 4096, 4096),
    "gate and up": ("gated_linear", 28672, 4096),
    "down": ("linear", 4096, 14336),
    "output head": ("project", 128_256, 4096),
}
WORST = 2e-2  # of the norm; rounding to bfloat16 is ten times less
REGISTERS = 128  # of a thread for sums


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    rows: tuple[Positive, ...] = option((1, 16, 64, 128, 192, 256), "of x", varies=True)
    tune: bool = option(False, "other launch parameters too")
    out: Path = option(Path("products.json"), "result file")


def products(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Microseconds of each way of every product, to result["products"]."""
    clock = GraphClock(replays=options.replays)
    result["ceilings"] = ceilings(clock, result)
    result["products"] = []
    for (name, (kind, outputs, inputs)), rows in product(WEIGHTS.items(), options.rows):
        copies = copies_beyond_cache(outputs * inputs * 2)
        weights = [
            torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") / inputs**0.5
            for _ in range(copies)
        ]
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        bytes_, operations = outputs * inputs * 2, 2 * rows * outputs * inputs
        limits = result["ceilings"]
        record: dict[str, Any] = {
            "weight": name,
            "rows": rows,
            "roof_us": 1e6 * max(bytes_ / limits["read"], operations / limits["compute"]),
            "us": {},
            "faults": {},
        }
        result["products"].append(record)
        for way, call in ways(kind, x, weights, tune=options.tune).items():
            try:
                check(kind, call(0), x, weights[0])
                record["us"][way] = clock.time(partial(_same, call), copies, quick=":" in way).us
            except Exception as fault:
                recover()
                record["faults"][way] = describe(fault)
        save()


def _same(call: Call) -> Call:
    return call


def ways(kind: str, x: Tensor, weights: list[Tensor], *, tune: bool) -> dict[str, Call]:
    """Calls by name; other launch parameters have a colon in theirs."""
    from specdec.kernels import gpu
    from specdec.kernels.gpu.linear import gate

    ours = getattr(gpu, kind)

    def theirs(copy: int) -> Tensor:
        found = torch.mm(x, weights[copy].T)
        return gate(found[None]) if kind == "gated_linear" else found

    found: dict[str, Call] = {
        "cuBLAS": theirs,
        "ours": lambda copy: ours(x, weights[copy], exact=True),
    }
    for blocks in launches(kind, x, weights[0]) if tune else ():
        name = (
            f"ours: {blocks.rows} x {blocks.columns}, {blocks.warps} warps, {blocks.stages} stages"
        )
        found[name] = partial(_with, ours, x, weights, blocks)
    return found


def _with(ours: Any, x: Tensor, weights: list[Tensor], blocks: Any, copy: int) -> Tensor:
    found: Tensor = ours(x, weights[copy], blocks=blocks)
    return found


def launches(kind: str, x: Tensor, weight: Tensor) -> Iterator[Any]:
    """Launch parameters that fit, of the splits that exact mode has."""
    from specdec.kernels.gpu.stream import RING, choose_stream, padded_rows

    outputs, inputs = weight.shape
    gated = kind == "gated_linear"
    chosen = choose_stream(
        rows=len(x),
        outputs=outputs,
        inputs=inputs,
        dtype=x.dtype,
        whole=kind == "project",
        gated=gated,
        exact=True,
    )
    halves, tile = (2 if gated else 1), padded_rows(len(x), gated=gated)
    for rows, columns, warps in product((64, 128, 256), (64, 128), (4, 8)):
        lines = halves * rows + tile
        stages = min(RING // (lines * columns * x.itemsize), 10)
        if halves * rows * tile > REGISTERS * 32 * warps or rows < 16 * warps or stages < 2:
            continue
        yield replace(chosen, rows=rows, columns=columns, warps=warps, stages=stages)


def check(kind: str, found: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise ArithmeticError unless it is the product, in float32 but for rounding."""
    wanted = x.float() @ weight.float().T
    if kind == "gated_linear":
        opening, up = wanted.chunk(2, dim=1)
        wanted = torch.nn.functional.silu(opening) * up
    found = found.float().sum(0) if found.dim() == 3 else found.float()
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= WORST:
        raise ArithmeticError(f"wrong: relative error {error:.2g}")
