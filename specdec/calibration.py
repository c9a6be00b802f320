"""What verifying and drafting cost here and now: `specdec.passes` of a target and a draft and what
the decoding loop adds to them. `specdec.costs` reads, keeps and compares what comes of it."""

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

from specdec import __version__
from specdec.costs import CostTable
from specdec.decode import Decoder
from specdec.flight import Step
from specdec.models.fingerprint import fingerprint, hardware_of
from specdec.models.paged import PagedLM
from specdec.passes import Call, Passes, step_seconds
from specdec.protocols import Drafter, Loaded, TreePolicy
from specdec.ranks import here
from specdec.request import Request
from specdec.tables import DATA, keep_table, kept_tables

LOOP_PROMPT = 64  # tokens before the chains that are decoded
LOOP_TOKENS = 16  # of each text of a run's own measurement
TEXTS = 4  # of each prompt
CHAINS = (1, 4)  # their levels
UNSETTLED = 2  # steps of them that do not count
REPLAYS = 9  # of each step of passes
SECONDS = {"cpu": 2.0, "cuda": 16.0}  # that passes may take; the chains take as long again at most
LEAST = 1e-6  # seconds of a level of a drafter that takes none


def loop_seconds(
    decoder: Decoder, prompts: Sequence[Sequence[int]], tokens: int, *, within: float = math.inf
) -> tuple[float, float]:
    """Median seconds of drafting in a step that `decoder` makes of these prompts, and of all of it
    but drafting and verifying.

    Args:
        within: seconds, after which no further text ends; all prompts are decoded as often as
            `TEXTS` if it suffices.
    """
    decoder.warm_up(prompts[0], 2)
    asked = [
        Request(id=i, prompt_ids=prompt, max_new_tokens=tokens)
        for i, prompt in enumerate([*prompts] * TEXTS)
    ]
    steps, begun = list[Step](), time.perf_counter()
    for _ in decoder.run(asked, on_step=steps.append):
        if time.perf_counter() - begun > within:
            break
    steps = [step for step in steps if len(step.requests) == len(prompts)] or steps
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
) -> dict[str, float]:
    """What the loop adds to passes, as `CostTable` has it; `level` is that of all of a drafted
    level, its pass included.

    Args:
        first, second: `loop_seconds` of chains of so many `levels`.
    """
    few, span = levels[0], levels[1] - levels[0]
    level = max(0.0, (second[0] - first[0]) / span if span else first[0] / few)
    accept = max(0.0, (second[1] - first[1]) / span) if span else 0.0
    step = (first[1] + second[1] - sum(levels) * accept) / 2
    return {
        "level": level,
        "start": max(0.0, first[0] - few * level),
        "accept": accept,
        "step": max(0.0, step),
    }


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
        "kernels": target.kernels.impl + ", exact" * target.kernels.exact,
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
    key["chains"] = [*CHAINS]
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
    other = [name for name, value in here.items() if table.about.get(name) != value]
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
    most = min(CHAINS[1], budget, run.drafter.depth or CHAINS[1])
    widths = _doubled(budget)
    nodes = [1, *(1 + width for width in widths)]
    verify, draft = _passes(run, batch, context, widths, most)
    loop = _loop(run, batch, (min(CHAINS[0], most), most), chain)
    if draft:
        loop["level"] = max(0.0, loop["level"] - draft[0])
    else:  # what the loop takes, however wide
        widths, draft, loop["level"] = widths[-1:], [max(loop["level"], LEAST)], 0.0
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
        "loop": {"batch": [batch], **{part: [seconds] for part, seconds in loop.items()}},
    }


@torch.no_grad()
def _passes(
    run: Loaded, batch: int, context: int, widths: Sequence[int], levels: int
) -> tuple[list[float], list[float]]:
    """Seconds of passes of the target over roots alone, then over trees of so many drafted nodes,
    and of a draft model, if there is one, over levels of so many; where time is short the largest
    are left out.

    Args:
        levels: of the drafts.

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
    passes = prepared(target, nodes=1 + widths[-1])
    ahead = None if draft is None else prepared(draft, nodes=2 * widths[-1])
    if passes.cache is None or (ahead is not None and ahead.cache is None):
        raise ValueError(
            f"tree.context={context}: a batch of {batch} exceeds the memory when costs are "
            f"measured; lower tree.context, or name a table in tree.costs"
        )
    steps: list[tuple[list[Call], Call]] = [([], passes.verify(1))]  # one of plain decoding
    for width in widths:
        drafts = [] if ahead is None else ahead.drafts(width, levels)
        steps.append((drafts, passes.verify(1 + width)))
    within = SECONDS[target.device.type]
    found = step_seconds(steps, target.device, replays=REPLAYS, within=within)
    drafted, verify = (list(seconds) for seconds in zip(*found, strict=True))
    return verify, [] if ahead is None else drafted[1:]


def _loop(
    run: Loaded, batch: int, levels: tuple[int, int], chain: Callable[[int], TreePolicy]
) -> dict[str, float]:
    """`loop_costs` of chains of so many levels."""
    target = run.target
    tokens = min(LOOP_TOKENS, target.max_context - 1)
    prompts = loop_prompts(target, batch, min(LOOP_PROMPT, target.max_context - tokens))
    capacity = replace(run.capacity, rows=batch, max_tokens=len(prompts[0]) + tokens, pages=None)
    within = SECONDS[target.device.type] / 2
    first, second = (
        loop_seconds(run.decoder(chain(count), capacity), prompts, tokens, within=within)
        for count in levels
    )
    return loop_costs(first, second, levels)


def _doubled(most: int) -> list[int]:
    """1, 2, 4, ..., and the last one."""
    return sorted({*(2**n for n in range(most.bit_length()) if 2**n < most), most})
