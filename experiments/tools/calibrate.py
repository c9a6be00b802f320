"""What do verifying and drafting cost on this machine?

    python -m specdec.experiments.tools.calibrate target=meta-llama/Llama-3.1-8B \\
        draft=meta-llama/Llama-3.2-1B out=costs.json
    python -m specdec.run tree=cost_aware tree.costs=costs.json ...

Times passes of a target over random trees and passes of a draft over levels of a tree, on a GPU
as CUDA graphs (medians of replays, between device events), on a CPU by the clock. Keys, values and
tokens are random. A pass of the target includes finding out who sees whom (`tree_structure`);
one of the draft is that of a second level, with the first in the scratch, and includes finding
the most probable tokens. What the decoding loop adds to that, at temperature 1 with sampled
children, is measured in the loop itself, with chains of two lengths.

The file, which `specdec.costs.CostTable` reads and tree policies may:

    verify.batch, .nodes, .context      the grid; nodes count the root
    verify.seconds[batch][nodes][context]       null: would not fit into memory
    draft.batch, .width                 the grid; nodes of a level for each sequence
    draft.context                       tokens before the tree
    draft.seconds[batch][width]
    loop.batch
    loop.level[batch]                   seconds of a drafted level beyond its pass
    loop.step[batch]                    of a step beyond verification and the drafted levels
    settings, hardware, versions, git, command      of what it is true

It is written anew after every cell; `resume=true` measures what is missing.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.experiments.bench.cases import random_parents
from specdec.experiments.bench.clock import GraphClock
from specdec.experiments.bench.operation import wall_us
from specdec.experiments.figures import decoding
from specdec.experiments.figures.markdown import show
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.prompts import Asked
from specdec.lab.workshop import Workshop, tree, word
from specdec.models.paged import PagedLM

MEMORY_SHARE = 0.8  # of the free memory that a cell may take
CHAINS = (2, 6)  # levels whose drafts are compared
LOOP_PROMPT, LOOP_TOKENS = 64, 48
CHOICES = 4  # most probable tokens asked of a draft, for each node

Axis = Annotated[tuple[Positive, ...], AfterValidator(lambda values: tuple(sorted({*values})))]


@dataclass(frozen=True, kw_only=True)
class Options:
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("standin:llama_160m", "likewise")
    device: str = option("cuda", "or cpu", varies=True)
    dtype: str = option("bfloat16", "of both models")
    batches: Axis = option((1, 8, 32), "sequences together")
    nodes: Axis = option((1, 2, 4, 8, 16, 32, 64), "of a tree, the root included")
    contexts: Axis = option((128, 1024, 4096), "tokens before the tree")
    widths: Axis = option((1, 2, 4, 8, 16), "nodes of a level")
    draft_context: Positive = option(1024, "tokens before the tree of a draft")
    replays: Positive = option(15, "of which the median counts", varies=True)
    only: tuple[Literal["draft", "verify", "loop"], ...] = option(
        ("draft", "verify", "loop"), "parts of the file; the shortest comes first", varies=True
    )
    out: Path = option(Path("calibrate.json"), "result file")
    resume: bool = option(False, "what the file has stays")


def replay_seconds(call: Callable[[], Any], device: torch.device, replays: int) -> float:
    """Median seconds of a call: of a CUDA graph of it on a GPU, else by the clock."""
    if device.type != "cuda":
        return wall_us(call, replays) / 1e6

    def captured(_: int) -> None:
        call()

    return GraphClock(calls=1, replays=replays).time(lambda: captured, 1).us / 1e6


def filled_cache(lm: PagedLM, batch: int, context: int, nodes: int) -> PagedKVCache | None:
    """A cache that holds `context` random tokens of each sequence, with room for a tree; None if
    the memory does not hold it and the logits."""
    page_size = 128 if lm.device.type == "cuda" else 16
    tokens = context + nodes
    pages = batch * -(-tokens // page_size)
    if lm.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        needed = pages * page_size * lm.kv_shape.bytes_per_token(lm.dtype)
        needed += 2 * batch * nodes * lm.vocab_size * lm.dtype.itemsize
        if needed > MEMORY_SHARE * torch.cuda.mem_get_info(lm.device)[0]:
            return None
    cache = lm.new_cache(rows=batch, pages=pages, page_size=page_size, max_tokens=tokens)
    for row in range(batch):
        cache.open(row, tokens=tokens)
    for pool in (cache.keys, cache.values):
        pool.normal_()
    cache.lengths[:batch] = context
    return cache


def random_tokens(lm: PagedLM, *shape: int) -> Tensor:
    return torch.randint(lm.vocab_size, shape, device=lm.device)


def verify_call(lm: PagedLM, cache: PagedKVCache, batch: int, nodes: int) -> Callable[[], Any]:
    """A pass of the target over a random tree for each sequence."""
    generator = torch.Generator().manual_seed(nodes)
    parents = torch.tensor(
        [random_parents(nodes, generator) for _ in range(batch)],
        dtype=torch.int32,
        device=lm.device,
    )
    tokens, rows = random_tokens(lm, batch, nodes), torch.arange(batch, device=lm.device)
    kernels = lm.kernels.on(lm.device)

    def call() -> Tensor | None:
        structure = kernels.tree_structure(parents)
        return lm.forward(cache, rows, tokens, structure.depths, ancestors=structure.ancestors)

    return call


def draft_call(lm: PagedLM, cache: PagedKVCache, batch: int, width: int) -> Callable[[], Any]:
    """A pass of the draft over the second level of a tree, and the best tokens after it."""
    roots, level = torch.full((batch, width), -1), torch.arange(width).expand(batch, -1)
    parents = torch.cat([roots, level], dim=1).to(lm.device, torch.int32)
    tokens, rows = random_tokens(lm, batch, width), torch.arange(batch, device=lm.device)
    kernels = lm.kernels.on(lm.device)
    cache.scratch(batch, 2 * width)

    def call() -> tuple[Tensor, Tensor]:
        structure = kernels.tree_structure(parents)
        logits = lm.forward(
            cache,
            rows,
            tokens,
            structure.depths[:, width:],
            ancestors=structure.ancestors[:, width:],
            first=width,
            key_offsets=structure.depths,
        )
        assert logits is not None
        found: tuple[Tensor, Tensor] = kernels.top_tokens(
            logits.flatten(0, 1), CHOICES, temperature=1.0
        )
        return found

    return call


def calibrate_verify(
    options: Options, lm: PagedLM, seconds: Any, save: Callable[[], None]
) -> None:
    """Fill the table of the target; one cache after the other, each of a batch and a context."""
    places = product(*map(enumerate, (options.batches, options.contexts)))
    for (b, batch), (c, context) in places:
        todo = [n for n in range(len(options.nodes)) if seconds[b][n][c] == "todo"]
        cache = filled_cache(lm, batch, context, max(options.nodes)) if todo else None
        for n in todo:
            found = None
            if cache is not None:
                found = replay_seconds(
                    verify_call(lm, cache, batch, options.nodes[n]), lm.device, options.replays
                )
            seconds[b][n][c] = found
            save()
        cache = None  # frees it before the next is made; nothing else may hold it


def calibrate_draft(options: Options, lm: PagedLM, seconds: Any, save: Callable[[], None]) -> None:
    """Fill the table of the draft."""
    for b, batch in enumerate(options.batches):
        cache = filled_cache(lm, batch, options.draft_context, 2 * max(options.widths))
        if cache is None:
            raise ValueError(f"draft_context={options.draft_context}: exceeds the memory")
        for w, width in enumerate(options.widths):
            if seconds[b][w] == "todo":
                call = draft_call(lm, cache, batch, width)
                seconds[b][w] = replay_seconds(call, lm.device, options.replays)
                save()


def calibrate_loop(
    options: Options, shop: Workshop, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill in what the loop adds."""
    loop = result["loop"]
    for b, batch in enumerate(options.batches):
        tokens = random_tokens(shop.target, batch, LOOP_PROMPT).tolist()
        asked = [Asked(i, str(i), own) for i, own in enumerate(tokens)]
        draft, rest = zip(
            *(_loop_seconds(options, shop, asked, levels) for levels in CHAINS), strict=True
        )
        level = (draft[1] - draft[0]) / (CHAINS[1] - CHAINS[0])
        loop["level"][b] = max(0.0, level - result["draft"]["seconds"][b][0])
        loop["step"][b] = statistics.mean(rest) + max(0.0, draft[0] - CHAINS[0] * level)
        save()


