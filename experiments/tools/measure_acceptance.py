"""How often is the child of rank r accepted, at depth d?

    python -m specdec.experiments.tools.measure_acceptance humaneval=code.jsonl out=rates.json
    python -m specdec.experiments.tools.measure_acceptance ... resume=true check=[[1,1,1],[4,2,1]]
    python -m specdec.run tree=optimal tree.rates=rates.json ...

Decodes prompts, losslessly, with trees much wider than any use would make them, and at every step
works out from the target's logits how likely each node was to be accepted (`acceptance_watch.py`).
That is the acceptance vector of Sequoia (Chen et al. 2024, section 3.1) and the accuracies of
Medusa's heads (Cai et al. 2024, section 2.3.3), by depth: what `specdec.rates.AcceptanceRates`
reads and tree policies choose shapes by.

A case is a way to choose children with a temperature, and perhaps top-p: `top_p` adds cases at the
highest temperature. At temperature 0 children are the most probable tokens. Each case takes
two passes. The first has trees of depth 1 with `ranks` children. By the rates it finds the tree
of the second is made: level by level the `expand` likeliest nodes get `ranks` children each.
So what is said of a depth below the root is true of nodes that were expanded, the likely ones, and
each counts by its chance to be reached.

Where steps begin matters as well: very wide trees end, and begin again, only where text is hard to
guess, while one token a step would begin everywhere. So a step is cut short where the tree of the
`advance` likeliest nodes would have ended it. `check` shows how good that is: it decodes with
trees whose nodes of a level all have the same number of children, and compares the tokens they
yield with 1 plus the sum over their nodes of the product of rates on the path.

The file:

    cases[].children, .temperature, .top_p, .acceptance     the rule
    cases[].rates[d][r], .errors[d][r]      errors are standard ones, by how prompts differ
    cases[].reached[d]                      how many accepted nodes that rests on
    cases[].steps, .prompts, .tree, .seconds
    checks[].widths, .children, .temperature, .top_p, .predicted, .measured, .error,
        .relative_error
    settings, sets, hardware, versions, git, command        of what it is true

Prompts are spread evenly over each set; stop tokens are ignored. The file is written anew after
every case and check; `resume=true` leaves out what it holds.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import torch
from pydantic import Field

from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.shapes import Node, Shape, describe, expected_accepted, greedy
from specdec.drafters.trees.static import Static
from specdec.experiments.figures.markdown import piece, show
from specdec.experiments.tools.acceptance_watch import Watch
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.method import Method
from specdec.lab.prompts import ask
from specdec.lab.workshop import StudyOptions, Workshop, word
from specdec.models.fingerprint import fingerprint
from specdec.rates import AcceptanceRates
from specdec.tree import Children

# Those whose trees have the shape they are asked for, and need no further models or files.
DRAFTERS = (
    *("small_llama", "early_exit", "token_recycling", "ngram", "pld", "retriever"),
    "suffix_decoding",
)
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    tokens: Positive = option(48, "new ones, for each prompt")
    prompts: Positive = option(12, "of each set; the built-in one if none is given")
    batch: Positive = option(6, "sequences together", varies=True)
    drafter: str = option("small_llama", "and its settings: early_exit drafter.exit_layer=2")
    temperatures: tuple[float, ...] = option((0.0, 0.7, 1.0), "of sampling", varies=True)
    top_p: tuple[float, ...] = option((), "at the highest temperature", varies=True)
    children: tuple[Children, ...] = option(get_args(Children), "how they are chosen", varies=True)
    ranks: Positive = option(8, "children of an expanded node")
    depth: Positive = option(6, "levels of the tree")
    expand: Positive = option(6, "nodes expanded on a level")
    advance: Annotated[int, Field(ge=0)] = option(
        4, "a step goes as far as so many nodes would take it; 0: a token a step"
    )
    seed: int = option(0, "every random number follows from it")
    check: tuple[tuple[Positive, ...], ...] = option((), "trees, by widths", varies=True)
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")

    @property
    def sets(self) -> dict[str, str | None]:
        return super().sets or {"builtin": None}

    def workshop(self, *words: str) -> Workshop:
        """Of a drafter.

        Raises:
            ValueError: one that shapes its trees itself.
        """
        name = self.drafter.partition(" ")[0]
        if name not in DRAFTERS:
            raise ValueError(f"drafter={name}: must be one of {', '.join(DRAFTERS)}")
        path = word("drafter.path", self.draft) if self.drafter == "small_llama" else ""
        # Plain torch: the rule is watched on the host, which no CUDA graph would wait for.
        own = f"drafter={self.drafter} {path} seed={self.seed} kernels=reference"
        return super().workshop(own, *words)


class Case(NamedTuple):
    """How children are chosen, and how tokens are."""

    children: str
    temperature: float
    top_p: float | None

    @property
    def name(self) -> str:
        top_p = "" if self.top_p is None else f", top-p {self.top_p:g}"
        return f"{self.children}, T={self.temperature:g}{top_p}"

    @property
    def words(self) -> str:
        sampling = f"sampling.temperature={self.temperature} {word('sampling.top_p', self.top_p)}"
        return f"tree.children={self.children} {sampling}"


def cases_of(options: Options) -> list[Case]:
    """Those that were asked for.

    Raises:
        ValueError: there are none.
    """
    highest = max(options.temperatures, default=0.0)
    found = []
    for children in options.children:
        for temperature in options.temperatures:
            if temperature or children == "top_k":
                found.append(Case(children, temperature, None))
        found += [Case(children, highest, top_p) for top_p in options.top_p if highest]
    if not found:
        raise ValueError("temperatures=0: children are the most probable tokens; children=top_k")
    return found


class Bench:
    """The models and prompts of a run."""

    def __init__(self, options: Options) -> None:
        self.options, self.shop = options, options.workshop()
        self.target = self.shop.target
        self.sets = ask(self.target.tokenizer, options.sets, limit=options.prompts, take="spread")
        self.asked = [one for of in self.sets.values() for one in of]
        if len(self.asked) < 2:
            raise ValueError("prompts=1: does not say how much prompts differ; give more")

    def method(self, case: Case) -> Method:
        """With the rule of a case, and any tree."""
        return self.shop.method(case.words)

    def decode(self, method: Method) -> list[list[int]]:
        """Decode all prompts: the tokens of each step, of each prompt, what a limit cut off
        included."""
        options = self.options
        session = self.shop.session(method, rows=options.batch, longest=options.longest(self.sets))
        yields: dict[int, list[int]] = {one.id: [] for one in self.asked}
        for step in session.decode(self.asked, options.tokens).steps:
            for request, accepted in zip(step.requests, step.accepted, strict=True):
                yields[request].append(accepted + 1)
        return list(yields.values())


def wide_shape(rates: AcceptanceRates, *, ranks: int, depth: int, expand: int) -> Shape:
    """The tree that is watched: the `expand` likeliest nodes of each level have children."""
    shape: list[Node] = []
    growing: dict[Node, float] = {(): 1.0}
    for level in range(depth):
        chances = {
            (*node, rank): chance * rates.at(level, rank)
            for node, chance in growing.items()
            for rank in range(ranks)
        }
        shape += chances
        growing = dict(sorted(chances.items(), key=lambda item: -item[1])[:expand])
    return frozenset(shape)


def static_shape(widths: Sequence[int]) -> Shape:
    """That of `tree=static`."""
    levels = range(1, len(widths) + 1)
    return frozenset(node for n in levels for node in product(*map(range, widths[:n])))


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """A case of the file: its two passes."""
    options, begun = bench.options, time.perf_counter()

    def watched(shape: Shape, kept: Shape | None = None) -> Watch:
        method = bench.method(case)
        watch = Watch(method.rule, shape, kept=kept)
        shaped = FixedShape(shape=shape, children=case.children)
        bench.decode(replace(method, tree=shaped, rule=watch))
        return watch

    found = watched(static_shape([options.ranks])).estimate()
    first = AcceptanceRates(values=found.rates)
    shape = wide_shape(first, ranks=options.ranks, depth=options.depth, expand=options.expand)
    watch = watched(shape, kept=greedy(first, options.advance, options.depth))
    found = watch.estimate()
    return {
        **case._asdict(),
        "acceptance": watch.name,
        "rates": [[rounded_down(rate) for rate in row] for row in found.rates.tolist()],
        "errors": [[round(error, DIGITS) for error in row] for row in found.errors.tolist()],
        "reached": [round(weight, DIGITS) for weight in found.reached.tolist()],
        "steps": found.steps,
        "prompts": len(bench.asked),
        "tree": describe(shape),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def rounded_down(rate: float) -> float:
    """So that no rounding makes rates of siblings sum to more than 1."""
    return math.floor(rate * 10**DIGITS) / 10**DIGITS


def check(bench: Bench, entry: dict[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """What a tree yields at each step, by the rates of a case and by counting."""
    case = case_of(entry)
    accepted = expected_accepted(static_shape(widths), AcceptanceRates(values=entry["rates"]))
    tree = Static(widths=widths, children=case.children)
    yields = bench.decode(replace(bench.method(case), tree=tree))
    steps = sum(map(len, yields))
    measured = sum(map(sum, yields)) / steps
    gaps = [sum(lengths) - measured * len(lengths) for lengths in yields]
    return {
        "widths": list(widths),
        **case._asdict(),
        "predicted": round(1 + accepted, DIGITS),
        "measured": round(measured, DIGITS),
        "error": round(statistics.stdev(gaps) * math.sqrt(len(gaps)) / steps, DIGITS),
        "relative_error": round((1 + accepted) / measured - 1, DIGITS),
    }


@torch.no_grad()
def work(options: Options) -> None:
    cases = cases_of(options)
    bench = Bench(options)
    result = {"cases": [], "checks": [], **begin(options, bench.target.device)}
    drafter = bench.method(cases[0]).drafter
    result["models"] = {
        "target": fingerprint(bench.target),
        "draft": drafter.own_model and fingerprint(drafter.own_model),
    }
    result["sets"] = {
        name: [one.name.partition("/")[2] for one in of] for name, of in bench.sets.items()
    }
    save = partial(write, options.out, result)
    done = {case_of(entry): entry for entry in result["cases"]}
    checked = {(case_of(entry), tuple(entry["widths"])) for entry in result["checks"]}
    for case in cases:
        if case not in done:
            done[case] = measure(bench, case)
            result["cases"].append(done[case])
            save()
            print(f"{case.name}: {done[case]['seconds']:.0f} s", flush=True)
        for widths in options.check:
            if (case, widths) not in checked:
                result["checks"].append(check(bench, done[case], widths))
                save()
    show("\n\n".join(tables(result)))


def case_of(entry: dict[str, Any]) -> Case:
    return Case(*(entry[name] for name in Case._fields))


def tables(result: dict[str, Any]) -> Iterator[str]:
    """The rates of each case, by rank and depth; then the checks."""
    heads = ["depth", *(f"rank {rank}" for rank in range(result["settings"]["ranks"])), "reached"]
    for entry in result["cases"]:
        levels = enumerate(zip(entry["rates"], entry["reached"], strict=True))
        rows = (
            [f"{d}", *(f"{r:.3f}" for r in row), f"{reached:.0f}"] for d, (row, reached) in levels
        )
        yield piece(case_of(entry).name, heads, rows)
    heads = ["children", "widths", "predicted", "measured", "off by"]
    rows = (
        [
            case_of(one).name,
            ",".join(map(str, one["widths"])),
            f"{one['predicted']:.3f}",
            f"{one['measured']:.3f} ± {one['error']:.3f}",
            f"{one['relative_error']:+.1%}",
        ]
        for one in result["checks"]
    )
    if result["checks"]:
        yield piece("Tokens of a step", heads, rows)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
