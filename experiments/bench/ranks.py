"""What do several GPUs that share a target gain, and do they stay equal to the bit?

    torchrun --standalone --nproc-per-node 2 -m specdec.experiments.bench.ranks out=ranks.json

Each rank first measures something alone, on its own GPU: rank 0 plain decoding of `small` and
passes, rank 1 speculation. Then they join. Sums inside `add_norm` are compared with sums of
gathered parts, and logits and last states of all ranks over `steps` steps; only then is anything
timed. The file is written anew after every part.
"""

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from specdec.experiments.bench.clock import GraphClock, describe, read_ceiling
from specdec.kernels.layout import Weight
from specdec.kernels.reference import quantise_weight
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.method import Method
from specdec.lab.prompts import Asked, encode, load_prompts
from specdec.lab.session import WARM_UP_TOKENS
from specdec.lab.together import ENVIRONMENT
from specdec.lab.workshop import Workshop, word
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.models.shards import Shared, local
from specdec.observation import Observation, Observes
from specdec.passes import Passes
from specdec.protocols import StepContext
from specdec.ranks import Ranks, here, join
from specdec.request import Capacity
from specdec.tree import TokenTree
from specdec.verifier.verifier import TreeVerifier

Save = Callable[[dict[str, Any]], None]
PLAIN = "drafter=none tree=chain tree.budget=0"
ODD = 6364136223846793005  # multiplying by an odd number loses no bit: a difference stays one
REPLAYS = 15


@dataclass(frozen=True, kw_only=True)
class Options:
    small: str = option("standin:llama3_8b", "target of which one GPU holds all")
    large: str = option("standin:llama3_70b", "target for all of them; none leaves it out")
    quantize: Quantize = option("none", "fp8: weights of the large target")
    draft: str = option("standin:llama_160m", "of small_llama, whole on each GPU")
    device: str = option("cuda", "cuda or cpu")
    dtype: str = option("bfloat16", "of all models")
    trees: tuple[str, ...] = option(
        ("tree=dynamic tree.budget=63 tree.width=8 tree.depth=8",), "of small_llama"
    )
    prompts: Positive = option(4, "of the built-in ones")
    tokens: Positive = option(128, "new ones, for each prompt")
    steps: Positive = option(1000, "whose logits are compared")
    nodes: Positive = option(64, "of a tree beside a single node")
    context: Positive = option(512, "committed tokens before it")
    wait: Positive = option(500, "seconds that a rank waits for another")
    out: Path = option(Path("ranks.json"), "result file")


class Watched(TreeVerifier):
    """A verifier that sums up, in an order, the bits of all logits it has given and of the states
    before them: logits alone are the same on all ranks because they are gathered."""

    def __init__(self, target: PagedLM, **settings: Any) -> None:
        super().__init__(target, **settings)
        self.seen = torch.zeros(2, dtype=torch.int64, device=target.device)  # steps and bits

    def prepare(self, capacity: Capacity, observes: Observes) -> None:
        super().prepare(capacity, observes | Observes(taps=("normal",)))

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        logits, seen = super().verify(context, tree)
        for found in (logits, seen.states["normal"]):
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
            bits = found.contiguous().view(kind).flatten().long()
            places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
            self.seen[1] = self.seen[1] * ODD + (bits * places).sum()
        self.seen[0] += 1
        return logits, seen


# Alone and together


def workshop(options: Options, path: str, ranks: Ranks, quantize: Quantize = "none") -> Workshop:
    placed = f"device={options.device} dtype={options.dtype} target.tp={ranks.size}"
    return Workshop(f"{word('target.path', path)} target.quantize={quantize}", placed)


def asked_of(shop: Workshop, options: Options) -> list[Asked]:
    prompts = load_prompts(path=None, field=None, limit=options.prompts)
    tokenizer = shop.target.tokenizer
    return [Asked(i, p.id, encode(tokenizer, p, chat="never")) for i, p in enumerate(prompts)]


def decoded(shop: Workshop, method: str | Method, options: Options) -> dict[str, float]:
    """Plain or not: milliseconds of a step (median) and of a token, tokens of a step."""
    asked = asked_of(shop, options)
    longest = max(len(one.tokens) for one in asked) + max(options.tokens, WARM_UP_TOKENS)
    session = shop.session(method, rows=1, longest=longest)
    session.warm_up(asked[0].tokens)
    done = session.decode(asked, options.tokens)
    steps = [
        sum(seconds for verb, seconds in step.seconds.items() if verb != "prefill")
        for step in done.steps
    ]
    tokens = sum(map(len, done.outputs))
    verbs = {verb: 1e3 * seconds / len(steps) for verb, seconds in done.verbs.items()}
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "token_ms": 1e3 * sum(steps) / tokens,
        "tokens_per_step": tokens / len(steps),
        "steps": len(steps),
        **{f"{verb}_ms": ms for verb, ms in verbs.items()},
    }