def _loop_seconds(
    options: Options, shop: Workshop, asked: Sequence[Asked], levels: int
) -> tuple[float, float]:
    """Median seconds of drafting a chain, and of all of a step but drafting and verifying."""
    draft = f"drafter=small_llama {word('drafter.path', options.draft)}"
    words = f"{draft} {tree('chain', levels)} tree.children=sample sampling=sample"
    session = shop.session(words, rows=len(asked), longest=LOOP_PROMPT + LOOP_TOKENS)
    session.warm_up(asked[0].tokens)
    steps = [step.seconds for step in session.decode(asked, LOOP_TOKENS).steps[1:]]
    rest = [sum(step.get(verb, 0.0) for verb in ("accept", "commit", "other")) for step in steps]
    return statistics.median(step["draft"] for step in steps), statistics.median(rest)


def blank(options: Options) -> dict[str, Any]:
    """A file of which nothing is measured."""
    batches = options.batches
    return {
        "verify": {
            "batch": batches,
            "nodes": options.nodes,
            "context": options.contexts,
            "seconds": [
                [["todo"] * len(options.contexts) for _ in options.nodes] for _ in batches
            ],
        },
        "draft": {
            "batch": batches,
            "width": options.widths,
            "context": options.draft_context,
            "seconds": [["todo"] * len(options.widths) for _ in batches],
        },
        "loop": {name: ["todo"] * len(batches) for name in ("level", "step")} | {"batch": batches},
    }


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    shop = Workshop(
        word("target.path", options.target), f"device={options.device} dtype={options.dtype}"
    )
    result = {**blank(options), **begin(options, shop.models.placement.device)}
    save = partial(write, options.out, result)
    todo = [part for part in options.only if "todo" in str(result[part])]
    if todo and todo != ["draft"]:
        _ = shop.target  # is there, before the first cell is measured
    if "draft" in todo:
        draft = shop.models.load(options.draft, setting="draft")
        calibrate_draft(options, draft, result["draft"]["seconds"], save)
    if "verify" in todo:
        calibrate_verify(options, shop.target, result["verify"]["seconds"], save)
    if "loop" in todo:
        calibrate_loop(options, shop, result, save)
    save()
    show(decoding.calibrate(result))
    print(json.dumps({part: result[part] for part in ("draft", "loop")}))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
