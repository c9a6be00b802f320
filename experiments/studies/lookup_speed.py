"""How long does drafter=retriever take to look a text up?

    python -m specdec.experiments.studies.lookup_speed docs.jsonl.xz novels/ tokens=100000000

Builds a datastore of so many tokens, opens it again, and times `propose` over steps of texts that
were held out (one document in `HELD_OUT`), in one thread and with the files in the page cache.
Where the texts have fewer tokens they come again with the lines and sentences of every document
shuffled; the file says how often.

The file: `datastore` (size, seconds to build and to open), `lookup_us` by source, with the steps
that found a match and those that did not, and what a first step or a finished request costs: by
the clock, and of the processor (`cpu_`), which other programs disturb less.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.progress import Progress

from specdec.drafters.datastore import METADATA, SUFFIXES, TOKENS, Datastore
from specdec.drafters.retriever import Retriever
from specdec.experiments.figures import drafters as tables
from specdec.experiments.figures.markdown import show
from specdec.experiments.tools.build_datastore import build, documents, load_tokenizer
from specdec.lab.command import begin, option, run_main, write
from specdec.models.load import Models
from specdec.models.placement import Placement
from specdec.request import Decoding, Request

HELD_OUT = 50
LEVELS = 8
STEP = 2  # tokens that a text grows by between look-ups
OWN_TEXTS = 1024, 4096  # tokens
WARM_UP = 200
HISTORY = 1000, 256  # outputs of earlier requests, tokens of each
MIN_MATCHES = 1, 4
Us = tuple[float, float]
"""Microseconds by the clock, and of the processor."""


def training_texts(sources: Sequence[str], rounds: list[int]) -> Iterator[str]:
    """Documents but those held out, without end; `rounds[0]` counts how often they came."""
    generator = random.Random(0)
    for turn in count():
        for source in sources:
            for number, text in enumerate(documents(source)):
                if number % HELD_OUT:
                    rounds[0] = turn + 1
                    yield rearranged(text, generator) if turn else text


def rearranged(text: str, generator: random.Random) -> str:
    """The same lines and sentences in another order."""
    parts = re.split(r"(?<=\n)|(?<=[.!?] )", text)
    generator.shuffle(parts)
    return "".join(parts)


def held_out(sources: Sequence[str], tokenizer: Any, tokens: int) -> list[list[int]]:
    """Documents that are not in the datastore, a share from each source."""
    found = []
    for source in sources:
        room = tokens // len(sources)
        for text in islice(documents(source), 0, None, HELD_OUT):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            found.append(ids[: 2 * HISTORY[1]])
            room -= len(found[-1])
            if room < 0:
                break
    random.Random(1).shuffle(found)
    return found


def lookups(
    drafter: Retriever, texts: list[list[int]], queries: int, shortest: int = 16
) -> tuple[list[tuple[Us, int]], list[Us]]:
    """(us, match length) of steps along the texts, and us of the first step of each."""
    steps: list[tuple[Us, int]] = []
    first = []
    for number, text in enumerate(texts):
        request = Request(id=number, prompt_ids=text, max_new_tokens=1)  # none of it is output
        sequence = Decoding(request, 0, text[:shortest])
        drafter.start([sequence])
        look_up = partial(_look_up, drafter, sequence)
        first.append(_us(look_up))
        for end in range(shortest + STEP, len(text), STEP):
            sequence.tokens += text[end - STEP : end]
            steps.append((_us(look_up), drafter.match_length(sequence)))
        drafter.finish(sequence)
        if len(steps) >= queries + WARM_UP:
            break
    return steps[WARM_UP:], first


def _look_up(drafter: Retriever, sequence: Decoding) -> None:
    for _ in drafter.propose(sequence, LEVELS):
        pass


def _us(call: Callable[[], Any]) -> Us:
    clock, processor = time.perf_counter(), time.thread_time()
    call()
    return (time.perf_counter() - clock) * 1e6, (time.thread_time() - processor) * 1e6


def spread(us: list[Us]) -> dict[str, float]:
    if not us:
        return {"steps": 0}
    clock, processor = np.array(us).T
    found = np.percentile(clock, [50, 90, 99, 100]).tolist()
    found += np.percentile(processor, [50, 90, 99]).tolist()
    names = ("median", "p90", "p99", "max", "cpu_median", "cpu_p90", "cpu_p99")
    return {"steps": len(us)} | {
        name: round(value, 1) for name, value in zip(names, found, strict=True)
    }


def summary(steps: list[tuple[Us, int]]) -> dict[str, Any]:
    return {
        "match": spread([us for us, length in steps if length]),
        "no_match": spread([us for us, length in steps if not length]),
        "mean_match_length": round(sum(length for _, length in steps) / max(1, len(steps)), 2),
    }


def measure(folder: Path, target: Any, texts: list[list[int]], queries: int) -> dict[str, Any]:
    """Look-up times by source."""
    found: dict[str, Any] = {}
    for part in (TOKENS, SUFFIXES):  # into the page cache
        with (folder / part).open("rb") as file:
            while file.read(2**24):
                pass
    flat = [token for text in texts for token in text]
    outputs, size = HISTORY
    past = [flat[i * size : (i + 1) * size] for i in range(min(outputs, len(flat) // 2 // size))]
    later = [flat[i : i + 2 * size] for i in range(len(past) * size, len(flat), 2 * size)]
    for least in MIN_MATCHES:
        settings: dict[str, Any] = {"min_match": least, "max_spec_factor": None}
        store = Retriever(own_text=False, datastore=str(folder), **settings)
        store.load(target, Models(Placement(device=torch.device("cpu"), dtype=torch.float32)))
        steps, _ = lookups(store, texts, queries)
        found[f"datastore, min_match {least}"] = summary(steps)
        for length in OWN_TEXTS:
            long = [flat[i : i + length] for i in range(0, len(flat) - length, length)]
            steps, first = lookups(Retriever(**settings), long, queries, length * 15 // 16)
            name = f"own text of {length} tokens, min_match {least}"
            found[name] = summary(steps) | {"first_step": spread(first)}
        earlier = Retriever(own_text=False, reset="never", **settings)
        finishing = []
        for number, text in enumerate(past):
            request = Request(id=number, prompt_ids=[0], max_new_tokens=size)
            done = Decoding(request, 0, [0, *text])
            earlier.start([done])
            finishing.append(_us(partial(earlier.finish, done)))
        steps, _ = lookups(earlier, later, queries)
        name = f"history of {len(past)} outputs of {size} tokens, min_match {least}"
        found[name] = summary(steps) | {"finish": spread(finishing)}
    return found


@dataclass(frozen=True, kw_only=True)
class Options:
    texts: tuple[str, ...] = option(about="as for build_datastore", free=True)
    tokenizer: str = option("zoo:target", "model folder, hub id or zoo:NAME")
    tokens: Annotated[int, Field(ge=100)] = option(100_000_000, "of the datastore")
    queries: Annotated[int, Field(ge=100)] = option(5000, "steps timed for each source")
    store: Path | None = option(None, "keep the datastore there; used if it is one")
    out: Path = option(Path("lookup_speed.json"), "result file")


def work(options: Options) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    target = SimpleNamespace(tokenizer=tokenizer, vocab_size=len(tokenizer))
    with tempfile.TemporaryDirectory() as temporary, Progress() as progress:
        folder = options.store or Path(temporary) / "store"
        if (folder / METADATA).exists():
            about = json.loads((folder / "built.json").read_text())
        else:
            about = _build(options, folder, target.tokenizer, progress)
            write(folder / "built.json", about)
        begun = time.perf_counter()
        Datastore.open(folder, tokenizer=target.tokenizer)
        about["open_seconds"] = round(time.perf_counter() - begun, 3)
        room = 40 * options.queries + 2 * HISTORY[0] * HISTORY[1]
        texts = held_out(options.texts, target.tokenizer, room)
        shown = replace(  # where the files lie is nobody's business
            options,
            texts=tuple(Path(text).name for text in options.texts),
            store=options.store and Path(options.store.name),
            out=Path(options.out.name),
        )
        result = begin(shown, torch.device("cpu"))
        result["settings"] |= {"levels": LEVELS, "step": STEP, "samples": 32, "max_match": 16}
        result["datastore"] = about
        result["lookup_us"] = measure(folder, target, texts, options.queries)
        result["hardware"]["load"] = os.getloadavg()[0]  # 1 is this program's own
        result["versions"]["pydivsufsort"] = version("pydivsufsort")
        write(options.out, result)
    show(tables.lookup_speed(result))


def _build(options: Options, folder: Path, tokenizer: Any, progress: Progress) -> dict[str, Any]:
    """Make the datastore; returns what there is to say of it."""
    rounds = [0]
    begun = time.perf_counter()
    made = build(
        training_texts(options.texts, rounds),
        folder,
        tokenizer=tokenizer,
        name=options.tokenizer,
        sources=[Path(source).name for source in options.texts],
        max_tokens=options.tokens,
        progress=progress,
    )
    return {
        "tokens": made["tokens"],
        "documents": made["documents"],
        "bytes": sum(made["files"].values()),
        "rounds": rounds[0],
        "rounds_note": "after the first, lines and sentences of documents are shuffled",
        "build_seconds": round(time.perf_counter() - begun, 1),
    }


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
