"""Where does a step go?

    python -m specdec.experiments.bench.run anatomy cases=[none,chain:4] batches=[1,8]

A case is `none`, or the tree of a drafting model: chain:BUDGET, "dynamic:BUDGET,WIDTH,DEPTH" or
"static:WIDTHS", which need their quotes in a list; after the name of a learned head it is that of
the head, as in "eagle3 chain:16". For each, batch and temperature, means over steady steps, after
a warm-up:

- milliseconds of each verb, by device events, and their sum over a whole run against the clock,
  which must agree within 3 %;
- on a GPU, from torch.profiler, of kernels by group (`timeline.py`), and the share of the time in
  which the device had nothing to do. Profiling slows the host, so that there are two such shares:
  of the profiled steps, and of the busy time against steps that were not profiled.

The file is written anew after every case.
"""

import gc
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from specdec.experiments.bench.clock import LostDevice, describe, recover
from specdec.experiments.bench.timeline import breakdown, read_profile
from specdec.experiments.studies.drafters import HEADS, OF_HEADS, kind_of, model_words
from specdec.flight import Step
from specdec.lab.command import Positive, option
from specdec.lab.metrics import VERBS
from specdec.lab.prompts import Asked, ask
from specdec.lab.session import OurSession, wait
from specdec.lab.workshop import PLAIN, Workshop, tree, word
from specdec.models.quantised import Quantize
from specdec.request import Request

SKIPPED = 4  # steps before the steady ones
TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class Options:
    cases: tuple[str, ...] = option(("none", "chain:4", "dynamic:12,3,4"), "steps", varies=True)
    batches: tuple[Positive, ...] = option((1, 8), "sequences together", varies=True)
    temperatures: tuple[Literal[0, 1], ...] = option((0,), "0 or 1", varies=True)
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("standin:llama_160m", "likewise")
    heads: tuple[str, ...] = option((), OF_HEADS, varies=True)
    quantize: Quantize = option("none", "of the target: none or fp8")
    device: str = option("cuda", "or cpu", varies=True)
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of both models")
    prompts: str | None = option(None, "JSONL file; the built-in set by default")
    tokens: Positive = option(256, "new ones, for each prompt")
    profiled: Positive = option(16, "steps under torch.profiler")
    out: Path = option(Path("step_anatomy.json"), "result file")
    resume: bool = option(False, "what the file has stays, faults excepted")


def words_of(case: str, temperature: float, options: Options) -> str:
    """A case in the words of `specdec.run`.

    Raises:
        ValueError: not a case, or a head that `heads` does not name.
    """
    sampling = f"sampling.temperature={temperature}"
    if case == "none":
        return f"{PLAIN} {sampling}"
    head, _, shape = case.rpartition(" ")
    if head and kind_of(head) not in HEADS:
        raise ValueError(f"cases={case}: of the learned heads there are {', '.join(HEADS)}")
    drafter = model_words(head or "small_llama", options.draft, options.heads)
    kind, _, sizes = shape.partition(":")
    numbers = tuple(int(size) for size in sizes.split(",") if size.isdigit())
    wanted = {"chain": 1, "dynamic": 3, "static": max(1, len(numbers))}
    if len(numbers) != wanted.get(kind) or len(numbers) != len(sizes.split(",")):
        raise ValueError(
            f"cases={case}: must be none, chain:BUDGET, dynamic:BUDGET,WIDTH,DEPTH or "
            f"static:WIDTHS"
        )
    return f"{drafter} {tree(kind, *numbers)} {sampling}"


def steady(steps: Sequence[Step], batch: int) -> list[Step]:
    """Those with a whole batch, without the first ones."""
    return [s for s in steps[SKIPPED:] if len(s.requests) == batch and "prefill" not in s.seconds]


