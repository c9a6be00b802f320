"""What does it cost to keep hidden states of a verification?

    python -m specdec.experiments.bench.run taps batches=[1,32]

One pass of the target over trees of `nodes` nodes, in a CUDA graph, with `taps` and without, in
turns, of which each side begins every other one. Everything else is equal: pages, trees, kernels.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specdec.experiments.bench.clock import Call, GraphClock, Timed
from specdec.heads.taps import usual_taps
from specdec.lab.command import Positive, option
from specdec.lab.workshop import Workshop, word
from specdec.models.paged import PagedLM
from specdec.models.states import States
from specdec.observation import Tap
from specdec.tree import random_parents

PAGE = 128
SIDES = ("without", "with")


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    dtype: str = option("bfloat16", "of the target")
    taps: tuple[int, ...] = option((), "layers passed; those of EAGLE-3 if empty")
    nodes: Positive = option(64, "of each tree")
    context: Positive = option(1024, "committed tokens of each sequence")
    batches: tuple[Positive, ...] = option((1, 32), "sequences together", varies=True)
    turns: Positive = option(4, "of both sides")
    replays: Positive = option(6, "of a graph; the median counts")  # a pass is long
    out: Path = option(Path("taps.json"), "result file")


def taps(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Microseconds of a pass on both sides, of each batch, to result["batches"]."""
    shop = Workshop(word("target.path", options.target), f"device=cuda dtype={options.dtype}")
    lm = shop.target
    chosen = options.taps or usual_taps(lm.layers)
    lm.check_taps(chosen, "taps")
    clock = GraphClock(calls=4, replays=options.replays, longest=0.1)
    for batch in options.batches:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(options.turns):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                call = passes(lm, batch, options, chosen if side == "with" else ())
                timing = clock.time(partial(_same, call), 1)
                if timing.output.isnan().any():
                    raise RuntimeError(f"batch {batch}, {side} states: a replay gives no logits")
                times[side].append(timing.us)
        without, with_ = (statistics.median(times[side]) for side in SIDES)
        record = {"batch": batch, "nodes": options.nodes, "taps": list(chosen), "us": times}
        result.setdefault("batches", []).append({**record, "ratio": with_ / without})
        save()


def _same(call: Call) -> Call:
    return call


def passes(lm: PagedLM, batch: int, options: Options, wanted: tuple[Tap, ...]) -> Call:
    """A pass over the same trees, again and again."""
    longest = options.context + options.nodes
    cache = lm.new_cache(
        rows=batch, pages=batch * -(-longest // PAGE), page_size=PAGE, max_tokens=longest
    )
    for row in range(batch):
        cache.open(row, tokens=longest)
    cache.lengths[:batch] = options.context
    seeded = torch.Generator().manual_seed(0)
    trees = [random_parents(options.nodes, seeded) for _ in range(batch)]
    parents = torch.tensor(trees, dtype=torch.int32, device=lm.device)
    tokens = torch.arange(options.nodes, device=lm.device).expand(batch, -1).contiguous()
    rows = torch.arange(batch, device=lm.device)
    structure = lm.kernels.on(lm.device).tree_structure(parents)
    kept: list[States] = []

    def call(_: int) -> Any:
        states = States(wanted)
        kept.append(states)  # as the graphs of a step keep what they return
        return lm.forward(
            cache, rows, tokens, structure.depths, ancestors=structure.ancestors, states=states
        )

    return call
