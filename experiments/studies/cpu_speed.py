"""What does speculation gain on a CPU, and is our baseline honest?

    python -m specdec.experiments.studies.cpu_speed out=cpu_speed.json

Decodes prompts of the built-in set, spread evenly over it, greedily, one at a time, with
transformers' own `generate` (plain, assisted, prompt lookup) and with ours (plain and every
drafter and tree of a small grid), all in one process. The methods take turns prompt by prompt, so
that a slow spell of the machine meets all of them. Every output has the same length; the stop
token is ignored. Reported: median milliseconds per token over repeats, of each prompt; tokens per
second; and ratios with 95 % intervals by the jackknife over prompts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers.utils import logging

from specdec.experiments.figures.decoding import cpu_speed
from specdec.experiments.figures.markdown import show
from specdec.experiments.studies.theirs import theirs
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.prompts import Asked, ask
from specdec.lab.session import Decoded, Session
from specdec.lab.statistics import ratio
from specdec.lab.study import Entry, Study, Turn
from specdec.lab.workshop import PLAIN, Way, Workshop, name_of, tree

GENERATE = "transformers generate"
OURS = (
    *(f"drafter=small_llama {one}" for one in (tree("chain", 2), tree("dynamic", 12, 3, 4))),
    *(f"drafter=ngram {one}" for one in (tree("chain", 16), tree("dynamic", 16, 2, 16))),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = option(about="result file")
    tokens: Positive = option(128, "new ones, for each prompt")
    prompts: Positive = option(40, "of the built-in set, evenly spread")
    repeats: Positive = option(1, "of all prompts", varies=True)
    resume: bool = option(False, "what the file has stays")


def ways_of(shop: Workshop, longest: int) -> dict[str, Way]:
    """The methods by name."""
    found = theirs("zoo:target", {"": "zoo:draft"}, 0.0, shop.models.placement)
    others = {f"transformers {name.strip(', ')}": way for name, way in found.items()}
    ours = {words: shop.way(words, rows=1, longest=longest) for words in (PLAIN, *OURS)}
    return others | {name_of(w) if w != PLAIN else "none": way for w, way in ours.items()}


def time_prompts(new: int) -> Turn:
    """A turn whose seconds go to the entry, by prompt."""

    def turn(session: Session, batch: Sequence[Asked], entry: Entry) -> Decoded:
        done = session.decode(batch, new)
        runs = entry.setdefault("runs", {}).setdefault(
            batch[0].name, {"seconds": [], "passes": []}
        )
        runs["seconds"].append(done.seconds)
        runs["passes"].append(sum(done.passes))
        return done

    return turn


def figures(methods: dict[str, Entry], tokens: int) -> None:
    """Write into each entry what its runs amount to."""
    ms = {
        name: [median(run["seconds"]) / tokens * 1e3 for run in entry["runs"].values()]
        for name, entry in methods.items()
    }
    for name, entry in methods.items():
        passes = [count for run in entry["runs"].values() for count in run["passes"]]
        entry |= {
            "ms_per_token": ms[name],
            "accepted_length": tokens * len(passes) / sum(passes),
            "tokens_per_second": 1e3 * len(ms[name]) / sum(ms[name]),
            "speedup_over_none": ratio(ms["none"], ms[name]).around,
            "speedup_over_generate": ratio(ms[GENERATE], ms[name]).around,
        }


@torch.no_grad()
def work(options: Options) -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    shop = Workshop("target=zoo device=cpu dtype=float32")
    sets = ask(shop.target.tokenizer, {"builtin": None}, limit=options.prompts, take="spread")
    asked = sets["builtin"]
    result = begin(options, shop.target.device)
    methods = result.setdefault("methods", {})
    Study(
        entries=methods,
        batches=[[one] for one in asked],
        turn=time_prompts(options.tokens),
        target=shop.target,
        save=partial(write, options.out, result),
        repeats=options.repeats,
        plain=GENERATE,
    ).in_turns(ways_of(shop, max(len(one.tokens) for one in asked) + options.tokens))
    figures(methods, options.tokens)
    others = [entry["agreement"] for name, entry in methods.items() if name != GENERATE]
    result |= {
        "tokens_per_output": options.tokens,
        "outputs_unlike_transformers_generate": sum(
            one["checked"] - one["identical"] for one in others
        ),
        "prompts": [one.name.partition("/")[2] for one in asked],
    }
    write(options.out, result)
    show(cpu_speed(result))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
