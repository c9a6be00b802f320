"""What is a learned drafter worth beside others that have seen the same data?

    python -m specdec.experiments.studies.learned spec_bench=question.jsonl out=learned.json \\
        methods="[eagle3=drafter=eagle3 drafter.path=heads/eagle3/head, \\
                  eagle3 without states=drafter=eagle3 drafter.path=heads/control/head]"

Every method gets the same trees: a chain of 7 and trees of up to 8, 16, 32 and 64 nodes, at
temperature 0 those of `tree=dynamic`, above it two of `tree=static` for each budget, and that of
`tree=optimal` by measured rates, of a draft model or of a head; the best counts. Children are
drawn from the draft. `small_llama` and `early_exit` stand beside
what `methods` names. `join` takes in what other files hold of the same prompts. The stop token is
ignored, so that all texts have the same length. Ratios of accepted lengths are paired over
prompts. A method whose words have `target.path` of its own (early exit after a training) decodes
with that target and is compared with nobody.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from specdec.experiments.figures.learned import CHAIN, learned
from specdec.experiments.figures.markdown import show
from specdec.experiments.studies.drafters import (
    DYNAMIC,
    SAMPLED,
    best_sampled,
    check_budgets,
    choice_of,
    deepest,
)
from specdec.lab.command import begin, option, run_main, write
from specdec.lab.prompts import Asked
from specdec.lab.study import Entry, Study, spend
from specdec.lab.workshop import PLAIN, StudyOptions, Workshop, name_of, tree, word

TARGET = "target.path="


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    methods: tuple[str, ...] = option((), "NAME=WORDS of each drafter", varies=True)
    beside: tuple[Literal["small_llama", "early_exit"], ...] = option(
        ("small_llama", "early_exit"), "those that stand beside them", varies=True
    )
    join: tuple[Path, ...] = option((), "result files of other methods", varies=True)
    temperatures: tuple[float, ...] = option((0.0, 1.0), "of sampling", varies=True)
    budgets: tuple[int, ...] = option(
        (CHAIN, *DYNAMIC), "nodes of trees; 7 is a chain", varies=True
    )
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budgets(self.budgets, (CHAIN, *DYNAMIC))


def shapes(budget: int, temperature: float, words: str) -> Iterator[str]:
    """Words of the trees of a budget.

    Args:
        words: of the drafter, by whose rates and levels the tree of draws goes.
    """
    children = " tree.children=sample" if temperature else ""
    if budget == CHAIN:
        yield tree("chain", budget) + children
    else:
        for shape in SAMPLED[budget] if temperature else (DYNAMIC[budget],):
            yield shape + children
        if temperature:
            yield best_sampled(choice_of(words)[0], budget, deepest(words))


def named(options: Options) -> dict[str, str]:
    """Words of each method by its name.

    Raises:
        ValueError: a method without a name, or with that of another.
    """
    usual: dict[str, str] = {
        "small_llama": f"drafter=small_llama {word('drafter.path', options.draft)}",
        "early_exit": "drafter=early_exit",
    }
    found: dict[str, str] = {name: usual[name] for name in options.beside}
    for method in options.methods:
        name, equals, words = method.partition("=")
        if not equals or "drafter=" not in words:
            raise ValueError(f"methods={method}: must be NAME=drafter=... and what it needs")
        if name.strip() in found:
            raise ValueError(
                f"methods={method}: {name.strip()} is measured already; give it another name"
            )
        found[name.strip()] = words.strip()
    return found


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    methods = named(options)
    shop = options.workshop()
    result = begin(options, shop.models.placement.device)
    sets = options.read(shop)
    result["sets"] = {name: [one.name for one in of] for name, of in sets.items()}
    parts = result.setdefault("parts", {})
    together = {name: words for name, words in methods.items() if TARGET not in words}
    for temperature in options.temperatures:
        name = f"T={temperature:g}"
        measure(shop, sets, together, temperature, parts.setdefault(name, {}), options, result)
        for method in [one for one in methods if one not in together]:
            said = shlex.split(methods[method])
            own = next(one for one in said if one.startswith(TARGET))
            other = replace(options, target=own.removeprefix(TARGET)).workshop()
            words = {method: shlex.join(one for one in said if one != own)}
            apart = parts.setdefault(f"{name}, {method}", {})
            measure(other, options.read(other), words, temperature, apart, options, result)
    for path in options.join:
        for name, part in json.loads(path.read_text())["parts"].items():
            parts[name] = {**part, **parts.get(name, {})}
    write(options.out, result)
    show(learned(result))


def measure(
    shop: Workshop,
    sets: dict[str, list[Asked]],
    methods: dict[str, str],
    temperature: float,
    part: dict[str, Entry],
    options: Options,
    result: Entry,
) -> None:
    """Fill a part of the result: methods of one target at one temperature."""
    own = shop.having(f"sampling.temperature={temperature}")
    way = partial(own.way, rows=options.batch, longest=options.longest(sets))
    ways = {"none": way(PLAIN, drafter="none", budget=0)}
    for name, words in methods.items():
        for budget in options.budgets:
            for shape in shapes(budget, temperature, words):
                made = way(f"{words} {shape}", drafter=name, budget=budget)
                ways[f"{name}: {name_of(shape)}"] = made
    Study(
        entries=part,
        batches=options.batches(sets),
        turn=spend(options.tokens),
        target=shop.target,
        save=partial(write, options.out, result),
        plain="" if temperature else "none",
        warm=False,  # lengths alone are of interest
    ).one_by_one(ways)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