def drafting(options: Options, tree: str) -> str:
    return f"drafter=small_llama {word('drafter.path', options.draft)} {tree}"


def passes(lm: PagedLM, options: Options) -> dict[str, float]:
    """Milliseconds of a pass over one node and over a tree: medians of graphs, by turns."""
    made = Passes(lm, batch=1, context=options.context, nodes=options.nodes)
    if made.cache is None:
        raise RuntimeError("no memory for a cache of one sequence")
    replays = [captured(made.verify(nodes), lm) for nodes in (1, options.nodes)]
    times: list[list[float]] = [[], []]
    for _ in range(REPLAYS):
        for replay, found in zip(replays, times, strict=True):
            found.append(timed(replay, lm))
    one, many = map(statistics.median, times)
    return {"one_ms": one, "many_ms": many, "many_over_one": many / one}


def captured(call: Callable[[], Any], lm: PagedLM) -> Callable[[], Any]:
    call()
    if lm.device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def timed(call: Callable[[], Any], lm: PagedLM) -> float:
    """Milliseconds; ranks begin together, as they do step after step."""
    if lm.device.type != "cuda":
        from time import perf_counter

        begun = perf_counter()
        call()
        return 1e3 * (perf_counter() - begun)
    call()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def alone(options: Options, rank: int) -> dict[str, Any]:
    """What this rank measures before it joins the others."""
    found: dict[str, Any] = {}
    shop = workshop(options, options.small, here())
    with torch.no_grad():
        if rank == 0:
            found["plain"] = decoded(shop, PLAIN, options)
            found["passes"] = passes(shop.target, options)
        if rank == 1:
            for tree in options.trees:
                found[tree] = decoded(shop, drafting(options, tree), options)
    return found


# Checks


