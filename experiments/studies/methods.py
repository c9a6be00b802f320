"""What `end_to_end.py` compares: the grid of trees, and what it takes to build each method."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.experiments.studies.sessions import (
    DTYPES,
    Ours,
    Session,
    Theirs,
    load_plain,
    with_tree,
)
from specdec.models.load import load_model
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, Drafter, TreePolicy
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly

LARGE = 8  # a batch from which the smaller grid counts

# The grid. A tree is (kind, sizes): chain (budget), dynamic (budget, width, depth), static
# (widths). Each list is for a batch below LARGE, and from there on.
Trees = tuple[tuple[str, tuple[int, ...]], ...]
CHAINS: Trees = tuple(("chain", (budget,)) for budget in (2, 3, 4, 6))
DYNAMIC: Trees = tuple(
    ("dynamic", sizes) for sizes in ((12, 3, 4), (24, 6, 5), (32, 8, 6), (48, 6, 7), (63, 8, 8))
)
BUSHES: Trees = tuple(("dynamic", sizes) for sizes in ((24, 3, 4), (32, 4, 4), (63, 6, 5)))
STATIC: Trees = (("static", (3, 2, 1)), ("static", (4, 2, 2, 1)))
FEW: Trees = (
    *(("chain", (budget,)) for budget in (2, 3, 4)),
    *(("dynamic", sizes) for sizes in ((6, 2, 3), (12, 3, 4))),
)
# Temperature 0; above it children drawn from the draft, and its most probable tokens.
GREEDY: tuple[Trees, Trees] = ((*CHAINS, *DYNAMIC), FEW)
DRAWN: tuple[Trees, Trees] = ((*CHAINS, *STATIC, *BUSHES), FEW)
TOP: tuple[Trees, Trees] = ((("chain", (2,)), ("dynamic", (32, 8, 3))), ())
NGRAM: tuple[tuple[tuple[int, int], ...], ...] = (  # (chain, min_match)
    tuple((budget, match) for budget in (4, 8, 16) for match in (1, 2)),
    ((4, 2), (8, 2)),
)
PROMPT_LOOKUP_TOKENS = 10

Build = Callable[[], Session]


class Setting(NamedTuple):
    """Which part, and where its numbers go."""

    part: str
    temperature: float
    batch: int

    @property
    def name(self) -> str:
        return f"T={self.temperature:g}, batch {self.batch}, {self.part}"


def make_tree(kind: str, sizes: tuple[int, ...], children: str = "top_k") -> TreePolicy:
    if kind == "chain":
        return Chain(budget=sizes[0], children=children)
    if kind == "static":
        return Static(widths=sizes, children=children)
    budget, width, depth = sizes
    return Dynamic(budget=budget, width=width, depth=depth, children=children)


def small_trees(
    temperature: float, batch: int
) -> Iterator[tuple[str, TreePolicy, AcceptanceRule]]:
    """The grid of a drafting model: name, tree, rule."""
    size = int(batch >= LARGE)
    if not temperature:
        for kind, sizes in GREEDY[size]:
            yield f"{kind} {_sizes(sizes)}", make_tree(kind, sizes), Greedy()
        return
    for kind, sizes in DRAWN[size]:
        name = f"{kind} {_sizes(sizes)}, sample"
        yield name, make_tree(kind, sizes, "sample"), RecursiveRejection()
    for kind, sizes in TOP[size]:
        yield f"{kind} {_sizes(sizes)}, top_k", make_tree(kind, sizes), TargetOnly()


def _sizes(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))


class Models:
    """What is loaded, once each, when it is first needed.

    Args:
        longest: tokens of a prompt and its output at most.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.dtype, self.device = DTYPES[options.dtype], torch.device(options.device)
        self.drafts = {path.rpartition(":")[2]: path for path in options.draft}
        self.target_path = options.target
        self.target = load_model(options.target, Placement(device=self.device, dtype=self.dtype))
        self.longest = 0
        self._drafters: dict[str, SmallLlama] = {}
        self._plain: dict[str, Any] = {}

    def ours(self, drafter: Drafter, rule: AcceptanceRule, setting: Setting) -> Session:
        return Ours(
            self.target,
            drafter,
            rule,
            temperature=setting.temperature,
            batch=setting.batch,
            longest=self.longest,
        )

    def drafting(
        self, name: str, tree: TreePolicy, rule: AcceptanceRule, setting: Setting
    ) -> Session:
        """With one of the drafts."""
        if name not in self._drafters:
            path = self.drafts[name]
            self._drafters[name] = SmallLlama(target=self.target, tree=tree, path=path)
        return self.ours(with_tree(self._drafters[name], tree), rule, setting)

    def theirs(self, temperature: float, assistant: str | None = None, **extra: Any) -> Session:
        """transformers, perhaps with one of the drafts."""
        if assistant is not None:
            extra["assistant_model"] = self._plain_model(assistant)
        return Theirs(self._plain_model(self.target_path), temperature=temperature, **extra)

    def forget_plain(self) -> None:
        self._plain.clear()

    def _plain_model(self, path: str) -> Any:
        if path not in self._plain:
            self._plain[path] = load_plain(path, dtype=self.dtype, device=self.device)
        return self._plain[path]


def builders(setting: Setting, models: Models) -> dict[str, Build]:
    """How to make each method of a part; `none` comes first."""
    part, temperature, batch = setting
    rule: AcceptanceRule = TargetOnly() if temperature else Greedy()
    found: dict[str, Build] = {"none": lambda: models.ours(NoDrafter(), rule, setting)}
    if part == "ngram":
        for budget, match in NGRAM[batch >= LARGE]:
            drafter = NGram(tree=Chain(budget=budget), min_match=match)
            name = f"ngram chain {budget}, min_match {match}"
            found[name] = partial(models.ours, drafter, rule, setting)
    elif part == "transformers":
        found["generate"] = partial(models.theirs, temperature)
        for name, path in models.drafts.items():
            found[f"assisted, {name}"] = partial(models.theirs, temperature, assistant=path)
        found["prompt lookup"] = partial(
            models.theirs, temperature, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS
        )
    else:
        for name, tree, judge in small_trees(temperature, batch):
            found[f"small_llama {name}"] = partial(models.drafting, part, tree, judge, setting)
    return found
