"""What do verifying and drafting cost on this machine?

    python -m specdec.experiments.tools.calibrate target=meta-llama/Llama-3.1-8B \\
        draft=meta-llama/Llama-3.2-1B out=costs.json
    python -m specdec.run tree=cost_aware tree.costs=costs.json ...

Times passes of a target over random trees and passes of a draft over levels of a tree, on a GPU
as CUDA graphs (medians of replays, between device events), on a CPU by the clock, where they stand
in a step: several of the draft, then one of the target. Keys, values and tokens are random. A pass
of the target includes finding out who sees whom (`tree_structure`); one of the draft is that of a
second level, with the first in the scratch, and includes finding the most probable tokens. What
the decoding loop adds to that, at temperature 1 with sampled children, is measured in the loop
itself, with chains of two lengths.

The file, which `specdec.costs.CostTable` reads and tree policies may:

    verify.batch, .nodes, .context      the grid; nodes count the root
    verify.seconds[batch][nodes][context]       null: would not fit into memory
    draft.batch, .width                 the grid; nodes of a level for each sequence
    draft.context                       tokens before the tree; a number in files of one context,
    draft.seconds[batch][width][context]    whose seconds have no such axis
    loop.batch
    loop.level[batch]                   seconds of a drafted level beyond its pass
    loop.start[batch]                   of the first drafted level beyond the others
    loop.accept[batch]                  of a step for each level that was drafted, beyond those
    loop.step[batch]                    of a step beyond verification and draft
    about, settings, hardware, versions, git, command       of what it is true

It is written anew after every cell; `resume=true` measures what is missing.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator

from specdec.calibration import (
    about,
    loop_costs,
    loop_prompts,
    loop_seconds,
)
from specdec.experiments.figures import decoding
from specdec.experiments.figures.markdown import show
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.workshop import Workshop, tree, word
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.passes import Call, Passes, step_seconds

CHAINS = (2, 6)  # levels whose drafts are compared
LEVELS = 4  # of a draft whose passes are timed
LOOP_TOKENS = 48

Axis = Annotated[tuple[Positive, ...], AfterValidator(lambda values: tuple(sorted({*values})))]


@dataclass(frozen=True, kw_only=True)
class Options:
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("standin:llama_160m", "likewise")
    quantize: Quantize = option("none", "of the target: none or fp8")
    device: str = option("cuda", "or cpu", varies=True)
    dtype: str = option("bfloat16", "of both models")
    exact: bool = option(False, "kernels.exact of both models")
    batches: Axis = option((1, 8, 32), "sequences together")
    nodes: Axis = option(
        (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256), "of a tree, the root included"
    )
    contexts: Axis = option((128, 1024, 4096), "tokens before the tree")
    widths: Axis = option((1, 2, 4, 8, 16, 32, 64), "nodes of a level")
    draft_contexts: Axis = option((1024,), "tokens before the tree of a draft")
    replays: Positive = option(15, "of which the median counts", varies=True)
    only: tuple[Literal["draft", "verify", "loop"], ...] = option(
        ("draft", "verify", "loop"), "parts of the file; the shortest comes first", varies=True
    )
    out: Path = option(Path("calibrate.json"), "result file")
    resume: bool = option(False, "what the file has stays")


def calibrate_verify(
    options: Options, target: PagedLM, draft: PagedLM, seconds: Any, save: Callable[[], None]
) -> None:
    """Fill the table of the target; one cache after the other, each of a batch and a context."""
    places = product(*map(enumerate, (options.batches, options.contexts)))
    for (b, batch), (c, context) in places:
        todo = [n for n in range(len(options.nodes)) if seconds[b][n][c] == "todo"]
        if not todo:
            continue
        passes = Passes(target, batch=batch, context=context, nodes=max(options.nodes))
        ahead = Passes(draft, batch=batch, context=min(options.draft_contexts), nodes=2)
        for n in todo:
            found = None
            if passes.cache is not None and ahead.cache is not None:
                drafts = [] if options.nodes[n] == 1 else ahead.drafts(1, LEVELS)
                _, found = _timed(options, target, drafts, passes.verify(options.nodes[n]))
            seconds[b][n][c] = found
            save()
        del passes, ahead  # frees their caches before the next are made


def calibrate_draft(
    options: Options, target: PagedLM, draft: PagedLM, seconds: Any, save: Callable[[], None]
) -> None:
    """Fill the table of the draft."""
    widest, most = max(options.widths), max(options.nodes)
    places = product(*map(enumerate, (options.batches, options.draft_contexts)))
    for (b, batch), (c, context) in places:
        passes = Passes(draft, batch=batch, context=context, nodes=2 * widest)
        after = Passes(target, batch=batch, context=min(options.contexts), nodes=most)
        for w, width in enumerate(options.widths):
            if seconds[b][w][c] != "todo":
                continue
            found = None
            if passes.cache is not None and after.cache is not None:
                verify = after.verify(min(1 + width, most))
                found, _ = _timed(options, target, passes.drafts(width, LEVELS), verify)
            elif not c:
                raise ValueError(f"draft_contexts={context}: exceeds the memory")
            seconds[b][w][c] = found
            save()
        del passes, after  # frees their caches before the next are made


def _timed(
    options: Options, target: PagedLM, drafts: Sequence[Call], verify: Call
) -> tuple[float, float]:
    (found,) = step_seconds([(drafts, verify)], target.device, replays=options.replays)
    return found


def calibrate_loop(
    options: Options, shop: Workshop, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill in what the loop adds."""
    loop = result["loop"]
    for b, batch in enumerate(options.batches):
        prompts = loop_prompts(shop.target, batch)
        first, second = (_chain(options, shop, prompts, levels) for levels in CHAINS)
        found = loop_costs(first, second, CHAINS)
        found["level"] = max(0.0, found["level"] - result["draft"]["seconds"][b][0][0])
        for part, seconds in found.items():
            loop[part][b] = seconds
        save()


