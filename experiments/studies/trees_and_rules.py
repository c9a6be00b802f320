"""What are the best tree and the best rule worth over a tuned chain with token-wise sampling?

    python -m specdec.experiments.studies.trees_and_rules --grid lengths --humaneval humaneval.jsonl \\
        --mt-bench mt_bench.jsonl --out experiments/results/tree_lengths.json
    python -m specdec.experiments.studies.trees_and_rules --grid speed --target standin:llama3_8b \\
        --draft standin:llama_160m --dtype bfloat16 ... --out experiments/results/tree_speed.json

A draft model, temperature 1. `lengths` gives every tree policy and every acceptance rule the same
budgets of nodes: policies are compared under recursive rejection (chains: token-wise sampling),
rules on the tree that measured acceptance makes the most of, or, if they judge chains, on chains.
Of a policy that has settings the best of a few counts. `speed` times chains, fixed trees and rules
against the tree of `tree=cost_aware`, which knows their prices; all methods take turns prompt by
prompt, and the figure is that of decoding: the time of all steps, prefill left out, by device
events on a GPU. The stop token is ignored, so that all outputs have the same length. The file is
written anew after every method (`lengths`) or prompt (`speed`); `--resume` goes on with `lengths`.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.accuracy import Accuracy
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.cost_aware import CostAware
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.paths import Paths
from specdec.drafters.trees.shapes import greedy, ordered
from specdec.drafters.trees.static import Static
from specdec.drafters.trees.threshold import Threshold
from specdec.experiments.studies.drafters import SETS, measure, read_prompts
from specdec.experiments.studies.files import resume, write
from specdec.experiments.studies.sessions import DTYPES, Ours, with_tree
from specdec.lab.environment import describe_environment
from specdec.models.load import load_model
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, Drafter, TreePolicy
from specdec.rates import AcceptanceRates
from specdec.verifier.block import Block
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal

TEMPERATURE = 1.0
CHAINS = (1, 2, 3, 4, 6, 8)
WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((2, 1, 1), (4, 1), (2, 2)),
    16: ((3, 2, 1), (4, 2), (2, 2, 1, 1)),
    32: ((4, 2, 2), (3, 2, 1, 1, 1), (4, 2, 1, 1)),
    64: ((4, 2, 2, 1), (6, 3, 2), (4, 3, 2, 1)),
}
DYNAMIC = {8: (3, (2, 3, 4)), 16: (4, (3, 4, 6)), 32: (6, (3, 4, 6)), 64: (8, (4, 6, 8))}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
GEOMETRIC = 0.5  # of a tree that knows nothing of the draft: rates of ranks halve
LARGE = 8  # a batch from which less is timed
# What is timed: chains, and trees from two levels to five.
TIMED = (2, 3, 4, 6)
FIXED = ((2, 1), (3, 2), (2, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 1))
FIXED_DEEP = ((3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 2, 1), (3, 2, 1, 1, 1))
RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule
    for rule in (TargetOnly, RecursiveRejection, Tokenwise, KSeq, Block, Traversal, MultiPath)
}
SHORT = {"top_k": "top-k", "sample": "sampled", "sample_with_replacement": "with replacement"}


class Method(NamedTuple):
    """A tree policy and a rule.

    Args:
        budget: nodes of a tree at most; 0 if it has none to keep.
        policy: its name.
        setting: what is tuned of it.
        rule: its name.
        children: how they are chosen.
        axis: what it is compared with the others of the budget for: policy or rule.
        tree: makes the policy.
    """

    budget: int
    policy: str
    setting: str
    rule: str
    children: str
    axis: str
    tree: Callable[[], TreePolicy]

    @property
    def name(self) -> str:
        """Unique among the methods of an axis and budget."""
        return (
            f"{self.budget} {self.axis}: {self.policy} {self.setting}, {self.rule}, "
            + (SHORT[self.children])
        )


def lengths(budget: int, options: argparse.Namespace) -> Iterator[Method]:
    """What is compared at a budget of nodes."""
    measured: dict[str, Any] = {"rates": options.rates, "temperature": TEMPERATURE}

    def policy(name: str, setting: str, tree: Callable[[], TreePolicy]) -> Method:
        rule = "tokenwise" if name == "chain" else "recursive_rejection"
        return Method(budget, name, setting, rule, "sample", "policy", tree)

    chains = [length for length in CHAINS if length <= budget]
    for length in chains:
        yield policy("chain", f"{length}", lambda n=length: Chain(budget=n, children="sample"))
    for widths in WIDTHS[budget]:
        name = ",".join(map(str, widths))
        yield policy("static", name, lambda w=widths: Static(widths=w, children="sample"))
    guess = AcceptanceRates(values=[[GEOMETRIC ** (rank + 1) for rank in range(8)]])
    paths = [list(node) for node in ordered(greedy(guess, budget, 8))]
    yield policy("paths", "halving", lambda: Paths(paths=paths, children="sample"))
    width, depths = DYNAMIC[budget]
    for depth in depths:
        yield policy(
            "dynamic",
            f"{width},{depth}",
            lambda d=depth: Dynamic(budget=budget, width=width, depth=d, children="sample"),
        )
    for threshold in THRESHOLDS:
        yield policy(
            "threshold",
            f"{threshold:g}",
            lambda t=threshold: Threshold(
                threshold=t, budget=budget, width=8, depth=8, children="sample"
            ),
        )
    for name, kind in {"optimal": Optimal, "accuracy": Accuracy}.items():
        yield policy(name, "", lambda k=kind: k(budget=budget, children="sample", **measured))
    yield policy(
        "cost_aware",
        "",
        lambda: CostAware(
            budget=budget, costs=options.costs, batch=1, children="sample", **measured
        ),
    )

    for rule, children in (
        ("target_only", "top_k"),
        ("recursive_rejection", "sample"),
        ("recursive_rejection", "sample_with_replacement"),
        ("k_seq", "sample_with_replacement"),
        ("traversal", "sample"),
        ("traversal", "sample_with_replacement"),
        ("multi_path", "sample_with_replacement"),
    ):
        yield Method(
            budget,
            "optimal",
            "",
            rule,
            children,
            "rule",
            lambda c=children: Optimal(budget=budget, children=c, **measured),
        )
    for rule in ("tokenwise", "block"):
        for length in chains:
            yield on_chain(budget, length, rule)


def on_chain(budget: int, length: int, rule: str) -> Method:
    """A rule for chains."""
    return Method(
        budget,
        "chain",
        f"{length}",
        rule,
        "sample",
        "rule",
        lambda: Chain(budget=length, children="sample"),
    )


def speed(options: argparse.Namespace) -> Iterator[Method]:
    """What is timed."""
    measured: dict[str, Any] = {
        "rates": options.rates,
        "temperature": TEMPERATURE,
        "costs": options.costs,
        "batch": options.batch,
        "context": options.context,
        "budget": 63,
    }
    large = options.batch >= LARGE
    for rule in ("tokenwise",) if large else ("tokenwise", "block"):
        for length in TIMED:
            yield on_chain(length, length, rule)
    for widths in FIXED if large else (*FIXED, *FIXED_DEEP):
        name = ",".join(map(str, widths))
        yield Method(
            0,
            "static",
            name,
            "recursive_rejection",
            "sample",
            "policy",
            lambda w=widths: Static(widths=w, children="sample"),
        )
    rules = [("policy", "recursive_rejection", "sample"), ("rule", "traversal", "sample")]
    if not large:
        rules += [
            ("rule", "target_only", "top_k"),
            ("rule", "k_seq", "sample_with_replacement"),
            ("rule", "multi_path", "sample_with_replacement"),
        ]
    for axis, rule, children in rules:
        yield Method(
            0,
            "cost_aware",
            "",
            rule,
            children,
            axis,
            lambda c=children: CostAware(children=c, **measured),
        )


class Setup:
    """Makes sessions; the draft model is loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target = load_model(
            options.target,
            Placement(device=torch.device(options.device), dtype=DTYPES[options.dtype]),
            setting="--target",
        )
        self.drafter = SmallLlama(
            target=self.target, tree=Chain(budget=1), path=options.draft, candidates=64
        )
        sets = read_prompts(self.target, options)
        self.asked = [one for of in sets.values() for one in of]
        size = options.batch
        self.batches = [of[i : i + size] for of in sets.values() for i in range(0, len(of), size)]
        self.longest = max(len(one.tokens) for one in self.asked) + options.tokens

    def session(self, method: Method | None) -> Ours:
        """Of plain decoding if there is no method."""
        drafter: Drafter = NoDrafter()
        rule: AcceptanceRule = TargetOnly()
        if method is not None:
            drafter, rule = with_tree(self.drafter, method.tree()), RULES[method.rule]()
        return Ours(
            self.target,
            drafter,
            rule,
            temperature=TEMPERATURE,
            batch=self.options.batch,
            longest=self.longest,
        )


