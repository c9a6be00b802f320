"""How near do products with the weights of an 8B Llama come to the roof, ours and cuBLAS's?

    python -m specdec.experiments.bench.run products rows=[1,64,128,256] tune=true
    python -m specdec.experiments.bench.run products fp8=true weights=[down] rows=[1,64]

Each product of a layer, and the output head, by rows of x. Ours are those of exact mode, which
serves up to 64 rows without it too. `tune` tries other launch parameters, of the same splits and
so of the same bits. `fp8` measures the same weights in float8 as well, with a scale for each row:
ours, and torch's product with the weight made wide first; there `tune` tries other splits too.
"""

from collections.abc import Callable, Iterator, Sequence
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
from specdec.kernels.layout import Fp8Weight, Weight
from specdec.kernels.reference import quantise_weight
from specdec.lab.command import Positive, option

WEIGHTS = {  # of Llama-3-8B: function, outputs, inputs
    "qkv": ("linear", 6144, 4096),
    "output": ("linear", 4096, 4096),
    "gate_up": ("gated_linear", 28672, 4096),
    "down": ("linear", 4096, 14336),
    "head": ("project", 128_256, 4096),
}
WORST = 2e-2  # of the norm; rounding to bfloat16 is ten times less
REGISTERS = 128  # of a thread for sums


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    rows: tuple[Positive, ...] = option((1, 16, 64, 128, 192, 256), "of x", varies=True)
    weights: tuple[str, ...] = option(tuple(WEIGHTS), "by name", varies=True)
    fp8: bool = option(False, "weights in float8 beside those in bfloat16")
    tune: bool = option(False, "other launch parameters too")
    out: Path = option(Path("products.json"), "result file")


def products(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Microseconds of each way of every product, to result["products"].

    Raises:
        ValueError: a weight of another name.
    """
    unknown = [name for name in options.weights if name not in WEIGHTS]
    if unknown:
        raise ValueError(f"weights={unknown}: must be of {', '.join(WEIGHTS)}")
    clock = GraphClock(replays=options.replays)
    result["ceilings"] = ceilings(clock, result)
    result["products"] = []
    for name, rows in product(options.weights, options.rows):
        kind, outputs, inputs = WEIGHTS[name]
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        record: dict[str, Any] = {"weight": name, "rows": rows}
        result["products"].append(record)
        copies = copies_beyond_cache(outputs * inputs * 2)
        plain = [
            torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") / inputs**0.5
            for _ in range(copies)
        ]
        record |= timed(kind, x, plain, options, clock, result["ceilings"])
        if options.fp8:
            copies = copies_beyond_cache(outputs * inputs)
            float8 = [quantise_weight(plain[copy % len(plain)]) for copy in range(copies)]
            del plain
            record["fp8"] = timed(kind, x, float8, options, clock, result["ceilings"])
        save()


def timed(
    kind: str,
    x: Tensor,
    weights: Sequence[Weight],
    options: Options,
    clock: GraphClock,
    limits: dict[str, float],
) -> dict[str, Any]:
    """The roof, and the microseconds or the fault of every way to multiply with such weights."""
    first = weights[0]
    operations = 2 * len(x) * first.shape[0] * first.shape[1]
    roof = max(first.nbytes / limits["read"], operations / limits["compute"])
    found: dict[str, Any] = {"roof_us": 1e6 * roof, "us": {}, "faults": {}}
    for way, call in ways(kind, x, weights, tune=options.tune).items():
        try:
            check(kind, call(0), x, first)
            timing = clock.time(partial(_same, call), len(weights), quick=":" in way)
            found["us"][way] = timing.us
        except Exception as fault:
            recover()
            found["faults"][way] = describe(fault)
    return found


def _same(call: Call) -> Call:
    return call


def ways(kind: str, x: Tensor, weights: Sequence[Weight], *, tune: bool) -> dict[str, Call]:
    """Calls by name; other launch parameters have a colon in theirs."""
    from specdec.kernels import gpu
    from specdec.kernels.gpu.linear import gate, mm

    ours = getattr(gpu, kind)

    def theirs(copy: int) -> Tensor:
        found = mm(x, weights[copy])
        return gate(found[None]) if kind == "gated_linear" else found

    found: dict[str, Call] = {
        "cuBLAS": theirs,
        "ours": lambda copy: ours(x, weights[copy], exact=True),
    }
    for blocks in launches(kind, x, weights[0]) if tune else ():
        name = (
            f"ours: {blocks.rows} x {blocks.columns}, {blocks.warps} warps, {blocks.stages} stages"
        )
        if isinstance(weights[0], Fp8Weight):
            name += f", {blocks.splits} splits"
        found[name] = partial(_with, ours, x, weights, blocks)
    return found


def _with(ours: Any, x: Tensor, weights: Sequence[Weight], blocks: Any, copy: int) -> Tensor:
    found: Tensor = ours(x, weights[copy], blocks=blocks)
    return found


def launches(kind: str, x: Tensor, weight: Weight) -> Iterator[Any]:
    """Launch parameters that fit, of the splits that exact mode has; in float8 of half and twice
    as many too, and with room for up to three programs on a multiprocessor."""
    from specdec.kernels.gpu.stream import RING, choose_stream, padded_rows

    outputs, inputs = weight.shape
    gated, float8 = kind == "gated_linear", isinstance(weight, Fp8Weight)
    chosen = choose_stream(
        rows=len(x),
        outputs=outputs,
        inputs=inputs,
        dtype=x.dtype,
        whole=kind == "project",
        gated=gated,
        exact=True,
        float8=float8,
    )
    halves, tile = (2 if gated else 1), padded_rows(len(x), gated=gated)
    itemsize = 1 if float8 else x.itemsize
    divisions = {chosen.splits}
    if float8 and kind == "linear":
        divisions |= {max(1, chosen.splits // 2), 2 * chosen.splits}
    found: dict[Any, None] = {}  # in order
    for rows, columns, warps in product((64, 128, 256), (64, 128, 256), (4, 8)):
        line = halves * rows * itemsize + tile * x.itemsize
        fits = halves * rows * tile <= REGISTERS * 32 * warps and rows >= 16 * warps
        if not fits or columns == (64 if float8 and len(x) <= 128 else 256 if not float8 else 0):
            continue
        shaped = replace(chosen, rows=rows, columns=columns, warps=warps)
        for share, splits in product((1, 2, 3) if float8 else (1,), sorted(divisions)):
            stages = min(RING // share // (line * columns), 10)
            if stages >= 2:
                found[replace(shaped, stages=stages, splits=splits)] = None
    yield from found


def check(kind: str, found: Tensor, x: Tensor, weight: Weight) -> None:
    """Raise ArithmeticError unless it is the product, in float32 but for rounding."""
    wide = weight.dequantised(torch.float32) if isinstance(weight, Fp8Weight) else weight.float()
    wanted = x.float() @ wide.T
    if kind == "gated_linear":
        opening, up = wanted.chunk(2, dim=1)
        wanted = torch.nn.functional.silu(opening) * up
    found = found.float().sum(0) if found.dim() == 3 else found.float()
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= WORST:
        raise ArithmeticError(f"wrong: relative error {error:.2g}")
