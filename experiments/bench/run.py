"""How near do the kernels come to what the GPU can do, and how do others fare?

    python -m specdec.experiments.bench.kernel_bench                  attention on 12 shapes, beside its peers
    python -m specdec.experiments.bench.kernel_bench --grid           attention on many shapes, ours alone
    python -m specdec.experiments.bench.kernel_bench --steps          acceptance, commit and tree structure
    python -m specdec.experiments.bench.kernel_bench --elementwise    what torch.compile leaves to be gained

Needs an NVIDIA GPU. Parts may be combined, `--attention` is the first; each writes a JSON file,
anew after every shape, and ends with a table (`kernel_plot.py` draws the plots). Times are medians
of CUDA graph replays over keys and values that take turns, so that none are in the L2 cache.
"ours" is one layer out of the 32 of a forward pass, which share one plan; "ours + plan" plans anew
for each.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.experiments.bench import kernel_attention, kernel_elementwise, kernel_steps, peers
from specdec.experiments.bench.gpu_clock import GraphClock, compute_ceiling, describe, read_ceiling
from specdec.experiments.bench.kernel_cases import Shape
from specdec.experiments.figures import kernel_plot
from specdec.experiments.studies.files import write
from specdec.lab.environment import describe_environment

PARTS = ("attention", "grid", "steps", "elementwise")
RESULTS = Path(__file__).parents[1] / "results"
COMPILE_SECONDS = 180  # for all variants of FlexAttention, side by side


def ceilings(clock: GraphClock, result: dict[str, Any]) -> dict[str, float]:
    """Bytes/s and FLOP/s, measured now; the launches tried go to the result."""
    read, result["read_launches"] = read_ceiling(clock)
    return {"read": read, "compute": compute_ceiling(clock)}


def compile_ahead(shapes: Sequence[Shape], page_size: int) -> dict[str, Any]:
    """Compile the variants of FlexAttention side by side, into torch's cache on disk; one after
    the other they would take most of the run."""
    begun, workers = time.perf_counter(), max(1, min(12, (os.cpu_count() or 1) - 2))
    command = [
        sys.executable,
        "-m",
        "specdec.experiments.bench.kernel_bench",
        f"--page-size={page_size}",
    ]
    command += ["--shapes", *map(str, shapes), "--compile-share", str(workers)]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    faults = []
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(workers)]
        running = [
            subprocess.Popen([*command, str(number)], env=environment, stdout=log, stderr=log)
            for number, log in enumerate(logs)
        ]
        for process, log in zip(running, logs, strict=True):
            try:
                process.wait(max(1.0, COMPILE_SECONDS - (time.perf_counter() - begun)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode:
                log.seek(0)
                faults.append(f"exit {process.returncode}: {log.read()[-300:]}")
    return {"seconds": time.perf_counter() - begun, "processes": workers, "faults": faults}


def attention(
    shapes: Sequence[Shape],
    columns: Callable[..., kernel_attention.Columns],
    options: argparse.Namespace,
    *,
    clock: GraphClock,
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """The part of that name, and the grid: these columns for these shapes."""
    from specdec.kernels import gpu

    if columns is kernel_attention.beside_peers:
        result["compile_ahead"] = compile_ahead(shapes, options.page_size)
    result["page_size"], result["fixed_ceilings"] = options.page_size, kernel_attention.FIXED
    result["ceilings"] = ceilings(clock, result)
    result["shapes"] = []
    kernel_attention.run(
        shapes,
        columns(gpu.tree_attention),
        clock,
        result,
        save,
        page_size=options.page_size,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--replays", type=int, default=25, help="of a graph; the median counts")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        metavar="B,CONTEXT,NODES[,HEADS]",
        help="instead of those of --attention or --grid",
    )
    parser.add_argument("--compile-share", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "needs an NVIDIA GPU; to draw results: python -m specdec.experiments.figures.kernel_plot"
        )

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if options.compile_share:
        of, number = options.compile_share
        peers.compile_share(number, of, options.shapes, options.page_size)
        return 0
    clock = GraphClock(replays=options.replays)
    columns = kernel_attention.all_of_ours if options.no_peers else kernel_attention.beside_peers
    runs: dict[str, Callable[..., None]] = {
        "attention": partial(
            attention, options.shapes or kernel_attention.SHAPES, columns, options
        ),
        "grid": partial(
            attention, options.shapes or kernel_attention.GRID, kernel_attention.alone, options
        ),
        "steps": kernel_steps.steps,
        "elementwise": kernel_elementwise.elementwise,
    }
    faults = 0
    for part in [part for part in PARTS if vars(options)[part]] or ["attention"]:
        begun = time.perf_counter()
        result: dict[str, Any] = {
            "part": part,
            "command": shlex.join(
                ["python", "-m", "specdec.experiments.bench.kernel_bench", *sys.argv[1:]]
            ),
            "replays": options.replays,
            **describe_environment(torch.device("cuda")),
        }
        save = partial(write, options.out / f"kernel_{part}.json", result)
        try:
            runs[part](clock=clock, result=result, save=save)
        except Exception as fault:  # the other parts may still be measured
            traceback.print_exc()
            result["fault"] = describe(fault)
            faults += 1
        result["seconds"] = time.perf_counter() - begun
        if any(result.get(records) for records in ("shapes", "batches", "rows")):
            save()
        Console(width=160).print(kernel_plot.table(result))
        if "LostDevice" in result.get("fault", ""):
            break
    return faults


if __name__ == "__main__":
    sys.exit(main())
