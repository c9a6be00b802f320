"""What are the best tree and the best rule worth over a tuned chain with token-wise sampling?

    python -m specdec.experiments.studies.trees_and_rules grid=lengths humaneval=code.jsonl \\
        mt_bench=chat.jsonl out=tree_lengths.json
    python -m specdec.experiments.studies.trees_and_rules grid=speed target=standin:llama3_8b \\
        draft=standin:llama_160m dtype=bfloat16 humaneval=code.jsonl out=tree_speed.json

A draft model, temperature 1. `lengths` gives every tree policy and every acceptance rule the same
budgets of nodes: policies are compared under recursive rejection (chains: token-wise sampling),
rules on the tree that measured acceptance makes the most of, or, if they judge chains, on chains.
Of a policy that has settings the best of a few counts. `speed` times chains, fixed trees and rules
against the tree of `tree=cost_aware`, which knows their prices; all methods take turns prompt by
prompt, and the figure is that of decoding: the time of all steps, prefill left out, by device
events on a GPU. The stop token is ignored, so that all outputs have the same length. The file is
written anew after every batch; `resume=true` goes on.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from specdec.drafters.trees.cost_aware import MEASURED, CostAware
from specdec.drafters.trees.shapes import greedy, ordered
from specdec.experiments.figures.markdown import show
from specdec.experiments.figures.trees_and_rules_plot import SHORT, tree_lengths, tree_speed
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.study import Study, spend
from specdec.lab.workshop import PLAIN, StudyOptions, Way, Workshop, tree, word
from specdec.rates import AcceptanceRates

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
# Rules on trees, and how children are chosen; on chains.
RULES = (
    ("target_only", "top_k"),
    ("recursive_rejection", "sample"),
    ("recursive_rejection", "sample_with_replacement"),
    ("k_seq", "sample_with_replacement"),
    ("traversal", "sample"),
    ("traversal", "sample_with_replacement"),
    ("multi_path", "sample_with_replacement"),
)
CHAIN_RULES = ("tokenwise", "block")


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    grid: Literal["lengths", "speed"] = option(about="what is compared")
    rates: str = option("zoo", "as tree.rates")
    costs: str = option("cpu", "a table, as tree.costs")
    context: int = option(512, "as tree.context")
    budgets: tuple[Literal[8, 16, 32, 64], ...] = option(tuple(WIDTHS), "of nodes", varies=True)
    prompts: Positive = option(16, "of each set or category")
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")


class Pairing(NamedTuple):
    """A tree policy and a rule.

    Args:
        budget: nodes of a tree at most; 0 if it has none to keep.
        policy: its name.
        setting: what is tuned of it.
        rule: its name.
        children: how they are chosen.
        axis: what it is compared with the others of the budget for: policy or rule.
        tree: words of the policy.
    """

    budget: int
    policy: str
    setting: str
    rule: str
    children: str
    axis: str
    tree: str

    @property
    def name(self) -> str:
        """Unique among the methods of an axis and budget."""
        return (
            f"{self.budget} {self.axis}: {self.policy} {self.setting}, {self.rule}, "
            + (SHORT[self.children])
        )

    @property
    def words(self) -> str:
        return f"{self.tree} tree.children={self.children} acceptance={self.rule}"


def on_chain(budget: int, length: int, rule: str, axis: str = "rule") -> Pairing:
    """A rule for chains."""
    return Pairing(budget, "chain", f"{length}", rule, "sample", axis, tree("chain", length))


def on_tree(budget: int, setting: str, words: str, axis: str = "policy") -> Pairing:
    """A policy under recursive rejection."""
    policy = words.split()[0].removeprefix("tree=")
    return Pairing(budget, policy, setting, "recursive_rejection", "sample", axis, words)


def lengths(budget: int, options: Options) -> Iterator[Pairing]:
    """What is compared at a budget of nodes."""
    searched = f"tree.budget={budget} {word('tree.rates', options.rates)}"
    chains = [length for length in CHAINS if length <= budget]
    for length in chains:
        yield on_chain(budget, length, "tokenwise", "policy")
    for widths in WIDTHS[budget]:
        yield on_tree(budget, ",".join(map(str, widths)), tree("static", *widths))
    guess = AcceptanceRates(values=[[GEOMETRIC ** (rank + 1) for rank in range(8)]])
    paths = ordered(greedy(guess, budget, 8))
    yield on_tree(budget, "halving", f"tree=paths {word('tree.paths', paths)}")
    width, depths = DYNAMIC[budget]
    for depth in depths:
        yield on_tree(budget, f"{width},{depth}", tree("dynamic", budget, width, depth))
    for threshold in THRESHOLDS:
        words = f"{tree('threshold', budget, 8, 8)} tree.threshold={threshold}"
        yield on_tree(budget, f"{threshold:g}", words)
    for name in ("optimal", "accuracy"):
        yield on_tree(budget, "", f"tree={name} {searched}")
    costs = f"{word('tree.costs', options.costs)} tree.batch=1"
    yield on_tree(budget, "", f"tree=cost_aware {searched} {costs}")
    for rule, children in RULES:
        method = on_tree(budget, "", f"tree=optimal {searched}", "rule")
        yield method._replace(rule=rule, children=children)
    for rule in CHAIN_RULES:
        for length in chains:
            yield on_chain(budget, length, rule)


def speed(options: Options) -> Iterator[Pairing]:
    """What is timed."""
    large = options.batch >= LARGE
    for rule in CHAIN_RULES[: 1 if large else 2]:
        for length in TIMED:
            yield on_chain(length, length, rule)
    for widths in FIXED if large else (*FIXED, *FIXED_DEEP):
        yield on_tree(0, ",".join(map(str, widths)), tree("static", *widths))
    aware = on_tree(
        0,
        "",
        f"tree=cost_aware tree.budget=63 tree.context={options.context} "
        f"{word('tree.rates', options.rates)} {word('tree.costs', options.costs)}",
    )
    yield aware
    rules = [("traversal", "sample")]
    if not large:
        rules += [
            ("target_only", "top_k"),
            ("k_seq", "sample_with_replacement"),
            ("multi_path", "sample_with_replacement"),
        ]
    for rule, children in rules:
        yield aware._replace(axis="rule", rule=rule, children=children)


def way_of(method: Pairing, options: Options, shop: Workshop, longest: int) -> Way:
    """How a method is measured, and what is known of it before.

    Raises:
        ValueError: a setting that cannot be used, such as rates that are not there.
    """
    drafter = f"drafter=small_llama {word('drafter.path', options.draft)}"
    known = method._asdict()
    del known["tree"]
    way = shop.way(f"{drafter} {method.words}", rows=options.batch, longest=longest, **known)
    assert way.tree is not None
    if options.costs in MEASURED:
        raise ValueError(
            f"costs={options.costs}: must name a table, to say beforehand what is expected"
        )
    way.entry["nodes"] = way.tree.budget
    if isinstance(way.tree, CostAware):
        choice = way.tree.choice
        way.entry["choice"] = {
            "paths": [list(node) for node in ordered(choice.shape)],
            "tokens": choice.tokens,
            "seconds": choice.seconds,
        }
    return way


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    fast = options.grid == "speed"
    grid = [speed(options)] if fast else [lengths(n, options) for n in options.budgets]
    shop = options.workshop(f"sampling.temperature={TEMPERATURE}")
    sets = options.read(shop)
    longest = options.longest(sets)
    plain = {"policy": "none", "rule": "target_only", "axis": "plain", "budget": 0}
    ways = {"none": shop.way(PLAIN, rows=options.batch, longest=longest, **plain)} if fast else {}
    for method in (method for methods in grid for method in methods):
        ways[method.name] = way_of(method, options, shop, longest)
    result = begin(options, shop.target.device)
    study = Study(
        entries=result.setdefault("methods", {}),
        batches=options.batches(sets),
        turn=spend(options.tokens),
        target=shop.target,
        save=partial(write, options.out, result),
    )
    (study.in_turns if fast else study.one_by_one)(ways)
    show((tree_speed if fast else tree_lengths)(result))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
