"""What verifying and drafting cost here and now: passes of a target and a draft over trees, and
what the decoding loop adds to them. `specdec.costs` reads, keeps and compares what comes of it."""

import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import __version__
from specdec.cache import PagedKVCache
from specdec.costs import CostTable
from specdec.decode import Decoder
from specdec.flight import Step
from specdec.models.fingerprint import fingerprint, hardware_of
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, Loaded, TreePolicy
from specdec.ranks import here
from specdec.request import Request
from specdec.tables import DATA, keep_table, kept_tables
from specdec.tree import random_parents

MEMORY_SHARE = 0.8  # of the free memory that a cache and logits may take
LOOP_PROMPT = 64  # tokens before the chains that are decoded
LOOP_TOKENS = 16  # that the chains of a run's own measurement yield
CHAINS = (1, 4)  # their levels
UNSETTLED = 2  # steps of them that do not count
REPLAYS, FEWEST = 15, 4
SECONDS = {"cpu": 2.0, "cuda": 16.0}  # that passes may take; the chains take as long again at most
LEAST = 1e-6  # seconds of a level of a drafter that takes none
CHOICES = 4  # most probable tokens asked of a draft, for each node
Call = Callable[[], Any]


def median_seconds(
    calls: Sequence[Call], device: torch.device, *, replays: int, within: float = math.inf
) -> list[float]:
    """Median seconds of each call: on a GPU of a CUDA graph of it, between device events, else by
    the clock. Calls take turns, so that whatever else the machine does meets all of them alike.

    Args:
        within: seconds, after which no further turn begins. Half of them may pass until each was
            called once, which on a GPU may compile kernels; of more than four those that it does
            not suffice for are left out.
    """
    begun = time.perf_counter()
    ready: list[Call] = []
    for call in calls:
        ready.append(_captured(call, device) if device.type == "cuda" else call)
        ready[-1]()  # pays for what happens once
        if len(ready) >= FEWEST and time.perf_counter() - begun > within / 2:
            break
    found: list[list[float]] = [[] for _ in ready]
    for turn in range(replays):
        for replay, seconds in zip(ready, found, strict=True):
            seconds.append(_clocked(replay, device))
        if turn and time.perf_counter() - begun > within:
            break
    return [statistics.median(seconds) for seconds in found]


