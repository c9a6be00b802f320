"""Does a drafter, a tree policy or an acceptance rule keep what it owes?

    python -m specdec.experiments.tools.contract --config-dir my/configs drafter=echo
    python -m specdec.experiments.tools.contract drafter=user drafter._target_=my_drafter.lookup
    python -m specdec.experiments.tools.contract --config-dir my/configs tree=zigzag acceptance=shy

The words are those of `specdec.run`. Checked is what they choose of drafter, tree and acceptance,
on a CPU; it takes a minute or so, and what is broken is told in one line, with exit code 1. The
tests call the same functions for every option there is.

Drafters decode a few texts with the built-in models. Policies grow trees of a draft that is made
up. The law of what a rule emits is compared with the target's in a tiny world: over all trees a
drafter could draw, and many draws of the coins; `tests/verifier/` has the exact law of the
rules that are built in.

Legend: B sequences, F nodes of a level, K draft candidates.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, GrowingDrafter, grow
from specdec.drafters.host import HostDrafter
from specdec.experiments.studies.rule_laws import context_for
from specdec.experiments.tools.rule_contract import check_rule, require
from specdec.kernels.reference.growth import DEAD
from specdec.lab.build import baseline_of, method_of
from specdec.lab.method import Method
from specdec.lab.settings import settings_of
from specdec.models.load import Models
from specdec.models.placement import Placement
from specdec.protocols import Drafter, Growth, StepContext, TreePolicy, levels_of
from specdec.request import Capacity, Request
from specdec.sampling import DRAFT_STREAM, SamplingParams, race
from specdec.tree import Children, TokenTree

GROUPS = ("drafter", "tree", "acceptance")
TARGET = "zoo:target"
CODE = "".join(f"def add_{i}(a, b):\n    return a + b\n\n\n" for i in range(4))
TEXTS = (
    CODE + "def add_",
    "It was a dark night, and the old captain stood at the",
    "def fibonacci(n):\n    ",
    "The old man and the sea. The old man and the",
)
NEW = 20  # tokens for each
TREES = {
    "chain": ("tree=chain", "tree.budget=3"),
    "static": ("tree=static", "tree.widths=[2,2,1]"),
    "dynamic": ("tree=dynamic", "tree.budget=8", "tree.width=3", "tree.depth=4"),
}
SAMPLED = ("sampling=sample", "tree.children=sample")
VOCAB = 6  # of made-up drafts

Make = Callable[..., Method]
"""A method that is not loaded, of words that are added to those of the subject."""


def overrides(kind: type, base: type, name: str) -> bool:
    return getattr(kind, name) is not getattr(base, name)


# Drafters


@dataclass(frozen=True, eq=False)
class Run:
    """What decoding all texts has yielded, and every step's trees, with what was drafted for."""

    outputs: list[list[int]] = field(default_factory=list)
    steps: list[tuple[TokenTree, StepContext]] = field(default_factory=list)

    @property
    def trees(self) -> list[Any]:
        return [(tree.tokens.tolist(), tree.parents.tolist()) for tree, _ in self.steps]


def ready(method: Method, models: Models) -> Method:
    method.load(models.load(TARGET), models)
    return method


def decode(method: Method, models: Models, *, rows: int, warm_up: bool = False) -> Run:
    """Decode the texts with a method that is ready; every tree is checked."""
    target, drafter = models.load(TARGET), method.drafter
    run, draft = Run(), drafter.draft

    def recorded(context: StepContext) -> TokenTree:
        made = draft(context)
        made.check()
        require(
            int(made.size.max()) - 1 <= method.tree.budget,
            f"{drafter.name}: a tree of {int(made.size.max()) - 1} nodes, beyond tree.budget="
            f"{method.tree.budget}",
        )
        require(
            made.tokens[:, 0].equal(context.roots),
            f"{drafter.name}: the root of a tree is not the last committed token",
        )
        run.steps.append((made.to(torch.device("cpu")), context))
        return made

    drafter.draft = recorded  # type: ignore[method-assign]
    try:
        capacity = Capacity(rows=rows, max_tokens=256, share=not drafter.reads_states)
        decoder = method.decoder(target, capacity)
        prompts = [target.tokenizer(text).input_ids for text in TEXTS]
        if warm_up:
            decoder.warm_up(prompts[0])
        requests = [
            Request(id=i, prompt_ids=ids, max_new_tokens=NEW, category="ab"[i % 2])
            for i, ids in enumerate(prompts)
        ]
        done = {s.request.id: s.output_ids for s in decoder.run(requests)}
    finally:
        drafter.draft = draft  # type: ignore[method-assign]
    run.outputs.extend(done[i] for i in range(len(prompts)))
    return run


