"""What is replayed: tree policies of several budgets, ways of choosing children, and rules."""

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import yaml

from specdec.lab.build import build
from specdec.lab.options import CONFIGS, nearest
from specdec.protocols import TreePolicy
from specdec.rates import AcceptanceRates
from specdec.replay.survival import CHAINS, SAMPLED, Node, Shape, check
from specdec.sampling import SamplingParams

FIXED = ("chain", "static", "optimal", "accuracy", "cost_aware")  # of one shape at every step
FOLLOWING = ("dynamic", "threshold")  # trees that follow the draft's probabilities
DEEPEST, WIDEST = 8, 8  # of the trees of tree=static that are looked at
KINDS = ("top_k", "sample", "sample_with_replacement")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way to decode.

    Args:
        shape: None if it is not the same at every step.
        tree: the policy itself.
    """

    policy: str
    budget: int
    children: str
    rule: str
    tree: TreePolicy
    shape: Shape | None

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "tree": self.policy,
            "budget": self.budget,
            "children": self.children,
            "acceptance": self.rule,
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is wanted, as in the options of the command.

    Args:
        rates: file of the rates that policies choose by; None: the record has none.
        costs: file or name; None for no times.
        depth: levels of a tree at most; None for any.
    """

    policies: Sequence[str]
    budgets: Sequence[int]
    rules: Sequence[str]
    children: Sequence[str]
    sampling: SamplingParams
    rates: str | None
    costs: str | None
    batch: int
    depth: int | None = None
    made: dict[tuple[str, int, str], TreePolicy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given, known in (
            ("policies", self.policies, (*FIXED, *FOLLOWING)),
            ("children", self.children, ("all", *KINDS)),
            ("rules", self.rules, ("all", "greedy", *SAMPLED)),
        ):
            if not given:
                raise ValueError(f"{name}=[]: must name one of {', '.join(known)} at least")
            for one in given:
                if one not in known:
                    near = nearest(one, known)
                    raise ValueError(f"{name}={one}: must be of {', '.join(known)}{near}")
        if not self.budgets:
            raise ValueError("budgets=[]: must be one number at least")
        if "cost_aware" in self.policies and self.costs is None:
            raise ValueError("policies=cost_aware: needs costs=NAME or a file of a cost table")

    def configurations(self) -> list[Configuration]:
        """All that go together.

        Raises:
            ValueError: none do, or a policy that cannot be made.
        """
        found = [
            self._made(policy, budget, children, rule)
            for children, rule in self._pairs()
            for policy, budget in product(self.policies, self.budgets)
            if not _unfit(policy, children, rule)
        ]
        if not found:
            raise ValueError(
                f"rules={','.join(self.rules)}: none of them goes with policies="
                f"{','.join(self.policies)} and children={','.join(self.children)} without "
                f"changing the law of texts; leave one of the three out"
            )
        return found

    def left_out(self) -> list[dict[str, Any]]:
        """Policies and rules that were asked for and go together with no children: lists of both,
        and why. Rules that no children that were asked for make lossless are among them if they
        were named."""
        kinds: dict[str, list[str]] = {}  # of children, by rule
        for children, rule in self._pairs():
            kinds.setdefault(rule, []).append(children)
        found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for rule in dict.fromkeys([*kinds, *self.rules]):
            if rule == "all":
                continue
            whys: dict[str, list[str]] = {}
            for policy in self.policies:
                reasons = [_unfit(policy, children, rule) for children in kinds.get(rule, [])]
                if all(reasons):
                    why = reasons[0] if reasons else self._lossy(rule)
                    whys.setdefault(why, []).append(policy)
            for why, policies in whys.items():
                found.setdefault((why, tuple(policies)), []).append(rule)
        return [
            {"policies": [*policies], "rules": rules, "why": why}
            for (why, policies), rules in found.items()
        ]

    @property
    def _kinds(self) -> Sequence[str]:
        return KINDS if "all" in self.children else self.children

    def _pairs(self) -> Iterator[tuple[str, str]]:
        if self.sampling.greedy:
            yield "top_k", "greedy"
            return
        rules = SAMPLED if "all" in self.rules else self.rules
        for children, rule in product(self._kinds, rules):
            try:
                check(rule, frozenset(), children)
            except ValueError:
                continue
            yield children, rule

    def _lossy(self, rule: str) -> str:
        """Why a rule goes with none of the children."""
        if self.sampling.greedy:
            return "at temperature 0 every rule is greedy"
        return f"would change the law of texts with children={','.join(self._kinds)}"

    def _made(self, policy: str, budget: int, children: str, rule: str) -> Configuration:
        tree = self._tree(policy, budget, children)
        return Configuration(
            policy=policy,
            budget=budget,
            children=children,
            rule=rule,
            tree=tree,
            shape=None if policy in FOLLOWING else shape_of(tree, self.depth),
        )

    def _tree(self, policy: str, budget: int, children: str) -> TreePolicy:
        key = policy, budget, children
        if key not in self.made:
            self.made[key] = self._build(policy, budget, children)
        return self.made[key]

    def _build(self, policy: str, budget: int, children: str) -> TreePolicy:
        file = yaml.safe_load((CONFIGS / "tree" / f"{policy}.yaml").read_text())
        kind = pkgutil.resolve_name(file["_target_"])
        if policy in FOLLOWING:
            own = {k: v for k, v in file.items() if k not in ("_target_", "budget", "children")}
            return build(kind, "tree", {**own, "budget": budget, "children": children})
        if policy == "chain":
            return build(kind, "tree", {"budget": budget, "children": children})
        if self.rates is None:
            raise ValueError(
                f"policies={policy}: chooses its shapes by rates, and the record has none of a "
                f"drafter's law; give rates=zoo or a file, or use policies=chain"
            )
        if policy == "static":
            widths = self._widths(budget, children)
            return build(kind, "tree", {"widths": widths, "children": children})
        given: dict[str, Any] = {"rates": self.rates, "budget": budget, "children": children}
        given |= {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        if self.depth is not None:
            given["depth"] = self.depth
        if policy == "cost_aware":
            given |= {"costs": self.costs, "batch": self.batch}
        return build(kind, "tree", given)

    def _widths(self, budget: int, children: str) -> list[int]:
        """Of tree=static, the best that the budget allows by these rates, never wider below."""
        assert self.rates is not None
        rates = AcceptanceRates.load(
            self.rates,
            setting="rates",
            children=children,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        by_width = [[rates.row(d)[: w + 1].sum() for w in range(WIDEST)] for d in range(DEEPEST)]

        def expected(widths: tuple[int, ...]) -> float:
            total, reach = 0.0, 1.0
            for depth, width in enumerate(widths):
                reach *= float(by_width[depth][width - 1])
                total += reach
            return total

        known = [one for one in _static(budget) if self.depth is None or len(one) <= self.depth]
        return list(known[int(np.argmax([expected(widths) for widths in known]))])


def _unfit(policy: str, children: str, rule: str) -> str:
    """Why a policy does not go with a lossless pair of these; empty if it does."""
    if rule in CHAINS and policy != "chain":
        return "for chains alone"
    if policy in FOLLOWING and children != "top_k":
        return "shapes would depend on what is drawn"
    return ""


@cache
def _static(budget: int) -> list[tuple[int, ...]]:
    """Widths, none wider than the one above, of as many nodes as the budget at most."""
    found: list[tuple[int, ...]] = []
    growing: list[tuple[tuple[int, ...], int, int]] = [((), 1, 0)]
    while growing:
        widths, level, nodes = growing.pop()
        if len(widths) == DEEPEST:
            continue
        for width in range(1, (widths[-1] if widths else min(WIDEST, budget)) + 1):
            if nodes + level * width <= budget:
                longer = (*widths, width)
                found.append(longer)
                growing.append((longer, level * width, nodes + level * width))
    return found


def shape_of(tree: TreePolicy, depth: int | None = None) -> Shape:
    """Of a policy whose trees are alike, of a drafter of that depth."""
    known = getattr(tree, "shape", None)
    if known is not None:
        return frozenset(known) if tree.budget else frozenset()
    shape: set[Node] = set()
    level: list[Node] = [()]
    for place in range(tree.levels(depth) if tree.budget else 0):
        level = [(*node, rank) for node in level for rank in range(tree.width(place))]
        shape.update(level)
    return frozenset(shape)
