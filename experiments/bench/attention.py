"""Attention of one layer, ours beside its peers (part `attention`) and on a grid of shapes alone
(part `grid`), checked and timed shape by shape.

Times are medians of CUDA graph replays over keys and values that take turns, so that none are in
the L2 cache. "ours" is one layer out of the 32 of a forward pass, which share one plan; "ours +
plan" plans anew for each. The file is written anew after every shape. The roof is what memory or
arithmetic allow, whichever is slower.

Every output is compared with a dense float32 reference on the same inputs before and after it is
timed; a wrong one gets no time.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from specdec.experiments.bench import peers
from specdec.experiments.bench.cases import Case, Shape
from specdec.experiments.bench.clock import (
    Call,
    GraphClock,
    LostDevice,
    Timed,
    ceilings,
    copies_beyond_cache,
    describe,
    recover,
)
from specdec.experiments.bench.peers import Contender
from specdec.kernels import gpu
from specdec.kernels.gpu import plan
from specdec.kernels.layout import TreeLayout
from specdec.lab.command import Positive, option

SHAPES = tuple(
    Shape(batch=batch, context=context, nodes=nodes)
    for batch, context, nodes in (
        (1, 2048, 64),
        (1, 8192, 64),
        (1, 32768, 16),
        (1, 32768, 64),
        (8, 8192, 16),
        (8, 8192, 64),
        (32, 4096, 8),
        (32, 4096, 32),
        (32, 4096, 64),
        (1, 32768, 1),
        (8, 8192, 1),
        (32, 4096, 1),
    )
)
GRID = tuple(
    Shape(batch=batch, context=context, nodes=nodes, heads=heads)
    for heads, batch, context, nodes in product(
        (32, 64), (1, 8, 32), (1024, 4096, 8192, 32768, 131072), (1, 16, 32, 64, 128, 256)
    )
)

# From a case and the results so far, name by name, what is to be measured.
Columns = Callable[[Case, dict[str, Any]], Iterator[tuple[str, Iterable[Contender]]]]


@dataclass(frozen=True, kw_only=True)
class Grid(Timed):
    """Options of the grid, and of the other part as well."""

    shapes: tuple[tuple[Positive, ...], ...] = option(
        (), "[batch,context,nodes] of each, heads and kv_heads may follow; none: the built-in ones"
    )
    page_size: Positive = option(64, "tokens of a page")
    out: Path = option(Path("kernel_grid.json"), "result file")


@dataclass(frozen=True, kw_only=True)
class Options(Grid):
    peers: bool = option(True, "beside SDPA and FlexAttention")
    out: Path = option(Path("kernel_attention.json"), "result file")


def attention(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Shapes of decoding, to result["shapes"]."""
    shapes = [Shape.of(sizes) for sizes in options.shapes] or SHAPES
    if options.peers:
        result["compile_ahead"] = peers.compile_ahead(shapes, options.page_size)
    _attention(shapes, beside_peers if options.peers else all_of_ours, options, result, save)


