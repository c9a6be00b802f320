"""What do verifying and drafting cost on this machine?

    python -m specdec.experiments.tools.calibrate --target standin:llama3_8b --draft standin:llama_160m

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

It is written anew after every cell; `--resume` measures what is missing.
"""

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.experiments.bench.cases import random_parents
from specdec.experiments.studies.files import resume, write
from specdec.experiments.studies.sessions import DTYPES, Asked, Ours, with_tree
from specdec.lab.environment import describe_environment
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.verifier.recursive_rejection import RecursiveRejection

RESULTS = Path(__file__).parents[1] / "results"
MEMORY_SHARE = 0.8  # of the free memory that a cell may take
PARTS = ("draft", "verify", "loop")  # the shortest one first
CHAINS = (2, 6)  # levels whose drafts are compared
LOOP_PROMPT, LOOP_TOKENS = 64, 48
CHOICES = 4  # most probable tokens asked of a draft, for each node
WARM_UP = 3


def replay_seconds(call: Callable[[], Any], device: torch.device, replays: int) -> float:
    """Median seconds of a call that may be captured in a CUDA graph."""
    call()  # compiles, allocates
    if device.type != "cuda":
        for _ in range(WARM_UP):
            call()
        found = []
        for _ in range(replays):
            begun = time.perf_counter()
            call()
            found.append(time.perf_counter() - begun)
        return statistics.median(found)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    for _ in range(WARM_UP):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    del kept
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


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


def cells(options: argparse.Namespace, seconds: Any) -> Iterator[tuple[int, int, int]]:
    """Batch, nodes and context of what has not been measured; one context after the other, for
    each has its own cache."""
    for b, batch in enumerate(options.batch):
        for c, context in enumerate(options.context):
            for n, nodes in enumerate(options.nodes):
                if seconds[b][n][c] == "todo":
                    yield batch, nodes, context


def calibrate_verify(options: argparse.Namespace, seconds: Any, save: Callable[[], None]) -> None:
    """Fill the table of the target."""
    lm: PagedLM | None = None
    cache: PagedKVCache | None = None
    held: tuple[int, int] | None = None
    for batch, nodes, context in cells(options, seconds):
        if lm is None:
            lm = load_model(
                options.target,
                Placement(device=torch.device(options.device), dtype=DTYPES[options.dtype]),
            )
        if held != (batch, context):
            cache = None
            cache = filled_cache(lm, batch, context, max(options.nodes))
            held = batch, context
        found = None
        if cache is not None:
            call = verify_call(lm, cache, batch, nodes)
            found = replay_seconds(call, lm.device, options.replays)
        place = [
            axis.index(value)
            for axis, value in zip(
                (options.batch, options.nodes, options.context),
                (batch, nodes, context),
                strict=True,
            )
        ]
        seconds[place[0]][place[1]][place[2]] = found
        save()


def calibrate_draft(options: argparse.Namespace, seconds: Any, save: Callable[[], None]) -> None:
    """Fill the table of the draft."""
    if not any("todo" in line for line in seconds):
        return
    lm = load_model(
        options.draft, Placement(device=torch.device(options.device), dtype=DTYPES[options.dtype])
    )
    for b, batch in enumerate(options.batch):
        cache = filled_cache(lm, batch, options.draft_context, 2 * max(options.width))
        if cache is None:
            raise ValueError(f"--draft-context {options.draft_context}: exceeds the memory")
        for w, width in enumerate(options.width):
            if seconds[b][w] == "todo":
                call = draft_call(lm, cache, batch, width)
                seconds[b][w] = replay_seconds(call, lm.device, options.replays)
                save()