def plain_outputs(models: Models) -> list[list[int]]:
    """Those of greedy decoding without a drafter."""
    return decode(ready(baseline_of(settings_of("")), models), models, rows=1).outputs


def check_declared(drafter: Drafter) -> None:
    """What it says of itself in class attributes is true of its methods."""
    kind, name = type(drafter), type(drafter).__name__
    if isinstance(drafter, HostDrafter) and drafter.composable:
        for method in ("draft", "commit"):
            require(
                not overrides(kind, HostDrafter, method),
                f"{name}: has a {method} of its own, which a composition would never call; say "
                f"composable = False",
            )
    if isinstance(drafter, GrowingDrafter) and drafter.composable:
        own = [one for one in ("commit", "follow") if overrides(kind, GrowingDrafter, one)]
        require(
            len(own) != 1,
            f"{name}: has {''.join(own)} and not the other of commit and follow; define both, or "
            f"say composable = False",
        )
    require(
        not drafter.observes.prompts or overrides(kind, Drafter, "read"),
        f"{name}: observes prompts, and has no read",
    )
    require(
        drafter.reset in (None, "prompt", "category", "never"),
        f"{name}: reset={drafter.reset!r}; it must be prompt, category, never or None",
    )


def check_greedy(make: Make, models: Models, plain: list[list[int]], tree: str, rows: int) -> None:
    """Outputs are those of plain decoding, and trees are valid and within their budget."""
    method = ready(make(*TREES[tree]), models)
    run, name = decode(method, models, rows=rows), method.drafter.name
    if not method.rule.synthetic:
        require(run.outputs == plain, f"{name}: tree={tree} changes greedy outputs")
    require(
        any(made.nodes > 1 for made, _ in run.steps),
        f"{name}: has drafted nothing for any of the texts",
    )


def check_no_budget(make: Make, models: Models, plain: list[list[int]]) -> None:
    """A budget of nothing drafts nothing."""
    method = ready(make("tree=chain", "tree.budget=0"), models)
    run, name = decode(method, models, rows=2), method.drafter.name
    require(run.outputs == plain, f"{name}: tree.budget=0 changes greedy outputs")
    require(all(made.nodes == 1 for made, _ in run.steps), f"{name}: drafts though tree.budget=0")


def sampled(make: Make, *words: str) -> Method | None:
    """The method with sampled children; None if the drafter refuses them, by their setting."""
    try:
        return make(*words, *SAMPLED)
    except ValueError as error:
        require("tree.children=sample" in str(error), f"a refusal names no setting: {error}")
        return None


def check_seed(make: Make, models: Models) -> None:
    """The same seed makes the same trees of sampled children, or whatever it drafts."""
    runs = []
    for _ in range(2):
        method = sampled(make, *TREES["dynamic"]) or make(*TREES["dynamic"], "sampling=sample")
        runs.append(decode(ready(method, models), models, rows=3))
    name = method.drafter.name
    require(runs[0].outputs == runs[1].outputs, f"{name}: one seed, and two outputs")
    require(runs[0].trees == runs[1].trees, f"{name}: one seed, and two trees")


def check_forgets(make: Make, models: Models) -> None:
    """Nothing leaks from one run into the next."""
    method = ready(make(*TREES["static"]), models)
    first = decode(method, models, rows=2)
    second = decode(method, models, rows=2, warm_up=True)
    name = method.drafter.name
    require(first.outputs == second.outputs, f"{name}: outputs depend on an earlier run")
    require(
        second.trees[-len(first.trees) :] == first.trees,
        f"{name}: trees depend on an earlier run; `forget` must drop all that was learnt",
    )