def check_sums(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Whether sums in shared memory have the bits of sums of gathered parts, and of all ranks."""
    from specdec.kernels import gpu

    tried, wrong = 0, []
    random = torch.Generator(device).manual_seed(ranks.rank)  # parts differ, what they meet not
    same = torch.Generator(device).manual_seed(99)
    for hidden, inputs in ((4096, 2048), (4096, 7168), (8192, 4096), (8192, 14336)):
        shared = Shared(gpu, ranks, 8, device)
        assert shared._parts is not None
        plain = torch.randn(hidden, inputs, generator=random, device=device).to(dtype)
        norm = torch.randn(hidden, generator=same, device=device).to(dtype)
        weights: tuple[Weight, ...] = (plain, quantise_weight(plain))
        for weight, rows in product(weights, (1, 3, 16, 17, 64, 65, 300) * 3):
            x = torch.randn(rows, inputs, generator=random, device=device).to(dtype)
            residual = torch.randn(rows, hidden, generator=same, device=device).to(dtype)
            parts = shared.linear(x, weight)
            gathered = parts if rows > 64 else ranks.gather(parts).flatten(0, 1)
            expected = gpu.add_norm(residual, gathered, norm, 1e-5)
            found = shared.add_norm(residual, parts, norm, 1e-5)
            every = ranks.gather(torch.stack(found).contiguous())
            tried += 1
            equal = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            if not equal or not all(torch.equal(one, every[0]) for one in every):
                wrong.append([hidden, inputs, rows, type(weight).__name__])
    return {"sums": tried, "wrong": wrong}


def check_steps(shop: Workshop, options: Options) -> dict[str, Any]:
    """Steps and a sum of the bits of all their logits and last states, of each rank."""
    made: list[Watched] = []

    def watched(target: PagedLM) -> Watched:
        made.append(Watched(target))
        return made[-1]

    method = replace(shop.method(PLAIN), verifier=watched)
    asked = asked_of(shop, options)
    each = -(-options.steps // len(asked))
    longest = max(len(one.tokens) for one in asked) + each + WARM_UP_TOKENS
    session = shop.session(method, rows=1, longest=longest)
    session.warm_up(asked[0].tokens)
    session.decode(asked, each)
    every = here().gather(made[-1].seen).tolist()
    equal = all(one == every[0] for one in every)
    return {"of": "logits and last states", "steps": every[0][0], "equal": equal, "bits": every}


# All of it


def together(options: Options, ranks: Ranks, save: Save) -> None:
    """What ranks measure and check when they have joined."""
    if options.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        save({"sums": check_sums(ranks, device, torch.bfloat16)})
        if ranks.rank == 0:
            speed, _ = read_ceiling(GraphClock(calls=4, replays=9))
            save({"read_bytes_per_second": speed})
    shop = workshop(options, options.small, ranks)
    save({"small": {"bits": check_steps(shop, options)}})
    save({"small": {"plain": decoded(shop, PLAIN, options)}})
    save({"small": {"passes": passes(shop.target, options)}})
    for tree in options.trees:
        save({"small": {tree: decoded(shop, drafting(options, tree), options)}})
    save({"small": {"weights": weights_of(shop.target)}})
    del shop
    free()
    if options.large == "none":
        return
    shop = workshop(options, options.large, ranks, options.quantize)
    save({"large": {"weights": weights_of(shop.target)}})
    save({"large": {"passes": passes(shop.target, options)}})
    save({"large": {"plain": decoded(shop, PLAIN, options)}})
    save({"large": {"bits": check_steps(shop, options)}})


def weights_of(lm: PagedLM) -> int:
    """Bytes that a step reads of them on this rank: all but the embedding."""
    embedding = lm.model.get_input_embeddings().weight
    every = (*lm.model.parameters(), *lm.model.buffers())  # which weights in float8 are
    return sum(local(w).nbytes for w in every if w is not embedding)


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """What the parts that are there say."""
    found: dict[str, Any] = {}
    one, two, large = (result.get(name, {}) for name in ("alone", "small", "large"))
    with suppress(KeyError):
        found["plain step, small, over one GPU"] = (
            two["plain"]["step_ms"] / one["plain"]["step_ms"]
        )
    both = [tree for tree in result["settings"]["trees"] if tree in one and tree in two]
    if both:
        best = [min(side[tree]["token_ms"] for tree in both) for side in (one, two)]
        found["best tree, small, over one GPU"] = best[1] / best[0]
        found["best tree, small, over plain on one GPU"] = best[1] / one["plain"]["token_ms"]
    with suppress(KeyError):
        found["a tree's nodes over one, small"] = two["passes"]["many_over_one"]
    with suppress(KeyError):
        found["a tree's nodes over one, large"] = large["passes"]["many_over_one"]
    with suppress(KeyError):
        limit = 1e3 * large["weights"] / result["read_bytes_per_second"]
        found["plain step, large, over its limit"] = large["plain"]["step_ms"] / limit
        found["limit, large, ms"] = limit
    return found


def work(options: Options) -> int:
    os.environ.update(ENVIRONMENT)
    rank = int(os.environ.get("RANK", "-1"))
    if rank < 0:
        raise ValueError(f"ranks: must be started by torchrun, as in {__doc__}")
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    result: dict[str, Any] = begin(
        options, torch.device(options.device), "specdec.experiments.bench.ranks"
    )
    started = f"torchrun --standalone --nproc-per-node {os.environ.get('WORLD_SIZE')}"
    result["command"] = result["command"].replace("python", started, 1)

    def save(more: dict[str, Any]) -> None:
        for name, value in more.items():
            known = result.setdefault(name, {})
            result[name] = {**known, **value} if isinstance(value, dict) else value
        result["ratios"] = ratios(result)
        if rank == 0:
            write(options.out, result)
            print(more, flush=True)

    store, _, size = next(iter(rendezvous("env://")))
    code = 0
    try:
        mine = alone(options, rank)
        save({"alone": mine})
        free()
        ranks = join(store, rank=rank, size=size, device=options.device, wait=options.wait)
        ranks.tell("alone", json.dumps(mine))
        for other in ranks.others:
            save({"alone": json.loads(ranks.hear("alone", other))})
        with torch.no_grad():
            together(options, ranks, save)
    except Exception as fault:
        save({"fault": f"rank {rank}: {describe(fault)}"})
        print(f"rank {rank}: {describe(fault)}", file=sys.stderr, flush=True)
        code = 1
    if rank == 0:
        print(*(f"{name}: {value}" for name, value in result["ratios"].items()), sep="\n")
        sys.stdout.flush()
    os._exit(code)  # not by way of a GPU that may wait for another for ever


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(Options, work, arguments, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
