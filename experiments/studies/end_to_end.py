"""What does speculation gain end to end, on a model of the shape of Llama-3-8B?

    python -m specdec.experiments.studies.end_to_end humaneval=code.jsonl mt_bench=chat.jsonl
    python -m specdec.experiments.studies.end_to_end ... resume=true temperatures=0 parts=ngram

The prompts are raw text without a chat template, the first ones of each file; the stop token is
ignored, so that all outputs have the same length. A *part* is what is compared in one go: the
trees of one draft model or head at a temperature and a batch, or what transformers offers, and
always our own `none`. Methods of a part take turns, job by job; a *job* is one prompt at batch 1,
else the first prompts of a file together.

The figure is that of decoding alone, the same for all: the time of a run of `tokens` new tokens
minus that of a run of one, by the clock, after a wait for the device. A run of one token is the
prompt and one step, whose time is taken off with all the tokens it may yield but one: of S steps
that is 1 / S too fast, less one in `tokens` (1.5 % at 128 tokens and 3 accepted; of plain
decoding nothing). `verbs`, the device seconds of each verb in all steps of the long runs, and
`step_tokens_per_second`, which follows from them, have no such bias.

The file is written anew after every round of a part. `resume=true` goes on after the last round,
also with more repeats, and measures a part again whose methods have changed.
"""

import gc
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from rich.console import Console
from transformers.utils import logging

from specdec.experiments.bench.clock import LostDevice, describe, recover
from specdec.experiments.figures import end_to_end_plot
from specdec.experiments.studies.drafters import OF_HEADS, model_words
from specdec.experiments.studies.theirs import theirs
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.metrics import figures
from specdec.lab.prompts import Asked, ask
from specdec.lab.session import Decoded, Session
from specdec.lab.study import Entry, Study, Turn, add
from specdec.lab.witness import noise
from specdec.lab.workshop import PLAIN, Way, Workshop, name_of, tree, word
from specdec.models.quantised import Quantize

LARGE = 8  # a batch from which the smaller grid counts
# Trees, for a batch below LARGE and from there on; above temperature 0 with children drawn from
# the draft, and with its most probable tokens.
CHAINS = [tree("chain", budget) for budget in (2, 3, 4, 6)]
STATIC = [tree("static", *widths) for widths in ((3, 2, 1), (4, 2, 2, 1))]
DYNAMIC = [
    tree("dynamic", *sizes)
    for sizes in ((12, 3, 4), (24, 6, 5), (32, 8, 6), (48, 6, 7), (63, 8, 8))
]
BUSHES = [tree("dynamic", *sizes) for sizes in ((24, 3, 4), (32, 4, 4), (63, 6, 5))]
FEW = [*CHAINS[:3], tree("dynamic", 6, 2, 3), DYNAMIC[0]]
GREEDY = ([*CHAINS, *DYNAMIC], FEW)
DRAWN = ([*CHAINS, *STATIC, *BUSHES], FEW)
TOP: tuple[list[str], list[str]] = ([CHAINS[0], tree("dynamic", 32, 8, 3)], [])
NGRAM = (
    [f"{tree('chain', n)} drafter.min_match={m}" for n in (4, 8, 16) for m in (1, 2)],
    [f"{tree('chain', n)} drafter.min_match=2" for n in (4, 8)],
)


@dataclass(frozen=True, kw_only=True)
class Options:
    humaneval: str = option(about="JSONL file")
    mt_bench: str = option(about="JSONL file")
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: tuple[str, ...] = option(
        ("standin:llama_160m", "standin:llama3_1b"), "likewise; each is a part"
    )
    heads: tuple[str, ...] = option((), f"each is a part: {OF_HEADS}", varies=True)
    quantize: Quantize = option("none", "of the target: none or fp8")
    device: str = option("cuda", "or cpu", varies=True)
    dtype: str = option("bfloat16", "of all models")
    exact: bool = option(False, "kernels.exact of all models")
    tokens: Annotated[int, Field(ge=2)] = option(128, "new ones, for each prompt")
    prompts: Positive = option(6, "of each file, at batch 1")
    repeats: Positive = option(2, "of all jobs", varies=True)
    temperatures: tuple[float, ...] = option((0.0, 1.0), "of sampling", varies=True)
    batches: tuple[Positive, ...] = option((1, 8, 32), "sequences together", varies=True)
    parts: tuple[str, ...] = option(
        (), "drafts, heads, ngram, transformers; all if empty", varies=True
    )
    only: tuple[str, ...] = option((), "methods whose name has one of these", varies=True)
    out: Path = option(Path("end_to_end.json"), "result file")
    resume: bool = option(False, "what the file has stays")


class Part(NamedTuple):
    """What is compared in one go."""

    part: str
    temperature: float
    batch: int

    def words(self, drafter: str) -> list[str]:
        """Our methods, but for `none`; of a model, with these words of what drafts."""
        large = self.batch >= LARGE
        if self.part == "transformers":
            return []
        if self.part == "ngram":
            return [f"drafter=ngram {words}" for words in NGRAM[large]]
        trees = GREEDY[large]
        if self.temperature:
            trees = [f"{one} tree.children=sample" for one in DRAWN[large]]
            trees += [f"{one} tree.children=top_k" for one in TOP[large]]
        return [f"{drafter} {one}" for one in trees]


def parts(options: Options) -> Iterator[Part]:
    """Those asked for; transformers decodes one prompt at a time.

    Raises:
        ValueError: no such part.
    """
    known = [*models(options), "ngram", "transformers"]
    for part in options.parts:
        if part not in known:
            raise ValueError(f"parts={part}: there are {', '.join(known)}")
    for batch, temperature, part in product(
        options.batches, options.temperatures, options.parts or known
    ):
        if part != "transformers" or batch == 1:
            yield Part(part, temperature, batch)