def _chain(
    options: Options, shop: Workshop, prompts: Sequence[Sequence[int]], levels: int
) -> tuple[float, float]:
    """`loop_seconds` of a chain."""
    draft = f"drafter=small_llama {word('drafter.path', options.draft)}"
    words = f"{draft} {tree('chain', levels)} tree.children=sample sampling=sample"
    session = shop.session(words, rows=len(prompts), longest=len(prompts[0]) + LOOP_TOKENS)
    return loop_seconds(session.decoder, prompts, LOOP_TOKENS)


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
            "context": options.draft_contexts,
            "seconds": [
                [["todo"] * len(options.draft_contexts) for _ in options.widths] for _ in batches
            ],
        },
        "loop": {"batch": batches}
        | {name: ["todo"] * len(batches) for name in ("level", "start", "accept", "step")},
    }


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    shop = Workshop(
        word("target.path", options.target),
        f"target.quantize={options.quantize} device={options.device} dtype={options.dtype}",
        word("kernels.exact", options.exact),
    )
    result = {**blank(options), **begin(options, shop.models.placement.device)}
    save = partial(write, options.out, result)
    todo = [part for part in options.only if "todo" in str(result[part])]
    if todo:  # both are there before the first cell is measured
        target, draft = shop.target, shop.models.load(options.draft, setting="draft")
        result["about"] = about(target, draft)
    if "draft" in todo:
        calibrate_draft(options, shop.target, draft, result["draft"]["seconds"], save)
    if "verify" in todo:
        calibrate_verify(options, shop.target, draft, result["verify"]["seconds"], save)
    if "loop" in todo:
        calibrate_loop(options, shop, result, save)
    save()
    show(decoding.calibrate(result))
    print(json.dumps({part: result[part] for part in ("draft", "loop")}))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