def entry_of(method: Method | None) -> dict[str, Any]:
    """What is known of a method before it has run."""
    entry: dict[str, Any] = {"policy": "none", "rule": "target_only", "axis": "plain", "budget": 0}
    if method is not None:
        entry = {name: value for name, value in method._asdict().items() if name != "tree"}
        tree = method.tree()
        entry["nodes"] = tree.budget
        if isinstance(tree, CostAware):
            choice = tree.choice
            entry["choice"] = {
                "paths": [list(node) for node in ordered(choice.shape)],
                "tokens": choice.tokens,
                "seconds": choice.seconds,
            }
    return {**entry, "prompts": {}, "sources": {}, "verbs": {}}


def run_lengths(
    setup: Setup, methods: list[Method], result: dict[str, Any], save: Callable[[], None]
) -> None:
    options, parts = setup.options, result["methods"]
    missing = [method for method in methods if method.name not in parts]
    for method in track(missing, description="methods"):
        # The same chain counts at every budget, and on both axes.
        twin = next((one for one in parts.values() if _same(one, method)), None)
        entry = entry_of(method)
        if twin is not None and method.policy == "chain":
            entry.update({key: twin[key] for key in ("prompts", "sources", "verbs")})
        else:
            session = setup.session(method)
            for batch in setup.batches:
                measure(session, batch, options.tokens, entry)
        parts[method.name] = entry
        save()


