"""What is a learned drafter worth beside others that have seen the same data?

    python -m specdec.experiments.studies.learned spec_bench=question.jsonl out=learned.json \\
        methods="[eagle3=drafter=eagle3 drafter.path=heads/eagle3/head, \\
                  eagle3 without states=drafter=eagle3 drafter.path=heads/control/head]"

Every method gets the same trees: a chain of 7 and trees of up to 8, 16, 32 and 64 nodes, at
temperature 0 those of `tree=dynamic`, above it two of `tree=static` for each budget, of which the
better counts, with children drawn from the draft. `small_llama` and `early_exit` stand beside
what `methods` names. The stop token is ignored, so that all texts have the same length. Ratios of
accepted lengths are paired over prompts. A method whose words have `target.path` of its own
(early exit after a training) decodes with that target and is compared with nobody.
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from specdec.experiments.figures.learned import learned
from specdec.experiments.figures.markdown import show
from specdec.experiments.studies.drafters import DYNAMIC, SAMPLED
from specdec.lab.command import begin, option, run_main, write
from specdec.lab.study import Study, spend
from specdec.lab.workshop import PLAIN, StudyOptions, Workshop, name_of, tree, word

CHAIN = 7  # nodes, as in tables of the field
TARGET = "target.path="


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    methods: tuple[str, ...] = option((), "NAME=WORDS of each drafter", varies=True)
    temperatures: tuple[float, ...] = option((0.0, 1.0), "of sampling", varies=True)
    budgets: tuple[int, ...] = option((CHAIN, *DYNAMIC), "nodes of trees; 7 is a chain")
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")


def shapes(budget: int, temperature: float) -> Iterator[str]:
    """Words of the trees of a budget.

    Raises:
        ValueError: there are none.
    """
    children = " tree.children=sample" if temperature else ""
    if budget == CHAIN:
        yield tree("chain", budget) + children
    elif budget in DYNAMIC:
        for shape in SAMPLED[budget] if temperature else (DYNAMIC[budget],):
            yield shape + children
    else:
        known = ", ".join(map(str, (CHAIN, *DYNAMIC)))
        raise ValueError(f"budgets={budget}: there are {known}")


def named(options: Options) -> dict[str, str]:
    """Words of each method by its name.

    Raises:
        ValueError: a method without a name.
    """
    found = {
        "small_llama": f"drafter=small_llama {word('drafter.path', options.draft)}",
        "early_exit": "drafter=early_exit",
    }
    for method in options.methods:
        name, equals, words = method.partition("=")
        if not equals or "drafter=" not in words:
            raise ValueError(f"methods={method}: must be NAME=drafter=... and what it needs")
        found[name.strip()] = words.strip()
    return found


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    methods = named(options)
    for budget in options.budgets:
        list(shapes(budget, 0.0))
    result = begin(options, options.workshop().models.placement.device)
    shop = options.workshop()
    sets = options.read(shop)
    result["sets"] = {name: [one.name for one in of] for name, of in sets.items()}
    for temperature in options.temperatures:
        apart = {name: words for name, words in methods.items() if TARGET in words}
        together = {name: words for name, words in methods.items() if name not in apart}
        measure(shop, together, f"T={temperature:g}", temperature, options, result)
        for name, words in apart.items():
            said = shlex.split(words)
            own = next(one for one in said if one.startswith(TARGET))
            rest = shlex.join(one for one in said if one != own)
            place = f"device={options.device} dtype={options.dtype} batch_size={options.batch}"
            other = Workshop(own, place)
            measure(
                other, {name: rest}, f"T={temperature:g}, {name}", temperature, options, result
            )
    show(learned(result))


def measure(
    shop: Workshop,
    methods: dict[str, str],
    part: str,
    temperature: float,
    options: Options,
    result: dict[str, object],
) -> None:
    """Fill a part of the result: methods of one target at one temperature."""
    sets = options.read(shop)
    own = shop.having(f"sampling.temperature={temperature}")
    way = partial(own.way, rows=options.batch, longest=options.longest(sets))
    ways = {"none": way(PLAIN, drafter="none", budget=0)}
    for name, words in methods.items():
        for budget in options.budgets:
            for shape in shapes(budget, temperature):
                made = way(f"{words} {shape}", drafter=name, budget=budget)
                ways[f"{name}: {name_of(shape)}"] = made
    parts: dict[str, dict[str, object]] = result.setdefault("parts", {})  # type: ignore[assignment]
    Study(
        entries=parts.setdefault(part, {}),  # type: ignore[arg-type]
        batches=options.batches(sets),
        turn=spend(options.tokens),
        target=shop.target,
        save=partial(write, options.out, result),
        plain="" if temperature else "none",
    ).one_by_one(ways)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