def _captured(call: Call, device: torch.device) -> Call:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates, tunes
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clocked(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        call()  # weights are where a step like the one before has left them
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


class Passes:
    """Passes of a model over random trees after a random context, to be timed.

    Args:
        lm: the model.
        batch: sequences.
        context: tokens of each before its tree.
        nodes: of a tree at most, the root included; twice the widest level of a draft.
        page_size, kv_dtype: as in `Capacity`.

    Attributes:
        cache: None if the memory holds no such cache, or not the logits.
    """

    def __init__(
        self,
        lm: PagedLM,
        *,
        batch: int,
        context: int,
        nodes: int,
        page_size: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.lm, self.batch = lm, batch
        self.generator = torch.Generator(lm.device).manual_seed(0)
        self.kernels = lm.kernels.on(lm.device)
        self.rows = torch.arange(batch, device=lm.device)
        self.cache = self._filled(
            context, nodes, page_size or (128 if lm.device.type == "cuda" else 16), kv_dtype
        )

    def _filled(
        self, context: int, nodes: int, page_size: int, kv_dtype: torch.dtype | None
    ) -> PagedKVCache | None:
        lm, tokens = self.lm, context + nodes
        pages = self.batch * -(-tokens // page_size)
        if lm.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            needed = pages * page_size * lm.kv_shape.bytes_per_token(kv_dtype or lm.dtype)
            needed += 2 * self.batch * nodes * lm.vocab_size * lm.dtype.itemsize
            if needed > MEMORY_SHARE * torch.cuda.mem_get_info(lm.device)[0]:
                return None
        cache = lm.new_cache(
            rows=self.batch,
            pages=pages,
            page_size=page_size,
            max_tokens=tokens,
            kv_dtype=kv_dtype,
        )
        for row in range(self.batch):
            cache.open(row, tokens=tokens)
        if kv_dtype is None:  # quantised ones stay zeros, which are read as fast
            for pool in (cache.keys, cache.values):
                pool.normal_(generator=self.generator)
        cache.lengths[: self.batch] = context
        return cache

    def tokens(self, width: int) -> Tensor:
        """[B, width] random ones."""
        lm = self.lm
        shape = self.batch, width
        return torch.randint(lm.vocab_size, shape, device=lm.device, generator=self.generator)

    def verify(self, nodes: int) -> Call:
        """A pass of a target over a random tree for each sequence, and who sees whom in it."""
        lm, cache, tokens = self.lm, self.cache, self.tokens(nodes)
        generator = torch.Generator().manual_seed(nodes)
        trees = [random_parents(nodes, generator) for _ in range(self.batch)]
        parents = torch.tensor(trees, dtype=torch.int32, device=lm.device)
        assert cache is not None

        def call() -> Tensor | None:
            structure = self.kernels.tree_structure(parents)
            return lm.forward(
                cache, self.rows, tokens, structure.depths, ancestors=structure.ancestors
            )

        return call

    def draft(self, width: int) -> Call:
        """A pass of a draft over the second level of a tree, and the best tokens after it."""
        lm, cache, tokens = self.lm, self.cache, self.tokens(width)
        roots = torch.full((self.batch, width), -1)
        level = torch.arange(width).expand(self.batch, -1)
        parents = torch.cat([roots, level], dim=1).to(lm.device, torch.int32)
        assert cache is not None
        cache.scratch(self.batch, 2 * width)

        def call() -> tuple[Tensor, Tensor]:
            structure = self.kernels.tree_structure(parents)
            logits = lm.forward(
                cache,
                self.rows,
                tokens,
                structure.depths[:, width:],
                ancestors=structure.ancestors[:, width:],
                first=width,
                key_offsets=structure.depths,
            )
            assert logits is not None
            best: tuple[Tensor, Tensor] = self.kernels.top_tokens(
                logits.flatten(0, 1), CHOICES, temperature=1.0
            )
            return best

        return call


def loop_seconds(
    decoder: Decoder, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[float, float]:
    """Median seconds of drafting in a step that `decoder` makes of these prompts, and of all of it
    but drafting and verifying."""
    decoder.warm_up(prompts[0], 2)
    asked = [Request(id=i, prompt_ids=p, max_new_tokens=tokens) for i, p in enumerate(prompts)]
    steps: list[Step] = []
    for _ in decoder.run(asked, on_step=steps.append):
        pass
    times = [step.seconds for step in steps[min(UNSETTLED, len(steps) - 1) :]]
    rest = [sum(one.get(verb, 0.0) for verb in ("accept", "commit", "other")) for one in times]
    return statistics.median(one["draft"] for one in times), statistics.median(rest)


def loop_prompts(lm: PagedLM, batch: int, length: int = LOOP_PROMPT) -> list[list[int]]:
    """Random tokens that come again and again, so that drafters that search the text find some."""
    generator = torch.Generator().manual_seed(0)
    period = torch.randint(lm.vocab_size, (batch, max(1, length // 4)), generator=generator)
    return period.repeat(1, 4)[:, :length].tolist()


def loop_costs(
    first: tuple[float, float], second: tuple[float, float], levels: tuple[int, int]
) -> tuple[float, float, float]:
    """Seconds of a drafted level, of the first one beyond that, and of a step beyond verification
    and draft.

    Args:
        first, second: `loop_seconds` of chains of so many `levels`.
    """
    span = levels[1] - levels[0]
    level = max(0.0, (second[0] - first[0]) / span if span else first[0] / levels[0])
    return level, max(0.0, first[0] - levels[0] * level), (first[1] + second[1]) / 2


# Of a run


def about(target: PagedLM, draft: PagedLM | None) -> dict[str, Any]:
    """What seconds of passes are true of: models, machine, type, kernels; ranks, if there are."""
    hardware = hardware_of(target.device)
    parts = ("gpu",) if "gpu" in hardware else ("cpu", "threads")
    ranks = {"ranks": here().size} if here().size > 1 else {}
    return {
        "models": {"target": fingerprint(target), "draft": draft and fingerprint(draft)},
        "machine": {part: hardware[part] for part in parts} | {"torch": torch.__version__},
        "dtype": str(target.dtype).removeprefix("torch."),
        "kernels": target.kernels.impl,
        **ranks,
    }


def costs_of(
    run: Loaded,
    costs: str,
    *,
    batch: int,
    context: int | None,
    budget: int,
    chain: Callable[[int], TreePolicy],
) -> tuple[CostTable, str]:
    """Costs of a run, measured now or before, and in words where they come from.

    Args:
        costs: auto takes a table of these models and this machine, one measured before or one that
            comes with the package, and measures where there is none; measure always measures.
        batch: sequences.
        context: tokens of each before its tree; None for half of what the run has room for.
        budget: nodes of trees at most, the root left out.
        chain: makes the policy of a chain of so many levels, as the run chooses children.

    Raises:
        ValueError: no memory for it.
    """
    here = about(run.target, run.drafter.own_model)
    context = context or max(1, run.capacity.max_tokens // 2)
    grid = {"batch": batch, "context": context, "budget": budget, "children": chain(1).children}
    cache = {"page_size": run.capacity.page_size, "kv_dtype": str(run.capacity.kv_dtype)}
    key = {"version": __version__, **here, **grid, **cache, "drafter": _described(run.drafter)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = kept_tables("costs") / f"{name}.json"
    if costs == "auto":
        if (table := _kept(path, key)) is not None:
            return table, f"measured before, on this machine with these models ({path})"
        for packaged in sorted((DATA / "costs").glob("*.json")):
            table = CostTable.load(packaged.stem)
            if table.about == here and batch <= max(table.verify_batches):
                return table, f"the table {packaged.stem}, of this machine and these models"
    begun = time.perf_counter()
    measured = _measured(run, batch=batch, context=context, budget=budget, chain=chain)
    table = CostTable.of({**measured, "about": here})
    seconds = f"{time.perf_counter() - begun:.1f} s"
    if "gpu" in here["machine"] and table.most_nodes <= budget:  # next time kernels are compiled
        where = f"not kept, time sufficed for trees of up to {table.most_nodes - 1} nodes"
    elif keep_table(path, {**measured, "about": here, "key": key}):
        where = f"kept in {path}"
    else:
        where = f"not kept, {path.parent} cannot be written"
    return table, f"measured now, on this machine with these models, in {seconds}; {where}"


def unlike(table: CostTable, run: Loaded) -> str:
    """In which respects a table is of something else than a run; empty if in none."""
    if table.about is None:
        return "it does not say of which models and machine it is"
    here = about(run.target, run.drafter.own_model)
    other = [f"{name}" for name, value in here.items() if table.about.get(name) != value]
    return f"of other {', '.join(other)}" if other else ""


def _kept(path: Path, key: Mapping[str, Any]) -> CostTable | None:
    """The table that was kept under this key; None if there is none, or no whole one."""
    try:
        data = json.loads(path.read_text())
        return CostTable.of(data) if data["key"] == key else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _described(drafter: Drafter) -> Any:
    """What a drafter is, without its models."""
    plain = {
        name: value
        for name, value in vars(drafter).items()
        if not name.startswith("_") and isinstance(value, str | int | float | None)
    }
    parts = {name: _described(part) for name, part in getattr(drafter, "parts", {}).items()}
    return {"class": f"{type(drafter).__module__}.{type(drafter).__qualname__}", **plain, **parts}


def _measured(
    run: Loaded, *, batch: int, context: int, budget: int, chain: Callable[[int], TreePolicy]
) -> dict[str, Any]:
    """A table, in the form of a file, of one batch and one context."""
    context = min(context, run.target.max_context - budget - 1)
    nodes, widths = _doubled(budget + 1), _doubled(budget)
    verify, draft = _passes(run, batch, context, nodes, widths)
    level, start, step = _loop(run, batch, budget, chain)
    if draft:
        level = max(0.0, level - draft[0])
    else:  # what the loop takes, however wide
        widths, draft, level = widths[-1:], [max(level, LEAST)], 0.0
    return {
        "verify": {
            "batch": [batch],
            "nodes": nodes[: len(verify)],
            "context": [context],
            "seconds": [[[one] for one in verify]],
        },
        "draft": {
            "batch": [batch],
            "width": widths[: len(draft)],
            "context": context,
            "seconds": [draft],
        },
        "loop": {"batch": [batch], "level": [level], "start": [start], "step": [step]},
    }


@torch.no_grad()
def _passes(
    run: Loaded, batch: int, context: int, nodes: Sequence[int], widths: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Seconds of passes of the target by nodes, and of a draft model by widths; where time is
    short the largest of both are left out.

    Raises:
        ValueError: no memory for them.
    """
    target, draft, capacity = run.target, run.drafter.own_model, run.capacity
    prepared = partial(
        Passes,
        batch=batch,
        context=context,
        page_size=capacity.page_size,
        kv_dtype=capacity.kv_dtype,
    )
    passes = prepared(target, nodes=nodes[-1])
    ahead = None if draft is None else prepared(draft, nodes=2 * widths[-1])
    if passes.cache is None or (ahead is not None and ahead.cache is None):
        raise ValueError(
            f"tree.context={context}: a batch of {batch} exceeds the memory when costs are "
            f"measured; lower tree.context, or name a table in tree.costs"
        )
    sizes = [("verify", count) for count in nodes]
    sizes += [("draft", width) for width in widths] if ahead is not None else []
    sizes.sort(key=lambda one: one[1])
    calls = [
        ahead.draft(size) if ahead is not None and part == "draft" else passes.verify(size)
        for part, size in sizes
    ]
    within = SECONDS[target.device.type]
    seconds = median_seconds(calls, target.device, replays=REPLAYS, within=within)
    timed = [*zip(sizes, seconds, strict=False)]
    verify, drafted = (
        [one for (part, _), one in timed if part == wanted] for wanted in ("verify", "draft")
    )
    return verify, drafted


def _loop(
    run: Loaded, batch: int, budget: int, chain: Callable[[int], TreePolicy]
) -> tuple[float, float, float]:
    """What the loop adds to a level, to the first one and to a step, by chains of two lengths."""
    target = run.target
    most = min(CHAINS[1], budget, run.drafter.depth or CHAINS[1])
    levels = (min(CHAINS[0], most), most)
    tokens = min(LOOP_TOKENS, target.max_context - 1)
    prompts = loop_prompts(target, batch, min(LOOP_PROMPT, target.max_context - tokens))
    capacity = replace(run.capacity, rows=batch, max_tokens=len(prompts[0]) + tokens, pages=None)
    first, second = (
        loop_seconds(run.decoder(chain(count), capacity), prompts, tokens) for count in levels
    )
    return loop_costs(first, second, levels)


def _doubled(most: int) -> list[int]:
    """1, 2, 4, ..., and the last one."""
    return sorted({*(2**n for n in range(most.bit_length()) if 2**n < most), most})