def _same(entry: dict[str, Any], method: Method) -> bool:
    same = ("policy", "setting", "rule", "children")
    return all(entry[key] == getattr(method, key) for key in same)


def run_speed(
    setup: Setup, methods: list[Method], result: dict[str, Any], save: Callable[[], None]
) -> None:
    options, parts = setup.options, result["methods"]
    sessions: dict[str, Ours] = {}
    for method in track([None, *methods], description="warming up"):
        name = "none" if method is None else method.name
        sessions[name] = session = setup.session(method)
        session.warm_up(max((one.tokens for one in setup.asked), key=len))
        parts[name] = entry_of(method)
    names = list(sessions)
    for number, batch in enumerate(track(setup.batches, description="prompts")):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            measure(sessions[name], batch, options.tokens, parts[name])
        save()
    for name, session in sessions.items():
        parts[name]["obstacle"] = session.decoder.graphs.obstacle
    save()


def pooled(entry: dict[str, Any]) -> dict[str, float]:
    """Tokens per step and per second, over all prompts."""
    tokens, steps, seconds = (
        sum(one[key] for one in entry["prompts"].values())
        for key in ("tokens", "steps", "seconds")
    )
    return {"accepted_length": tokens / steps, "tokens_per_second": tokens / seconds}


def show(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['settings']['target']}, {result['settings']['grid']}")
    for column in ("method", "nodes", "length", "tok/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, entry in result["methods"].items():
        if entry["prompts"]:
            found = pooled(entry)
            table.add_row(
                name,
                str(entry.get("nodes", 0)),
                f"{found['accepted_length']:.3f}",
                f"{found['tokens_per_second']:.1f}",
            )
    return table


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", choices=("lengths", "speed"), required=True)
    for name in SETS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="JSONL")
    parser.add_argument("--target", default="zoo:target")
    parser.add_argument("--draft", default="zoo:draft")
    parser.add_argument("--rates", default="zoo", help="as tree.rates")
    parser.add_argument("--costs", default="auto", help="as tree.costs")
    parser.add_argument("--context", type=int, default=512, help="as tree.context")
    parser.add_argument("--budgets", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="new ones, for each prompt")
    parser.add_argument("--prompts", type=int, default=16, help="of each set")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="measure what is missing in --out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not any(getattr(options, name) for name in SETS):
        parser.error("no prompts: give at least one of --humaneval, --gsm8k, --mt-bench, ...")
    if options.resume and options.grid == "speed":
        parser.error("--resume: methods that are timed must run together; leave it out")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = settings_of(arguments)
    names = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "specdec.experiments.studies.trees_and_rules", *names])
    same = ("grid", "target", "draft", "rates", "costs", "dtype", "tokens", "prompts", "batch")
    settings = {name: getattr(options, name) for name in same}
    try:
        result = resume(options.out, settings, command) if options.resume else None
        if result is None:
            result = {
                "command": command,
                "settings": settings,
                "methods": {},
                **describe_environment(torch.device(options.device)),
            }
        methods = list(speed(options))
        if options.grid == "lengths":
            methods = [method for budget in options.budgets for method in lengths(budget, options)]
        for method in methods:
            method.tree()  # so that a wrong table is known before any work
        torch.manual_seed(0)
        setup = Setup(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = run_lengths if options.grid == "lengths" else run_speed
    run(setup, methods, result, lambda: write(options.out, result))
    Console(width=140).print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
