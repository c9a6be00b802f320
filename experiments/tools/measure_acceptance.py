"""How often is the child of rank r accepted, at depth d?

    python -m specdec.experiments.tools.measure_acceptance --humaneval humaneval.jsonl --out rates.json
    python -m specdec.experiments.tools.measure_acceptance ... --resume --temperatures 0 --check 1,1,1 4,2,1

Decodes prompts, losslessly, with trees much wider than any use would make them, and at every step
works out from the target's logits how likely each node was to be accepted (`acceptance_watch.py`).
That is the acceptance vector of Sequoia (Chen et al. 2024, section 3.1) and the accuracies of
Medusa's heads (Cai et al. 2024, section 2.3.3), by depth: what `specdec.rates.AcceptanceRates`
reads and tree policies choose shapes by.

A case is a way to choose children with a temperature, and perhaps top-p: `--top-p` adds cases at
the highest temperature. At temperature 0 children are the most probable tokens. Each case takes
two passes. The first has trees of depth 1 with `--ranks` children. By the rates it finds the tree
of the second is made: level by level the `--expand` likeliest nodes get `--ranks` children each.
So what is said of a depth below the root is true of nodes that were expanded, the likely ones, and
each counts by its chance to be reached.

Where steps begin matters as well: very wide trees end, and begin again, only where text is hard to
guess, while one token a step would begin everywhere. So a step is cut short where the tree of the
`--advance` likeliest nodes would have ended it. `--check` shows how good that is: it decodes with
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
every case and check; `--resume` leaves out what it holds.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console
from rich.table import Table

from specdec.decode import Decoder, Step
from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.shapes import Node, Shape, describe, expected_accepted, greedy
from specdec.drafters.trees.static import Static
from specdec.experiments.figures.acceptance_plot import plot
from specdec.experiments.studies.drafters import SETS, Makers
from specdec.experiments.studies.files import resume, write
from specdec.experiments.studies.sessions import DTYPES
from specdec.experiments.tools.acceptance_watch import Watch
from specdec.kernels.choose import Kernels
from specdec.lab.environment import describe_environment
from specdec.lab.prompts import encode, load_prompts
from specdec.models.load import load_model
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, TreePolicy
from specdec.rates import AcceptanceRates
from specdec.request import Request
from specdec.sampling import SamplingParams
from specdec.tree import Children
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.verifier import TreeVerifier

# Those whose trees have the shape they are asked for, and need no further models or files.
DRAFTERS = (
    *("small_llama", "early_exit", "token_recycling", "ngram", "pld", "retriever"),
    "suffix_decoding",
)
SAME = (
    *("target", "draft", "drafter", "exit_layer", "dtype", "limit", "tokens", "seed"),
    *("ranks", "depth", "expand", "advance"),
)
DIGITS = 5


class Case(NamedTuple):
    """How children are chosen, and how tokens are."""

    children: str
    temperature: float
    top_p: float | None

    @property
    def name(self) -> str:
        top_p = "" if self.top_p is None else f", top-p {self.top_p:g}"
        return f"{self.children}, T={self.temperature:g}{top_p}"

    def rule(self) -> AcceptanceRule:
        if not self.temperature:
            return Greedy()
        return TargetOnly() if self.children == "top_k" else RecursiveRejection()


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    for children in options.children:
        for temperature in options.temperatures:
            if temperature or children == "top_k":
                yield Case(children, temperature, None)
        highest = max(options.temperatures)
        for top_p in options.top_p if highest else ():
            yield Case(children, highest, top_p)


class Bench:
    """The models and prompts of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Plain torch: the rule is watched on the host, which no CUDA graph would wait for.
        self.kernels = Kernels(impl="reference")
        self.target = load_model(
            options.target,
            Placement(
                device=torch.device(options.device),
                dtype=DTYPES[options.dtype],
                kernels=self.kernels,
            ),
            setting="--target",
        )
        self.options, self._make = options, Makers(self.target, options)
        self.sets: dict[str, list[str]] = {}
        self.requests: list[Request] = []
        paths = {name: getattr(options, name) for name in SETS if getattr(options, name)}
        for name, path in (paths or {"builtin": None}).items():
            prompts = load_prompts(path=path, field=None, limit=None)
            prompts = prompts[:: max(1, len(prompts) // options.limit)][: options.limit]
            self.sets[name] = [prompt.id for prompt in prompts]
            self.requests += [
                Request(
                    id=len(self.requests) + i,
                    prompt_ids=encode(self.target.tokenizer, prompt, chat="auto"),
                    max_new_tokens=options.tokens,
                    category=prompt.category,
                )
                for i, prompt in enumerate(prompts)
            ]

    def decode(self, case: Case, tree: TreePolicy, rule: AcceptanceRule) -> list[list[int]]:
        """Decode all prompts: the tokens of each step, of each prompt, what a limit cut off
        included."""
        decoder = Decoder(
            verifier=TreeVerifier(self.target),
            drafter=self._make(self.options.drafter, tree),
            rule=rule,
            sampling=SamplingParams(
                temperature=case.temperature, top_p=case.top_p, seed=self.options.seed
            ),
            max_context=self.target.max_context,
            device=self.target.device,
            kernels=self.kernels,
            batch_size=self.options.batch,
            max_tokens=max(request.max_tokens for request in self.requests),
        )
        yields: dict[int, list[int]] = {request.id: [] for request in self.requests}
        steps: list[Step] = []
        for _ in decoder.run(self.requests, on_step=steps.append):
            pass
        for step in steps:
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
    row = static_shape([options.ranks])
    watch = Watch(case.rule(), row)
    bench.decode(case, FixedShape(shape=row, children=case.children), watch)
    first = AcceptanceRates(values=watch.estimate().rates)
    shape = wide_shape(first, ranks=options.ranks, depth=options.depth, expand=options.expand)
    watch = Watch(case.rule(), shape, kept=greedy(first, options.advance, options.depth))
    bench.decode(case, FixedShape(shape=shape, children=case.children), watch)
    found = watch.estimate()
    return {
        **case._asdict(),
        "acceptance": watch.name,
        "rates": [[rounded_down(rate) for rate in row] for row in found.rates.tolist()],
        "errors": [[round(error, DIGITS) for error in row] for row in found.errors.tolist()],
        "reached": [round(weight, DIGITS) for weight in found.reached.tolist()],
        "steps": found.steps,
        "prompts": len(bench.requests),
        "tree": describe(shape),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def rounded_down(rate: float) -> float:
    """So that no rounding makes rates of siblings sum to more than 1."""
    return math.floor(rate * 10**DIGITS) / 10**DIGITS


def check(bench: Bench, entry: dict[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """What a tree yields at each step, by the rates of a case and by counting."""
    case = Case(entry["children"], entry["temperature"], entry["top_p"])
    accepted = expected_accepted(static_shape(widths), AcceptanceRates(values=entry["rates"]))
    yields = bench.decode(case, Static(widths=widths, children=case.children), case.rule())
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


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    bench = Bench(options)
    settings = {name: getattr(options, name) for name in SAME}
    settings["sets"] = {name: len(prompts) for name, prompts in bench.sets.items()}
    result = resume(options.out, settings, command) if options.resume else None
    if result is None:
        result = {"cases": [], "checks": [], "command": command, "settings": settings}
    result |= {"sets": bench.sets, **describe_environment(bench.target.device)}
    done = {case_of(entry): entry for entry in result["cases"]}
    checked = {(case_of(entry), tuple(entry["widths"])) for entry in result["checks"]}
    for case in cases_of(options):
        if case not in done:
            done[case] = measure(bench, case)
            result["cases"].append(done[case])
            write(options.out, result)
            print(f"{case.name}: {done[case]['seconds']:.0f} s", flush=True)
        for widths in options.check:
            if (case, widths) not in checked:
                result["checks"].append(check(bench, done[case], widths))
                write(options.out, result)
    return result


def case_of(entry: dict[str, Any]) -> Case:
    return Case(*(entry[name] for name in Case._fields))


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The rates of each case, by rank and depth; then the checks."""
    ranks = result["settings"]["ranks"]
    rates = Table(*("children", "depth"), *(f"rank {rank}" for rank in range(ranks)), "reached")
    for entry in result["cases"]:
        for depth, (row, reached) in enumerate(zip(entry["rates"], entry["reached"], strict=True)):
            name = "" if depth else case_of(entry).name
            rates.add_row(name, str(depth), *(f"{rate:.3f}" for rate in row), f"{reached:.0f}")
    yield rates
    checks = Table("children", "widths", "predicted", "measured", "off by")
    for entry in result["checks"]:
        checks.add_row(
            case_of(entry).name,
            ",".join(map(str, entry["widths"])),
            f"{entry['predicted']:.3f}",
            f"{entry['measured']:.3f} ± {entry['error']:.3f}",
            f"{entry['relative_error']:+.1%}",
        )
    if result["checks"]:
        yield checks


def widths_of(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(map(int, text.split(",")))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text} are no widths; give some like 4,2,1")
    return widths


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SETS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="JSONL")
    parser.add_argument("--limit", type=int, default=12, help="prompts of each set")
    parser.add_argument("--target", default="zoo:target")
    parser.add_argument("--drafter", choices=DRAFTERS, default="small_llama")
    parser.add_argument("--draft", default="zoo:draft", help="the model of small_llama")
    parser.add_argument("--exit-layer", type=int, help="of early_exit")
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0, 0.7, 1.0))
    parser.add_argument("--top-p", type=float, nargs="+", default=(), metavar="P")
    ways = get_args(Children)
    parser.add_argument("--children", nargs="+", choices=ways, default=ways)
    parser.add_argument("--ranks", type=int, default=8, help="children of an expanded node")
    parser.add_argument("--depth", type=int, default=6, help="levels of the tree")
    parser.add_argument("--expand", type=int, default=6, help="nodes expanded on a level")
    parser.add_argument(
        "--advance", type=int, default=4, help="a step goes as far as so many nodes would take it"
    )
    parser.add_argument("--tokens", type=int, default=48, help="new ones, for each prompt")
    parser.add_argument("--batch", type=int, default=6, help="prompts decoded together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", type=widths_of, nargs="+", default=(), metavar="WIDTHS", help="such as 4,2,1"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--resume", action="store_true", help="what the file has stays")
    options = parser.parse_args(arguments)
    for name in ("limit", "ranks", "depth", "expand", "tokens", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.advance < 0:
        parser.error(f"--advance {options.advance}: must be 0 (a token a step) or positive")
    if not any(cases_of(options)):
        parser.error("--temperatures 0: children are the most probable tokens; --children top_k")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = settings_of(arguments)
    names = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "specdec.experiments.tools.measure_acceptance", *names])
    try:
        result = run(options, command)
    except ValueError as error:
        sys.exit(f"measure_acceptance: {error}")
    console = Console(width=130)
    for table in tables(result):
        console.print(table)
    if options.plot is not None:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
