"""What do long contexts cost, and what does a draft over a part of the target's own cache gain?

    python -m specdec.experiments.bench.run long context=32768 batch=8
    python -m specdec.experiments.bench.run long context=130048 batch=4     an H200 in bfloat16
    python -m specdec.experiments.bench.run long context=130048 batch=4 kv=fp8_e4m3 quantize=fp8

Three parts, to result["cases"]:

- `verify N`: a pass of the target over trees of N nodes after such contexts, and `draft 1`, one of
  `own_cache` over one node; on a GPU also where its time goes (`timeline.py`);
- `none` and `own_cache G`: the whole loop, methods in turns, with chains of G nodes that are
  accepted at a stated rate (`acceptance=synthetic`). Tokens and seconds of the steps of all
  sequences, prompts left out: how they end, one after the other, is a matter of chance;
- `beside`: a prompt of that length is read while the other rows decode. Steps meanwhile against
  steps afterwards. Rows need room for the steps that takes, so near the end of the target's
  positions all of them are shorter.

Keys and values of contexts are random, which costs as much; but the prompt of `beside` is read.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.experiments.bench.anatomy import warm_up_profiler
from specdec.experiments.bench.timeline import breakdown, read_profile
from specdec.flight import Step
from specdec.lab.build import cache_of
from specdec.lab.command import Positive, option
from specdec.lab.prompts import Asked
from specdec.lab.session import Decoded, OurSession, wait
from specdec.lab.workshop import PLAIN, Workshop, word
from specdec.models.quantised import Quantize
from specdec.passes import Passes, step_seconds
from specdec.prefixes import Prefixes
from specdec.request import KV_DTYPES, Request

PROFILED = 5  # passes
CHUNK = 512  # tokens of random keys and values at a time
SHORT = 64  # tokens of the prompt that makes room for a long one


@dataclass(frozen=True, kw_only=True)
class Options:
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    context: Positive = option(32768, "tokens of each sequence before its first step")
    batch: Positive = option(8, "sequences together")
    rate: float = option(0.9, "of acceptance")
    levels: tuple[Positive, ...] = option((3, 4, 5, 7), "of the chains of own_cache")
    sink: int = option(16, "of own_cache")
    window: int = option(1024, "of own_cache")
    nodes: tuple[Positive, ...] = option((1, 8, 64), "of the trees of passes")
    tokens: Positive = option(192, "new ones, for each sequence")
    rounds: Positive = option(2, "of all methods in turns")
    beside: Positive = option(64, "cache.prefill_beside")
    chunk: Positive = option(512, "cache.prefill_chunk")
    kv: str = option("auto", "cache.dtype")
    quantize: Quantize = option("none", "weights of the target: none or fp8")
    device: str = option("cuda", "or cpu", varies=True)
    dtype: str = option("bfloat16", "of the target")
    only: tuple[str, ...] = option((), "verify, loop, beside; all if empty", varies=True)
    out: Path = option(Path("long.json"), "result file")


class Filled(Prefixes):
    """Prompts whose keys and values are random ones."""

    def _read(self, row: int, tokens: Sequence[int]) -> None:
        cache = self.cache
        for start in range(0, len(tokens), CHUNK):
            count = min(CHUNK, len(tokens) - start)
            with cache.scratch_apart(1, count):
                cache.tree_keys.normal_()
                cache.tree_values.normal_()
                cache.commit([row], None, torch.tensor([count], device=cache.keys.device))


def long(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """All parts, to result["cases"]."""
    if options.device == "cuda":
        warm_up_profiler()
    shop = Workshop(
        word("target.path", options.target),
        f"device={options.device} dtype={options.dtype} cache.dtype={options.kv}",
        word("target.quantize", options.quantize),
        word("cache.prefill_beside", options.beside),
        word("cache.prefill_chunk", options.chunk),
    )
    cases: dict[str, Any] = result.setdefault("cases", {})
    for name, part in {"verify": passes, "loop": loop, "beside": beside}.items():
        if not options.only or name in options.only:
            part(options, shop, cases)
            save()
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def passes(options: Options, shop: Workshop, cases: dict[str, Any]) -> None:
    """Of the target over trees, and of a draft over one node.

    Raises:
        ValueError: no memory for them.
    """
    lm = shop.target
    made = Passes(
        lm,
        batch=options.batch,
        context=options.context,
        nodes=max(options.nodes),
        kv_dtype=KV_DTYPES[options.kv],
    )
    cache = made.cache
    if cache is None:
        raise no_room(options)
    token, first = made.tokens(1), torch.zeros(options.batch, 1, dtype=torch.int64)
    first = first.to(lm.device)

    def draft() -> Any:
        view = cache.view(made.rows, sink=options.sink, window=options.window)
        return lm.forward(cache, made.rows, token, first, view=view)

    calls = {f"verify {count}": made.verify(count) for count in options.nodes} | {"draft 1": draft}
    seconds = step_seconds([([], call) for call in calls.values()], lm.device, replays=15)
    for (name, call), (_, one) in zip(calls.items(), seconds, strict=True):
        cases[name] = {"ms": one * 1e3}
        if lm.device.type == "cuda":
            cases[name]["kernels"] = by_kernels(call, lm.device)


def by_kernels(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`breakdown` of some passes, which are not in a graph here."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    call()
    wait(device)
    profile.start()
    for _ in range(PROFILED):
        call()
    wait(device)
    profile.stop()
    return breakdown(read_profile(profile), PROFILED)


def prompts_of(options: Options, shop: Workshop) -> list[Asked]:
    """Random tokens, all different from the first on."""
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, options.context
    tokens = torch.randint(shop.target.vocab_size, shape, generator=generator).tolist()
    return [Asked(i, f"random/{i}", ids) for i, ids in enumerate(tokens)]


def filled_of(options: Options, shop: Workshop, tokens: int) -> Filled:
    """The cache of all methods.

    Raises:
        ValueError: sequences exceed the positions of the target, or the memory.
    """
    longest = options.context + tokens
    if longest > shop.target.max_context:
        raise ValueError(
            f"context={options.context}: with {tokens} new tokens it exceeds the "
            f"{shop.target.max_context} positions of {shop.target.name}; lower it"
        )
    cache = cache_of(shop.settings(""))
    rows, device = options.batch, shop.target.device
    capacity = cache.capacity(rows=rows, max_tokens=longest, device=device)
    filled = Filled(shop.target, capacity, chunk=CHUNK)
    if filled.cache.pages < capacity.pool_pages:  # rows would wait for one another
        raise no_room(options)
    return filled


def no_room(options: Options) -> ValueError:
    return ValueError(
        f"context={options.context}: {options.batch} of them exceed the memory; lower batch, or "
        f"use kv=fp8_e4m3"
    )


def loop(options: Options, shop: Workshop, cases: dict[str, Any]) -> None:
    """The whole loop, with drafts and without."""
    filled = filled_of(options, shop, options.tokens)
    view = f"drafter.sink={options.sink} drafter.window={options.window}"
    accepted = f"acceptance=synthetic acceptance.rates={options.rate} acceptance.allow_lossy=true"
    words = {"none": PLAIN}
    for count in options.levels:
        chain = f"tree=chain tree.budget={count}"
        words[f"own_cache {count}"] = f"drafter=own_cache {view} {chain} {accepted}"
    asked = prompts_of(options, shop)
    sessions = {name: session(one, shop, filled) for name, one in words.items()}
    filled.hold([one.tokens for one in asked])
    runs: dict[str, list[Decoded]] = {name: [] for name in sessions}
    for number in range(1 + options.rounds):  # the first captures graphs
        for name, one in sessions.items():
            done = one.decode(asked, options.tokens)
            if number:
                runs[name].append(done)
    for name, found in runs.items():
        steps = [step for done in found for step in done.steps]
        cases[name] = of_steps([step for step in steps if len(step.requests) == options.batch])
    for name in list(words)[1:]:
        gain = cases[name]["tokens_per_second"] / cases["none"]["tokens_per_second"]
        cases[name]["over_none"] = gain


def session(words: str, shop: Workshop, filled: Filled) -> OurSession:
    return OurSession(shop.method(words), shop.target, filled.capacity, prefixes=filled)


def of_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """Tokens per second of all sequences, and means of these steps; prompts are left out."""
    tokens = sum(sum(step.tokens) for step in steps)
    verbs: dict[str, float] = {}
    for step in steps:
        for verb, seconds in step.seconds.items():
            verbs[verb] = verbs.get(verb, 0.0) + seconds
    verbs.pop("prefill", None)
    total = sum(verbs.values())
    rows = sum(len(step.requests) for step in steps)
    return {
        "steps": len(steps),
        "tokens_per_second": tokens / total,
        "accepted_length": tokens / rows,
        "step_ms": total / len(steps) * 1e3,
        "verbs_ms": {verb: seconds / len(steps) * 1e3 for verb, seconds in verbs.items()},
    }


def beside(options: Options, shop: Workshop, cases: dict[str, Any]) -> None:
    """A long prompt is read while all rows but one decode.

    Raises:
        ValueError: too few rows or tokens for that.
    """
    if options.batch < 2:
        raise ValueError("batch=1: no row decodes while a prompt is read; raise it")
    steps_to_read = options.context // options.beside + 64
    room = shop.target.max_context - steps_to_read
    options = replace(options, context=min(options.context, max(1, room)))
    filled = filled_of(options, shop, steps_to_read)
    *asked, late = prompts_of(options, shop)
    one = session(PLAIN, shop, filled)
    filled.hold([other.tokens for other in asked])
    for _ in one.decoder.run(joining(asked, late.tokens[: options.chunk + 1], 32)):
        pass  # compiles and captures
    steps: list[Step] = []
    for _ in one.decoder.run(joining(asked, late.tokens, steps_to_read), on_step=steps.append):
        pass
    joined = next(i for i, step in enumerate(steps) if options.batch in step.requests)
    seconds = [sum(step.seconds.values()) for step in steps]
    meanwhile = seconds[1:joined]
    after = seconds[joined + 1 + 8 :]
    if not after or not meanwhile:
        raise ValueError(f"context={options.context}: too short for a prompt to be read beside")
    plain = statistics.median(after)
    cases["beside"] = {
        "context": options.context,
        "steps": len(meanwhile),
        "mean_ms": statistics.fmean(meanwhile) * 1e3,
        "longest_ms": max(meanwhile) * 1e3,
        "alone_ms": plain * 1e3,
        "stretch": statistics.fmean(meanwhile) / plain,
        "read_seconds": sum(meanwhile),
    }


def joining(asked: Sequence[Asked], late: Sequence[int], new: int) -> list[Request]:
    """Requests that decode `new` tokens each, a short one whose row is soon free, and the one that
    is read beside them."""
    prompts = [*((one.tokens, new) for one in asked), (late[:SHORT], 1), (late, 8)]
    return [
        Request(id=i, prompt_ids=tokens, max_new_tokens=count)
        for i, (tokens, count) in enumerate(prompts)
    ]
