"""How near does a part come to what the machine can do, and how do others fare?

    python -m specdec.experiments.bench.run attention    on 12 shapes, beside its peers
    python -m specdec.experiments.bench.run grid         on many shapes, ours alone
    python -m specdec.experiments.bench.run steps        acceptance, commit and tree structure
    python -m specdec.experiments.bench.run rules        acceptance by each rule
    python -m specdec.experiments.bench.run elementwise  what torch.compile leaves to be gained
    python -m specdec.experiments.bench.run anatomy      where the time of a whole step goes
    python -m specdec.experiments.bench.run taps         what keeping hidden states costs
    python -m specdec.experiments.bench.run exact        bits and times of exact mode
    python -m specdec.experiments.bench.run products     products by rows, beside cuBLAS
    python -m specdec.experiments.bench.run long         contexts of 32k to 128k, and own_cache

`--help` after a part shows its options. Each writes a JSON file, anew after every shape or case,
and ends with a table; `specdec.experiments.figures.draw` draws the plots.
"""

import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from specdec.experiments.bench.clock import describe
from specdec.experiments.figures import kernels
from specdec.experiments.figures.markdown import show
from specdec.lab.command import begin, run_main, write

PARTS = {  # module and options; a function of the part's name measures
    "attention": ("attention", "Options"),
    "grid": ("attention", "Grid"),
    "steps": ("steps", "Options"),
    "rules": ("rules", "Options"),
    "elementwise": ("elementwise", "Options"),
    "anatomy": ("anatomy", "Options"),
    "taps": ("taps", "Options"),
    "exact": ("exact", "Options"),
    "products": ("products", "Options"),
    "long": ("long", "Options"),
}
RECORDS = ("shapes", "batches", "rows", "cases", "products")


def work(name: str, measure: Any, options: Any) -> int:
    """Measure a part, write the file and show the table; the exit code is not 0 if something
    stopped it, or a rule is wrong.

    Raises:
        ValueError: no GPU, or options that cannot be used.
    """
    device = torch.device(getattr(options, "device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{name}: needs an NVIDIA GPU; rules, anatomy and long take device=cpu as well"
        )
    torch.manual_seed(0)
    begun = time.perf_counter()
    program = f"specdec.experiments.bench.run {name}"
    result = {"part": name, **begin(options, device, program)}
    save = partial(write, options.out, result)
    try:
        with torch.no_grad():
            code = measure(options, result, save) or 0
    except ValueError:
        raise
    except Exception as fault:  # what has been measured is worth keeping
        traceback.print_exc()
        result["fault"] = describe(fault)
        code = 1
    result["seconds"] = time.perf_counter() - begun
    if any(result.get(records) for records in RECORDS):
        save()
        show(kernels.TABLES[name](result))
    print(*kernels.faults(result), sep="\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    name, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in PARTS:
        print(f"error: {name}: no such part; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    file, options = PARTS[name]
    part = import_module(f"specdec.experiments.bench.{file}")
    measure = partial(work, name, getattr(part, name))
    return run_main(getattr(part, options), measure, words, doc=part.__doc__)


if __name__ == "__main__":
    sys.exit(main())