def calibrate_loop(
    options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill in what the loop adds."""
    loop = result["loop"]
    if "todo" not in str(loop):
        return
    target = load_model(
        options.target, Placement(device=torch.device(options.device), dtype=DTYPES[options.dtype])
    )
    drafter = SmallLlama(target=target, tree=Chain(budget=1), path=options.draft)
    for b, batch in enumerate(options.batch):
        asked = [
            Asked(i, str(i), random_tokens(target, LOOP_PROMPT).tolist()) for i in range(batch)
        ]
        draft, rest = zip(
            *(_loop_seconds(target, drafter, asked, levels) for levels in CHAINS), strict=True
        )
        level = (draft[1] - draft[0]) / (CHAINS[1] - CHAINS[0])
        loop["level"][b] = max(0.0, level - result["draft"]["seconds"][b][0])
        loop["step"][b] = statistics.mean(rest) + max(0.0, draft[0] - CHAINS[0] * level)
        save()


def _loop_seconds(
    target: PagedLM, drafter: SmallLlama, asked: Sequence[Asked], levels: int
) -> tuple[float, float]:
    """Median seconds of drafting a chain, and of all of a step but drafting and verifying."""
    tree = Chain(budget=levels, children="sample")
    session = Ours(
        target,
        with_tree(drafter, tree),
        RecursiveRejection(),
        temperature=1.0,
        batch=len(asked),
        longest=LOOP_PROMPT + LOOP_TOKENS,
    )
    session.warm_up(asked[0].tokens)
    steps = [step.seconds for step in session.decode(asked, LOOP_TOKENS).steps[1:]]
    rest = [sum(step.get(verb, 0.0) for verb in ("accept", "commit", "other")) for step in steps]
    return statistics.median(step["draft"] for step in steps), statistics.median(rest)


def table(result: dict[str, Any]) -> Group:
    """Milliseconds: a line for each batch and context, a column for each size."""
    verify, draft = result["verify"], result["draft"]
    one = Table("batch", "context", *(f"{nodes} nodes" for nodes in verify["nodes"]))
    one.title = f"ms to verify with {result['settings']['target']}"
    for b, batch in enumerate(verify["batch"]):
        for c, context in enumerate(verify["context"]):
            cells = [_ms(verify["seconds"][b][n][c]) for n in range(len(verify["nodes"]))]
            one.add_row(str(batch), str(context), *cells)
    two = Table("batch", *(f"width {width}" for width in draft["width"]))
    two.title = f"ms of a level of {result['settings']['draft']}, context {draft['context']}"
    for batch, line in zip(draft["batch"], draft["seconds"], strict=True):
        two.add_row(str(batch), *map(_ms, line))
    three = Table("batch", "of a drafted level", "of a step")
    three.title = "ms that the loop adds"
    for row in zip(*(result["loop"][name] for name in ("batch", "level", "step")), strict=True):
        three.add_row(str(row[0]), *map(_ms, row[1:]))
    return Group(one, two, three)


def _ms(seconds: float | str | None) -> str:
    return f"{seconds * 1e3:.3f}" if isinstance(seconds, float) else "-"


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="standin:llama3_8b")
    parser.add_argument("--draft", default="standin:llama_160m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    grids: dict[str, Sequence[int]] = {
        "batch": (1, 8, 32),
        "nodes": (1, 2, 4, 8, 16, 32, 64),
        "context": (128, 1024, 4096),
        "width": (1, 2, 4, 8, 16),
    }
    for name, values in grids.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values)
    parser.add_argument("--draft-context", type=int, default=1024)
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--only", choices=PARTS, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrate.json")
    parser.add_argument("--resume", action="store_true", help="what the file has stays")
    options = parser.parse_args(arguments)
    for name in grids:
        values = sorted(set(getattr(options, name)))
        if values[0] < 1:
            parser.error(f"--{name} {values[0]}: must be at least 1")
        setattr(options, name, values)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU; --device cpu --target zoo:target --draft zoo:draft")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    options = settings_of(arguments)
    torch.manual_seed(0)
    names = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "specdec.experiments.tools.calibrate", *names])
    same = ("target", "draft", "dtype", "batch", "nodes", "context", "width", "draft_context")
    settings = {name: getattr(options, name) for name in same}
    result = resume(options.out, settings, command) if options.resume else None
    if result is None:
        result = {
            "command": command,
            "settings": settings,
            "verify": {
                **{name: settings[name] for name in ("batch", "nodes", "context")},
                "seconds": [
                    [["todo"] * len(options.context) for _ in options.nodes] for _ in options.batch
                ],
            },
            "draft": {
                **{name: settings[name] for name in ("batch", "width")},
                "context": options.draft_context,
                "seconds": [["todo"] * len(options.width) for _ in options.batch],
            },
        }
    todo = ["todo"] * len(options.batch)
    result.setdefault("loop", {"batch": options.batch, "level": todo, "step": [*todo]})
    result |= describe_environment(torch.device(options.device))

    def save() -> None:
        write(options.out, result)

    parts = options.only or PARTS
    if "draft" in parts:
        calibrate_draft(options, result["draft"]["seconds"], save)
    if "verify" in parts:
        calibrate_verify(options, result["verify"]["seconds"], save)
    if "loop" in parts:
        calibrate_loop(options, result, save)
    Console(width=130).print(table(result))


if __name__ == "__main__":
    main()