def models(options: Options) -> dict[str, str]:
    """Every draft and head in the words of `specdec.run`, by its part.

    Raises:
        ValueError: no such head.
    """
    found = {_short(p): f"drafter=small_llama {word('drafter.path', p)}" for p in options.draft}
    heads = (one.partition("=")[0] for one in options.heads)
    return found | {name: model_words(name, "", options.heads) for name in heads}


def _short(path: str) -> str:
    return path.rpartition(":")[2]


def ways_of(part: Part, shop: Workshop, options: Options, longest: int) -> dict[str, Way]:
    """The methods of a part, `none` first."""
    room = {"rows": part.batch, "longest": longest}
    ways = {"none": shop.way(PLAIN, **room)}
    drafts = {_short(path): path for path in options.draft}
    drafter, _, own = models(options).get(part.part, "").partition(" ")
    for words in part.words(drafter):
        ways[name_of(words)] = shop.way(f"{words} {own}", **room)
    if part.part == "transformers":
        ways |= theirs(options.target, drafts, part.temperature, shop.models.placement)
    return {
        name: way
        for name, way in ways.items()
        if name == "none" or not options.only or any(text in name for text in options.only)
    }


def time_runs(new: int) -> Turn:
    """A turn of a short and a long run, whose seconds go to the entry."""

    def turn(session: Session, batch: Sequence[Asked], entry: Entry) -> Decoded:
        session.decode(batch, 1)  # a prompt of a new length may compile something
        short, long = session.decode(batch, 1), session.decode(batch, new)
        if any(len(output) != new for output in long.outputs):
            raise ArithmeticError(f"outputs of {sorted({len(o) for o in long.outputs})} tokens")
        job = batch[0].name
        if len(batch) > 1:
            job = f"{job.partition('/')[0]}/{len(batch)}"
        runs = entry.setdefault("runs", {})
        runs = runs.setdefault(job, {"short": [], "long": [], "passes": []})
        runs["short"].append(short.seconds)
        runs["long"].append(long.seconds)
        runs["passes"].append(sum(long.passes))
        add(entry.setdefault("verbs", {}), long.verbs)
        return long

    return turn


def note(entry: Entry, fault: Exception) -> None:
    """What is wrong with a method; the others go on.

    Raises:
        LostDevice: nothing more can be measured in this process.
    """
    traceback.print_exception(fault)
    entry["fault"] = describe(fault)
    entry.pop("figures", None)
    recover()


@torch.no_grad()
def work(options: Options) -> int:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    every = list(parts(options))
    shop = Workshop(
        word("target.path", options.target),
        f"target.quantize={options.quantize} device={options.device} dtype={options.dtype}",
        word("kernels.exact", options.exact),
    )
    result = begin(options, shop.models.placement.device)
    result.pop("fault", None)
    most = max(options.prompts, *options.batches)
    sets = {
        name: ask(shop.target.tokenizer, {name: path}, limit=most, chat="never")[name]
        for name, path in (("humaneval", options.humaneval), ("mt_bench", options.mt_bench))
    }
    if "noise" not in result:
        result["noise"] = {
            name: noise(shop.target, asked[0].tokens) for name, asked in sets.items()
        }
    for part in every:
        try:
            measure(part, shop, sets, options, result)
        except LostDevice as fault:
            result["fault"] = str(fault)
            write(options.out, result)
            break
        gc.collect()
        if shop.target.device.type == "cuda":
            torch.cuda.empty_cache()
    Console(width=130).print(end_to_end_plot.table(result))
    if any(end_to_end_plot.measured(part) for part in result["parts"].values()):
        end_to_end_plot.plot(result, options.out.with_suffix(".png"))
    return int("fault" in result)


def measure(
    part: Part, shop: Workshop, sets: dict[str, list[Asked]], options: Options, result: Entry
) -> None:
    """Fill a part of the result.

    Raises:
        LostDevice: nothing more can be measured in this process.
    """
    name = f"T={part.temperature:g}, batch {part.batch}, {part.part}"
    empty = {**part._asdict(), "new_tokens": options.tokens, "methods": {}}
    found = result.setdefault("parts", {}).setdefault(name, empty)
    jobs = [asked[: part.batch] for asked in sets.values()]
    if part.batch == 1:
        jobs = [[one] for asked in sets.values() for one in asked[: options.prompts]]
    longest = max(len(one.tokens) for asked in sets.values() for one in asked) + options.tokens
    ways = ways_of(part, shop.having(f"sampling.temperature={part.temperature}"), options, longest)
    begun = time.perf_counter()
    study = Study(
        entries=found["methods"],
        batches=jobs,
        turn=time_runs(options.tokens),
        target=shop.target,
        save=partial(save, options.out, result, found),
        repeats=1 if part.part == "transformers" else options.repeats,
        plain="" if part.temperature else "none",
        fault=note,
    )
    try:
        study.in_turns(ways)
    finally:
        seconds = time.perf_counter() - begun
        found["seconds"] = found.get("seconds", 0.0) + seconds
    save(options.out, result, found)
    print(f"{name}: {seconds:.0f} s", flush=True)


def save(path: Path, result: Entry, part: Entry) -> None:
    """Write the file, with the figures of a part that has been measured further."""
    methods = part.get("methods", {})
    plain = methods.get("none", {})
    if plain.get("runs") and "fault" not in plain:
        for entry in methods.values():
            if entry.get("runs") and "fault" not in entry:
                entry["figures"] = figures(entry, plain, part)
    write(path, result)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