def check_draws(method: Method, models: Models) -> Iterator[tuple[Tensor, Tensor]]:
    """Sampled children of a root, two or fewer, are what is drawn from the proposal that the rule
    is told of. Yields each that was drawn from: ids and probabilities, [K].

    Args:
        method: with tree.widths=[2] and sampled children, not ready yet.
    """
    name = method.drafter.name
    for tree, context in decode(ready(method, models), models, rows=2).steps:
        proposal = tree.proposal
        if proposal is None:
            require(tree.nodes == 1, f"{name}: sampled children without a proposal")
            continue
        uniform = context.uniforms(DRAFT_STREAM, proposal.ids.shape[2])
        for row in range(len(tree.tokens)):
            ids, probs = proposal.ids[row, 0], proposal.probs[row, 0].double()
            support = int((probs > 0).sum())
            if not support:
                continue
            require(abs(float(probs.sum()) - 1) < 1e-6, f"{name}: a proposal that is not whole")
            order = race(probs, uniform[row]).argsort()[: min(2, support)]
            require(
                tree.tokens[row, 1 : int(tree.size[row])].tolist() == ids[order].tolist(),
                f"{name}: its children are not those drawn from its proposal",
            )
            yield ids, probs


def check_drafter(make: Make, models: Models) -> None:
    """All of the above.

    Raises:
        AssertionError: what is broken, in one line.
        ValueError: settings that cannot be used.
        DraftError: the drafter raised something.
    """
    check_declared(make(*TREES["chain"]).drafter)
    plain = plain_outputs(models)
    for tree in TREES:
        for rows in (1, 4):
            check_greedy(make, models, plain, tree, rows)
    check_no_budget(make, models, plain)
    check_seed(make, models)
    check_forgets(make, models)
    method = sampled(make, "tree=static", "tree.widths=[2]")
    if method is not None:
        for _ in check_draws(method, models):
            pass


# Tree policies


def guesses(frontier: Frontier) -> tuple[Tensor, Tensor]:
    """A made-up draft: distributions that depend on token and level alone."""
    place = torch.arange(VOCAB, dtype=torch.float64)
    phase = frontier.tokens[..., None] * 7.3 + place * 12.9 + frontier.level * 5.1
    probs, ids = (3 * phase.sin()).softmax(-1).sort(-1, descending=True)
    return ids, probs


def grown(policy: TreePolicy, roots: Sequence[int]) -> TokenTree:
    context = context_for(SamplingParams(temperature=1.0), len(roots))
    numbers = np.array(roots)

    def uniforms(stream: int, count: int) -> Tensor:  # of the root and the stream alone
        draws = [np.random.default_rng([n, stream]).random(count) for n in numbers]
        return torch.tensor(np.array(draws))

    step = StepContext(
        sequences=[], roots=torch.tensor(numbers), sampling=context.sampling, uniforms=uniforms
    )
    return grow(policy, levels_of(policy, None), step, guesses)[0]


def rows_of(tree: TokenTree) -> list[Any]:
    """Tokens and parents of each row, padding cut off."""
    sizes = tree.size.tolist()
    return [
        (tokens[:size], parents[:size])
        for tokens, parents, size in zip(
            tree.tokens.tolist(), tree.parents.tolist(), sizes, strict=True
        )
    ]


class Twice(TreePolicy):
    """A policy that is asked everything twice, and grows another tree in between.

    Args:
        drop: whether nodes that are not kept are dropped.
    """

    def __init__(self, policy: TreePolicy, *, drop: bool) -> None:
        super().__init__(budget=policy.budget, children=policy.children)
        self.policy, self.drop = policy, drop
        self.kept: list[list[bool]] = []  # of each row's nodes but the root

    def levels(self, depth: int | None) -> int:
        return self.policy.levels(depth)

    def width(self, level: int) -> int:
        return self.policy.width(level)

    def select(self, at: Growth, scores: Tensor) -> Tensor | None:
        return self._same("select", at, scores)

    def expand(self, at: Growth, scores: Tensor) -> Tensor | None:
        return self._same("expand", at, scores)

    def keep(self, scores: Tensor, kernels: ModuleType) -> Tensor | None:
        kept = self._same("keep", scores, kernels)
        mask = torch.ones_like(scores, dtype=torch.bool) if kept is None else kept
        alive = zip(mask, scores > DEAD, strict=True)
        self.kept = [row[living].tolist() for row, living in alive]
        return kept if self.drop else None

    def _same(self, name: str, *given: Any) -> Tensor | None:
        ask = getattr(self.policy, name)
        first: Tensor | None = ask(*given)
        first = None if first is None else first.clone()
        grown(self.policy, (4, 2, 5, 1))
        second = ask(*given)
        same = first is second if first is None or second is None else first.equal(second)
        kind = type(self.policy).__name__
        require(same, f"{kind}: {name} answers otherwise once another tree has been grown")
        return first


