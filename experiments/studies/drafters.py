"""What is each drafter worth: accepted length at equal budgets, and tokens per second?

    python -m specdec.experiments.studies.drafters grid=budgets humaneval=code.jsonl out=a.json
    python -m specdec.experiments.studies.drafters grid=speed humaneval=code.jsonl out=b.json \\
        target=standin:llama3_8b draft=standin:llama_160m exit_layer=10 dtype=bfloat16

Prompts are the first ones of each set (of each category of Spec-Bench); the stop token is
ignored, so that all outputs have the same length. `budgets` gives every drafter trees of at most
the same number of nodes. `speed` gives each the trees that suit it; its methods take turns prompt
by prompt, and the figure is that of decoding: the time of all steps, prefill left out, by device
events on a GPU. `wide` does so with a chain of 7 and trees of 16 to 255 nodes, of drafters that
are models: at temperature 0 `dynamic` ones, above it those of `tree=optimal`; `texts` with one
tree each, to compare texts alone. `heads` names the files of learned heads; names of several
words, the first of them the drafter, compare settings of one drafter:
`drafters=[eagle3,eagle3 fp8] heads=["eagle3 fp8=zoo:eagle3,quantize=fp8"]`. `early_exit anew` is
an ablation: the same trees, verified from the first layer. Online state is that of the drafter's
YAML: prompts come in the order of the file, and drafters that never forget learn from those
before. At temperature 0 outputs are compared with those of plain decoding, and divergences
explained as in `specdec.lab.lossless`. The file is written anew after every prompt.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from specdec.drafters.datastore import METADATA, Datastore
from specdec.drafters.early_exit import EarlyExit
from specdec.experiments.figures.drafters import (
    drafter_lengths,
    drafter_speed,
    drafter_texts,
    drafter_wide,
)
from specdec.experiments.figures.markdown import show
from specdec.heads.formats import levels_of
from specdec.lab.command import begin, option, run_main, write
from specdec.lab.settings import settings_of
from specdec.lab.study import Entry, Study, spend
from specdec.lab.workshop import PLAIN, StudyOptions, name_of, tree, word
from specdec.protocols import StepContext
from specdec.tree import TokenTree

HEADS = ("eagle3", "mtp", "peagle", "dflash", "dspark")  # over the target's states
OVER_STATES = (*HEADS, "eagle", "medusa")
OF_HEADS = (
    "DRAFTER=folder or hub id of each head, and its settings behind commas, in quotes: "
    '"mtp=FOLDER,vocabulary=32000"; eagle3 and dspark have their own; "mtp few=..." is one more, '
    "of that name"
)
MODELS = ("small_llama", "early_exit", "translated", *HEADS)  # their children may be sampled
SEARCHING = ("ngram", "pld", "rest", "retriever", "suffix_decoding")
LONGEST_CHAIN = 16

# The trees of a budget, for all drafters; and for models above temperature 0.
DYNAMIC = {
    n: tree("dynamic", n, *of)
    for n, of in {
        8: (3, 4),
        16: (4, 6),
        32: (6, 7),
        64: (8, 8),
        127: (12, 8),  # with the root, as many rows as a power of two
        255: (16, 8),
    }.items()
}
SAMPLED = {
    8: (tree("static", 2, 1, 1), tree("static", 4, 1)),
    16: (tree("static", 3, 2, 1), tree("static", 4, 2)),
    32: (tree("static", 4, 2, 2), tree("static", 3, 2, 1, 1, 1)),
    64: (tree("static", 4, 2, 2, 1), tree("static", 6, 3, 2)),
    127: (tree("static", 5, 3, 2, 1, 1), tree("static", 8, 3, 2)),
    255: (tree("static", 6, 3, 2, 2, 1), tree("static", 8, 4, 3)),
}
WIDE_BUDGETS = 16, 32, 64, 127, 255
WIDE_CHAIN = 7
# Of a batch: small trees are faster there, and more rows than these slower than plain decoding.
LARGE_BUDGETS, LARGE_CHAIN, MOST_ROWS = (8, 16, 64, 127, 255), 4, 2048
DEEPEST = 8  # level of those trees, and of a block
CHAIN, LONG = tree("chain", 4), tree("chain", 16)
WIDE, DEEP = tree("dynamic", 63, 8, 8), tree("dynamic", 32, 4, 12)
LAYERS = tree("dynamic", 24, 6, 3), tree("dynamic", 48, 8, 4)
BUSH = tree("dynamic", 16, 4, 3)
PARTS = WIDE, tree("dynamic", 63, 8, 16)
# What suits each at batch 1 on a GPU, at temperature 0 and above.
FAST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "small_llama": (
        (WIDE, tree("dynamic", 32, 8, 6)),
        (tree("static", 4, 2, 2, 1), tree("static", 3, 2, 1)),
    ),
    "early_exit": (LAYERS, (tree("static", 6, 3), tree("static", 4, 2, 1))),
    "early_exit anew": (LAYERS, ()),
    **{
        name: (
            (WIDE, tree("dynamic", 48, 6, 7)),
            (tree("static", 4, 2, 2, 1), tree("static", 3, 2, 1)),
        )
        for name in HEADS
    },
    "translated": ((WIDE,), (tree("static", 4, 2, 2, 1),)),
    "token_recycling": (
        (tree("dynamic", 48, 6, 5), tree("dynamic", 63, 8, 6)),
        (tree("dynamic", 24, 6, 3),),
    ),
    "lookahead": ((tree("dynamic", 63, 8, 4),), (BUSH,)),
    "ngram": ((LONG,), (CHAIN,)),
    "pld": ((LONG,), (CHAIN,)),
    "retriever": ((LONG, DEEP), (CHAIN,)),
    "rest": ((tree("dynamic", 32, 4, 6),), (BUSH,)),
    "suffix_decoding": ((LONG, DEEP), (CHAIN,)),
    "compose cascade": (PARTS, ()),
    "compose bandit": (PARTS, ()),
    "compose union": ((WIDE,), ()),
}
LARGE = 8  # a batch from which small trees are faster; for every drafter these
SMALL = (
    (tree("chain", 2), CHAIN, tree("dynamic", 6, 2, 3), tree("dynamic", 12, 3, 4)),
    (tree("chain", 2), CHAIN, tree("static", 2, 1), tree("static", 3, 2)),
)
TIMED = ("early_exit anew", "compose bandit")  # say something about time alone
MODEL_DEPTH = 8  # of the model in a composition


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    grid: Literal["budgets", "speed", "texts", "wide"] = option(about="what is compared")
    other_draft: str | None = option(None, "as draft, with another tokenizer; for translated")
    datastore: Path | None = option(None, "folder; for rest")
    exit_layer: int | None = option(None, "of early_exit")
    heads: tuple[str, ...] = option((), OF_HEADS, varies=True)
    temperatures: tuple[float, ...] = option((0.0, 1.0), "of sampling", varies=True)
    drafters: tuple[str, ...] = option(tuple(FAST), "which", varies=True)
    budgets: tuple[int, ...] = option((), "of grid=wide, if not those of the batch", varies=True)
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budgets and self.grid != "wide":
            raise ValueError(f"budgets={[*self.budgets]}: are of grid=wide, not of {self.grid}")
        check_budgets(self.budgets, DYNAMIC)


def check_budgets(budgets: Iterable[int], known: Iterable[int]) -> None:
    """Raise ValueError for a budget that there are no trees of."""
    known = list(known)
    for budget in budgets:
        if budget not in known:
            raise ValueError(f"budgets={budget}: there are {', '.join(map(str, known))}")


class Anew(EarlyExit):
    """What resuming is worth: the same trees, verified from the first layer on."""

    def end(self, context: StepContext, tree: TokenTree, expanded: torch.Tensor) -> TokenTree:
        return replace(super().end(context, tree, expanded), begun=None)


def kind_of(name: str) -> str:
    """The drafter of a name, which for a head is its first word: trees are found by it."""
    first = name.partition(" ")[0]
    return first if first in HEADS else name


def model_words(name: str, draft: str, heads: Sequence[str]) -> str:
    """`small_llama` or a head in the words of `specdec.run`.

    Raises:
        ValueError: a head that `heads` does not name, or names twice, or what is none in it.
    """
    paths = {"small_llama": draft, "eagle3": "zoo:eagle3", "dspark": "zoo:dspark"}
    given: dict[str, str] = {}
    for one in heads:
        head, equals, said = one.partition("=")
        if kind_of(head) not in HEADS or not equals:
            raise ValueError(
                f"heads={one}: must begin with one of {', '.join(HEADS)}; what has a comma stands "
                f'in quotes, as in heads=["mtp=FOLDER,vocabulary=32000"]'
            )
        if head in given:
            raise ValueError(
                f"heads={one}: {given[head]} has this name already; give one of them another, "
                f'as in "{kind_of(head)} other={said}"'
            )
        given[head], paths[head] = one, said
    if name not in paths:
        raise ValueError(f'drafters={name}: needs heads=["{name}=FOLDER"]')
    path, *settings = paths[name].split(",")
    more = (shlex.quote(f"drafter.{one.strip()}") for one in settings)
    return " ".join([f"drafter={kind_of(name)}", word("drafter.path", path), *more])


def drafter_words(name: str, options: Options) -> str:
    """A drafter in the words of `specdec.run`.

    Raises:
        ValueError: no such drafter, or what it needs is not given.
    """
    if kind_of(name) not in FAST:
        raise ValueError(f"drafters={name}: there are {', '.join(FAST)}")
    if kind_of(name) in (*HEADS, "small_llama"):
        return model_words(name, options.draft, options.heads)
    kind, _, mode = name.partition(" ")
    words = [f"drafter={kind}"]
    needed = {"rest": "datastore", "translated": "other_draft"}.get(name)
    if needed:
        value = getattr(options, needed)
        if value is None:
            raise ValueError(f"drafters={name}: needs {needed}")
        words.append(word(f"drafter.{'path' if name == 'translated' else needed}", str(value)))
    if kind == "early_exit":
        words.append(word("drafter.exit_layer", options.exit_layer))
    if mode == "anew":
        words.append(f"drafter._target_=specdec.experiments.studies.drafters.{Anew.__name__}")
    if kind == "compose":
        words += [f"drafter.mode={mode}", f"drafter.parts.second.depth={MODEL_DEPTH}"]
        words.append(word("drafter.parts.second.path", options.draft))
    return " ".join(words)


def choice_of(words: str) -> tuple[str, str | None]:
    """Drafter and path in the words of `specdec.run`."""
    settings = settings_of(words)
    return settings["choices"]["drafter"], settings["drafter"].get("path")


def deepest(words: str) -> int:
    """Levels that a tree of a drafter in these words may have."""
    drafter, path = choice_of(words)
    if drafter not in OVER_STATES or path is None:
        return DEEPEST
    return min(DEEPEST, levels_of(path, (drafter,)) or DEEPEST)


def best_sampled(drafter: str, budget: int, depth: int) -> str:
    """The tree of draws that measured rates make the most of; heads go by those of eagle3."""
    rates = "eagle3" if drafter in OVER_STATES else "zoo"
    shape = f"{tree('optimal', budget)} {word('tree.depth', depth)} tree.rates={rates}"
    return f"{shape} tree.children=sample"


def methods(
    grid: str,
    temperature: float,
    drafter: str,
    batch: int = 1,
    depth: int = DEEPEST,
    budgets: Sequence[int] = (),
) -> Iterator[tuple[int, str]]:
    """(the budget, or 0; words of a tree) of a drafter that names so many levels; `budgets` of
    wide trees, if not those of the batch."""
    drafter = kind_of(drafter)
    sampled = bool(temperature) and drafter in MODELS
    children = " tree.children=sample" if sampled else ""
    if grid == "texts":
        for shape in FAST[drafter][bool(temperature)][:1]:
            yield 0, shape + children
        return
    if grid == "wide":
        if drafter not in MODELS:
            return
        chain, usual = WIDE_CHAIN, list(WIDE_BUDGETS)
        if batch >= LARGE:
            chain, usual = LARGE_CHAIN, [n for n in LARGE_BUDGETS if n * batch <= MOST_ROWS]
        yield chain, tree("chain", chain) + children
        for budget in budgets or usual:
            yield budget, best_sampled(drafter, budget, depth) if sampled else DYNAMIC[budget]
        return
    if grid == "speed":
        for shape in (SMALL if batch >= LARGE else FAST[drafter])[bool(temperature)]:
            yield 0, shape + children
        return
    for budget, dynamic in DYNAMIC.items() if drafter not in TIMED else ():
        for shape in SAMPLED[budget] if sampled else (dynamic,):
            yield budget, shape + children
        if drafter in SEARCHING and budget <= LONGEST_CHAIN:
            yield budget, tree("chain", budget) + children


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    words = {name: drafter_words(name, options) for name in options.drafters}
    shop = options.workshop()
    result = begin(options, shop.models.placement.device)
    if options.datastore is not None:
        Datastore.open(options.datastore, tokenizer=shop.target.tokenizer, setting="datastore")
        result["datastore"] = contents(options.datastore)
    sets = options.read(shop)
    result["sets"] = {name: [one.name for one in of] for name, of in sets.items()}
    for temperature in options.temperatures:
        own = shop.having(f"sampling.temperature={temperature}")
        way = partial(own.way, rows=options.batch, longest=options.longest(sets))
        ways = {"none: chain 1": way(PLAIN, drafter="none", budget=0, state=None)}
        for drafter in options.drafters:
            depth = deepest(words[drafter])
            trees = methods(
                options.grid, temperature, drafter, options.batch, depth, options.budgets
            )
            for budget, shape in trees:
                made = way(f"{words[drafter]} {shape}", drafter=drafter, budget=budget)
                made.entry["state"] = made.state
                ways[f"{drafter}: {name_of(shape)}"] = made
        study = Study(
            entries=result.setdefault("parts", {}).setdefault(f"T={temperature:g}", {}),
            batches=options.batches(sets),
            turn=spend(options.tokens),
            target=shop.target,
            save=partial(write, options.out, result),
            plain="" if temperature else next(iter(ways)),
        )
        # At equal budgets one method after the other, else all in turns.
        (study.in_turns if options.grid in ("speed", "wide") else study.one_by_one)(ways)
    tables: dict[str, Callable[..., str]] = {
        "budgets": drafter_lengths,
        "texts": drafter_texts,
        "wide": drafter_wide,
    }
    show(tables.get(options.grid, drafter_speed)(result))


def contents(datastore: Path) -> Entry:
    """What a datastore was made of."""
    known = json.loads((datastore / METADATA).read_text())
    sources = ["/".join(Path(source).parts[-2:]) for source in known["sources"]]
    return {"tokens": known["tokens"], "documents": known["documents"], "sources": sources}


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