def by_verbs(session: OurSession, batch: Sequence[Asked], tokens: int) -> dict[str, Any]:
    """Milliseconds of each verb, and the sum of all steps against the clock."""
    session.decode(batch, tokens)
    done = session.decode(batch, tokens)
    inside = steady(done.steps, len(batch))
    if not inside:
        raise ValueError(f"tokens={tokens}: too few for a steady step")
    total = sum(sum(step.seconds.values()) for step in done.steps)
    verbs = {verb: sum(step.seconds.get(verb, 0.0) for step in inside) for verb in VERBS}
    ratio = total / done.seconds
    return {
        "steps": len(inside),
        "wall_ms": sum(verbs.values()) / len(inside) * 1e3,
        "verbs_ms": {
            verb: seconds / len(inside) * 1e3 for verb, seconds in verbs.items() if seconds
        },
        "accepted_length": sum(map(len, done.outputs)) / sum(done.passes),
        "sum_over_clock": ratio,
        "adds_up": abs(ratio - 1) <= TOLERANCE,
    }


def by_kernels(
    session: OurSession, batch: Sequence[Asked], tokens: int, steps: int
) -> dict[str, Any]:
    """`breakdown` of some steady steps. At the report of a step the same number of later ones is
    queued, in steady state; so between the waits at two reports lies the work of as many steps as
    were reported."""
    requests = [Request(id=a.id, prompt_ids=a.tokens, max_new_tokens=tokens) for a in batch]
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    seen: list[Step] = []

    def on_step(step: Step) -> None:
        seen.append(step)
        if len(seen) == SKIPPED:
            wait(session.device)
            profile.start()
        elif len(seen) == SKIPPED + steps:
            wait(session.device)
            profile.stop()

    for _ in session.decoder.run(requests, on_step=on_step):
        pass
    wait(session.device)
    if len(seen) < SKIPPED + steps:
        if len(seen) >= SKIPPED:
            profile.stop()
        raise ValueError(f"{len(seen)} steps: raise tokens or lower profiled")
    return breakdown(read_profile(profile), steps)


def measure(
    words: str, shop: Workshop, batch: Sequence[Asked], options: Options
) -> dict[str, Any]:
    """One case at a temperature and a batch."""
    longest = max(len(asked.tokens) for asked in batch) + options.tokens
    session = shop.session(words, rows=len(batch), longest=longest)
    session.warm_up(batch[0].tokens)
    found = by_verbs(session, batch, options.tokens) | session.notes()
    if shop.target.device.type == "cuda":
        try:
            found["kernels"] = by_kernels(session, batch, options.tokens, options.profiled)
            found["host_gap"] = max(0.0, 1 - found["kernels"]["busy_ms"] / found["wall_ms"])
        except (RuntimeError, ValueError) as fault:  # the verbs are worth keeping
            traceback.print_exc()
            found["profile_fault"] = describe(fault)
            recover()
    return found


def anatomy(options: Options, result: dict[str, Any], save: Callable[[], None]) -> int:
    """Every case at every temperature and batch, to result["cases"]; returns 1 if the device was
    lost.

    Raises:
        ValueError: a case or a temperature that is none, or a model that cannot be loaded.
    """
    for temperature, case in product(options.temperatures, options.cases):
        words_of(case, temperature, options)
    if options.device == "cuda":
        warm_up_profiler()
    shop = Workshop(
        word("target.path", options.target),
        f"target.quantize={options.quantize} device={options.device} dtype={options.dtype}",
    )
    cases = result.setdefault("cases", {})
    paths = {"prompt": options.prompts}
    prompts = ask(shop.target.tokenizer, paths, limit=max(options.batches), chat="never")["prompt"]
    for batch, temperature, case in product(options.batches, options.temperatures, options.cases):
        name = f"{case}, batch {batch}" + (f", T={temperature:g}" if temperature else "")
        if "wall_ms" in cases.get(name, {}):
            continue
        words = words_of(case, temperature, options)
        try:
            cases[name] = measure(words, shop, prompts[:batch], options)
        except Exception as fault:
            traceback.print_exc()
            cases[name] = {"fault": describe(fault)}
            try:
                recover()
            except LostDevice:
                return 1
        finally:
            save()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def warm_up_profiler() -> None:
    """The profiler has to see the first CUDA graph being made, and must not leave in between."""
    os.environ["TEARDOWN_CUPTI"] = "0"
    os.environ["DISABLE_CUPTI_LAZY_REINIT"] = "1"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