def check_policy(make: Callable[[str], TreePolicy]) -> None:
    """What every tree policy owes, for each way to choose children that it has.

    Args:
        make: a policy by `children`; a ValueError that names tree.children is a refusal.

    Raises:
        AssertionError: what is broken, in one line.
    """
    refused = 0
    for children in get_args(Children):
        try:
            policy = make(children)
        except ValueError as error:
            require(f"tree.children={children}" in str(error), f"no setting named: {error}")
            refused += 1
            continue
        check_growth(policy)
    require(refused < len(get_args(Children)), "every way to choose children is refused")


def check_growth(policy: TreePolicy) -> None:
    kind, roots = type(policy).__name__, (3, 1, 4)
    for method in ("select", "expand", "keep"):
        require(
            not (policy.takes_all and overrides(type(policy), TreePolicy, method)),
            f"{kind}: says that it takes all, and has a {method} of its own",
        )
    judge = Twice(policy, drop=False)
    for (_, parents), kept in zip(rows_of(grown(judge, roots)), judge.kept, strict=False):
        known = [True, *kept]
        orphan = any(keeps and not known[parents[n]] for n, keeps in enumerate(known) if n)
        require(not orphan, f"{kind}: keeps a node, and drops its parent")
    tree = grown(policy, roots)
    tree.check()
    for tokens, parents in rows_of(tree):
        require(
            len(tokens) - 1 <= policy.budget,
            f"{kind}: {len(tokens) - 1} nodes, beyond its budget of {policy.budget}",
        )
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        require(max(depths) <= levels_of(policy, None), f"{kind}: more levels than it says")
        for node, depth in enumerate(depths):
            count = parents.count(node)
            wide = count and count > policy.width(depth)
            require(not wide, f"{kind}: {count} children at level {depth}, beyond its width")
    alone = [rows_of(grown(policy, [root]))[0] for root in roots]
    require(alone == rows_of(tree), f"{kind}: the tree of a sequence depends on the others")
    again = rows_of(grown(Twice(policy, drop=True), roots))
    require(again == rows_of(tree), f"{kind}: its tree is another if it is asked at every level")


# The command line


def words_for(group: str, words: Sequence[str]) -> list[str]:
    """Those that do not speak of the other groups."""
    others = tuple(other for other in GROUPS if other != group)
    return [word for word in words if not word.lstrip("+~").startswith(others)]


def method_for(words: Sequence[str], *more: str) -> Method:
    return method_of(settings_of([*words, *more]))


def tree_for(words: Sequence[str], children: str) -> TreePolicy:
    """The policy, for a drafter and a temperature that leave it any children."""
    draws = ("sampling=sample",) if children != "top_k" else ()
    return method_for(words, "drafter=ngram", f"tree.children={children}", *draws).tree


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    chosen = [group for group in GROUPS if any(w.startswith(f"{group}=") for w in words)]
    group = "nothing to check"
    try:
        if not chosen:
            raise ValueError(f"choose {'=, '.join(GROUPS)}=, as for specdec.run")
        for group in chosen:
            check(group, words_for(group, words))
            print(f"{group}: keeps its contract")
    except (AssertionError, ValueError, RuntimeError) as error:
        print(f"error: {group}: {error}", file=sys.stderr)
        return 1 if isinstance(error, AssertionError) else 2
    return 0


def check(group: str, words: Sequence[str]) -> None:
    if group == "drafter":
        check_drafter(partial(method_for, words), Models(Placement()))
    elif group == "tree":
        check_policy(partial(tree_for, words))
    else:
        lossy = "acceptance.allow_lossy=true"
        check_rule(method_for(words, lossy, "drafter=ngram", "sampling=sample").rule)


if __name__ == "__main__":
    sys.exit(main())