def grid(options: Grid, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Every combination of sizes, ours alone, to result["shapes"]."""
    _attention([Shape.of(sizes) for sizes in options.shapes] or GRID, alone, options, result, save)


def _attention(
    shapes: Sequence[Shape],
    columns: Columns,
    options: Grid,
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    clock = GraphClock(replays=options.replays)
    result["page_size"] = options.page_size
    result["ceilings"] = ceilings(clock, result)
    result["shapes"] = []
    run(shapes, columns, clock, result, save, page_size=options.page_size)


def ours(
    case: Case, attention: Callable[..., Tensor] = gpu.tree_attention
) -> dict[str, list[Contender]]:
    """Our kernel: with one plan for all calls, with one for each, and without splitting."""

    def attend(layout: TreeLayout | None, options: dict[str, Any], copy: int) -> Tensor:
        return attention(
            case.query,
            case.key_pages[copy],
            case.value_pages[copy],
            case.key_tree[copy],
            case.value_tree[copy],
            case.layout() if layout is None else layout,
            scale=case.scale,
            **options,
        )

    def shared() -> Call:
        return partial(attend, case.layout(), {})

    def unsplit() -> Call:
        call = shared()

        def attend_whole(copy: int) -> Tensor:
            # So small a GPU is full with one program for every sequence and head.
            with mock.patch.object(plan, "processors", return_value=1):
                return call(copy)

        return attend_whole

    def itself(out: Tensor) -> Tensor:
        return out

    return {
        "ours": [Contender("one plan", shared, itself)],
        "ours + plan": [Contender("a plan for each", lambda: partial(attend, None, {}), itself)],
        "ours, no split": [Contender("one piece", unsplit, itself)],
    }


def measure(case: Case, variants: Iterable[Contender], clock: GraphClock) -> dict[str, Any]:
    """Check every variant, time the right ones and keep the fastest.

    Returns:
        us (with least and most), error and variant of the fastest, if any was right; variants: of
        each its us, or the fault that cost it a place.

    Raises:
        LostDevice: a fault that the process does not survive.
    """
    found: dict[str, Any] = {"variants": {}}
    try:
        for method in variants:
            note = found["variants"][method.name] = _measure_one(case, method, clock, found)
            if note.get("us", math.inf) < found.get("us", math.inf) and "rough" not in note:
                found.update(note, variant=method.name)
    except LostDevice:
        raise
    except Exception as fault:  # in making a variant; those made so far count
        found["fault"] = describe(fault)
        recover()
    return found


def _measure_one(
    case: Case, method: Contender, clock: GraphClock, best: dict[str, Any]
) -> dict[str, Any]:
    try:
        _check(case, method.unpack(method.start()(0)))
        if "us" in best:
            rough = clock.time(method.start, case.copies, quick=True).us
            if rough > 1.1 * best["us"]:
                return {"us": rough, "rough": True}
        timing = clock.time(method.start, case.copies)
        error = _check(case, method.unpack(timing.output))
    except Exception as fault:
        recover()
        return {"fault": describe(fault)}
    return {"us": timing.us, "least": timing.least, "most": timing.most, "error": error}


def _check(case: Case, out: Tensor) -> float:
    error, allowed = case.error(out), case.expected[1]
    if not error <= allowed:
        raise ArithmeticError(f"wrong: relative error {error:.1e}, {allowed:.1e} allowed")
    return error


def new_case(shape: Shape, page_size: int) -> Case:
    """Inputs on the GPU, as many copies as it takes."""
    return Case(
        shape,
        copies=copies_beyond_cache(shape.kv_bytes(2)),
        page_size=page_size,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )


def fill(
    record: dict[str, Any],
    case: Case,
    columns: Iterable[tuple[str, Iterable[Contender]]],
    clock: GraphClock,
    roof: dict[str, float],
) -> None:
    """Fill the record of a shape, column by column."""
    shape, begun = case.shape, time.perf_counter()
    itemsize = case.query.dtype.itemsize
    record |= {
        "kv_bytes": shape.kv_bytes(itemsize),
        "flops": shape.flops,
        "roof_us": shape.roof_us(**roof, itemsize=itemsize),
        "copies": case.copies,
        "checked_sequences": len(case.checked),
        "allowed_error": case.expected[1],
    }
    for name, variants in columns:
        method = record["methods"][name] = measure(case, variants, clock)
        if "us" in method:
            method |= {
                "gb_per_s": record["kv_bytes"] / method["us"] * 1e-3,
                "tflop_per_s": shape.flops / method["us"] * 1e-6,
                "of_roof": record["roof_us"] / method["us"],
            }
            if "us" in record["methods"]["ours"]:
                method["over_ours"] = method["us"] / record["methods"]["ours"]["us"]
        record["seconds"] = time.perf_counter() - begun


def alone(case: Case, done: dict[str, Any]) -> Iterator[tuple[str, Iterable[Contender]]]:
    """Our kernel as it is used."""
    yield "ours", ours(case)["ours"]


def all_of_ours(case: Case, done: dict[str, Any]) -> Iterator[tuple[str, Iterable[Contender]]]:
    """And with a plan for every call, and without splitting."""
    yield from ours(case).items()


def beside_peers(case: Case, done: dict[str, Any]) -> Iterator[tuple[str, Iterable[Contender]]]:
    """And the others, which share one contiguous copy of the keys and values."""
    yield from ours(case).items()
    data = peers.Contiguous(case)
    yield "sdpa", peers.sdpa(data)
    # The fastest SDPA, which is known by now.
    yield "sdpa + gather", peers.sdpa_with_gather(data, done["sdpa"].get("variant"))
    for name, options in peers.flex_options(case.shape).items():
        if options:
            yield name, (peers.flex(data, option) for option in options)


def run(
    shapes: Sequence[Shape],
    columns: Columns,
    clock: GraphClock,
    result: dict[str, Any],
    save: Callable[[], None],
    *,
    page_size: int,
) -> None:
    """Measure shapes one after the other into result["shapes"]; `save` is called after each.

    Raises:
        LostDevice: see `measure`.
    """
    for shape in shapes:
        record: dict[str, Any] = {**asdict(shape), "methods": {}}
        case: Case | None = None  # frees the last one before the next is made
        result["shapes"].append(record)
        try:
            case = new_case(shape, page_size)
            fill(record, case, columns(case, record["methods"]), clock, result["ceilings"])
        except LostDevice:
            raise
        except Exception as fault:
            record["fault"] = describe(fault)
            recover()
        finally:
            save()
        gc.collect()  # captured graphs and their memory hang in cycles of closures
        torch.cuda.empty_cache()
        print(summary(record), flush=True)


def summary(record: dict[str, Any]) -> str:
    """One line of progress."""
    times = ", ".join(
        f"{name} {method['us']:.1f}" if "us" in method else f"{name} -"
        for name, method in record["methods"].items()
    )
    shape = ", ".join(str(record[key]) for key in ("batch", "context", "nodes", "heads"))
    return f"({shape}) {record.get('fault', '')} {times}"
