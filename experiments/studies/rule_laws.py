"""The exact law of what one step emits under an acceptance rule, by enumeration.

A tiny world is two tables, of the target and of the draft, with a distribution after every
context. `drawn_trees` lists all trees a drafter could draw, with their probabilities, and
`emitted_law` goes over all of them and over all ways the coins of the rule could fall. Nothing is
random and nothing is estimated. `acceptance_bounds.py` and the tests are built on this.

Legend: T trees, C ways the coins may fall, R of both that can happen, N nodes, V vocabulary, K
draft candidates.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.protocols import StepContext
from specdec.sampling import SamplingParams, uniforms
from specdec.tree import Children, Proposal, TokenTree
from specdec.verifier import (
    block,
    hsd,
    k_seq,
    multi_path,
    recursive_rejection,
    target_only,
    traversal,
)
from specdec.verifier.coins import CoinRule
from specdec.verifier.support import Trial

ROOT_TOKEN = 1
BELOW_ONE = math.nextafter(1.0, 0.0)
CONCENTRATION = 0.7  # of the Dirichlet distribution that random tables are drawn from
ROWS = 1 << 16  # judged at once
SKIPPING = ("traversal", "multi_path")  # rules that do not look at every coin
NEVER = 1e-24  # outcomes below are what rounding leaves of impossible ones

Tokens = tuple[int, ...]
Law = dict[Tokens, float]
Table = Callable[[Tokens], NDArray[np.float64]]
"""From a context to [V] probabilities (or logits) of the token after it."""
Counts = Callable[[int, Tokens, int], int]
"""(level, tokens of the whole level, place in it) to the number of children."""


def dirichlet_table(seed: int, vocab: int, zeros: int = 0) -> Table:
    """An unrelated random distribution after each context, `zeros` of its tokens impossible."""
    known: dict[Tokens, NDArray[np.float64]] = {}

    def at(context: Tokens) -> NDArray[np.float64]:
        if context not in known:
            generator = np.random.default_rng([seed, *(token + 1 for token in context)])
            probs = generator.dirichlet(np.full(vocab, CONCENTRATION))
            probs[generator.permutation(vocab)[:zeros]] = 0.0
            known[context] = probs / probs.sum()
        return known[context]

    return at


# All trees a drafter may draw


@dataclass(frozen=True)
class DrawnTree:
    """A tree and the probability that the drafter draws it."""

    probability: float
    tokens: Tokens = (ROOT_TOKEN,)
    parents: Tokens = (-1,)
    contexts: tuple[Tokens, ...] = field(default=((),))

    def with_children(self, node: int, children: Tokens, probability: float) -> "DrawnTree":
        return DrawnTree(
            self.probability * probability,
            self.tokens + children,
            self.parents + (node,) * len(children),
            self.contexts + tuple((*self.contexts[node], child) for child in children),
        )


def ordered_draws(
    probs: NDArray[np.float64], count: int, *, replacement: bool
) -> list[tuple[Tokens, float]]:
    """Every sequence of `count` draws with its probability; fewer draws if the support ends."""
    if count == 0 or probs.sum() <= 0:
        return [((), 1.0)]
    found = []
    for token in np.flatnonzero(probs):
        left = probs.copy()
        if not replacement:
            left[token] = 0.0
            left = left / left.sum() if left.any() else left
        for rest, probability in ordered_draws(left, count - 1, replacement=replacement):
            found.append(((int(token), *rest), probs[token] * probability))
    return found


def drawn_trees(counts: Counts, levels: int, draft: Table, children: Children) -> list[DrawnTree]:
    """All trees with their probabilities, drawn level by level from the draft distribution."""
    trees = [DrawnTree(1.0)]
    for level in range(levels):
        grown = []
        for tree in trees:
            nodes = [i for i, context in enumerate(tree.contexts) if len(context) == level]
            level_tokens = tuple(tree.tokens[i] for i in nodes)
            variants = [tree]
            for place, node in enumerate(nodes):
                count = counts(level, level_tokens, place)
                probs = draft(tree.contexts[node])
                if children == "top_k":
                    best = np.argsort(-probs, kind="stable")[:count]
                    draws = [(tuple(int(t) for t in best if probs[t] > 0), 1.0)]
                else:
                    replacement = children == "sample_with_replacement"
                    draws = ordered_draws(probs, count, replacement=replacement)
                variants = [v.with_children(node, *d) for v in variants for d in draws]
            grown += variants
        trees = grown
    whole = math.isclose(sum(tree.probability for tree in trees), 1.0, abs_tol=1e-9)
    _require(whole, "the probabilities of all trees do not add up to 1")
    return trees


def widths(*numbers: int) -> Counts:
    """Every node of a level has the same number of children."""
    return lambda level, tokens, place: numbers[level]


def token_trees(
    trees: list[DrawnTree],
    draft: Table | None,
    children: Children = "sample",
    *,
    compact: bool = False,
) -> TokenTree:
    """One padded batch; padding carries legal but misleading tokens.

    `compact` proposals list only the support, in shuffled order, and fill up with void entries.
    """
    nodes = max(len(tree.tokens) for tree in trees)
    tokens = torch.full((len(trees), nodes), ROOT_TOKEN)
    parents = torch.full((len(trees), nodes), -2, dtype=torch.int32)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        parents[row, : len(tree.tokens)] = torch.tensor(tree.parents, dtype=torch.int32)
    batch = TokenTree(
        tokens=tokens,
        parents=parents,
        size=torch.tensor([len(tree.tokens) for tree in trees], dtype=torch.int32),
        depth=max(len(context) for tree in trees for context in tree.contexts),
        proposal=None if draft is None else _proposal(trees, nodes, draft, children, compact),
    )
    batch.check()
    return batch


def _proposal(
    trees: list[DrawnTree], nodes: int, draft: Table, children: Children, compact: bool
) -> Proposal:
    vocab = len(draft(()))
    ids = np.broadcast_to(np.arange(vocab), (len(trees), nodes, vocab)).copy()
    probs = np.zeros((len(trees), nodes, vocab))
    for row, tree in enumerate(trees):
        for node in set(tree.parents) - {-1}:
            full = draft(tree.contexts[node])
            if compact:
                support = np.random.default_rng(vocab).permutation(np.flatnonzero(full))
                ids[row, node] = support[0]
                ids[row, node, : len(support)] = support
                probs[row, node, : len(support)] = full[support]
            else:
                probs[row, node] = full
    return Proposal(ids=torch.tensor(ids), probs=torch.tensor(probs), children=children)


def target_at_nodes(trees: list[DrawnTree], target: Table) -> Tensor:
    """[T, N, V]; the wrong distribution at padding."""
    nodes = max(len(tree.tokens) for tree in trees)
    out = np.zeros((len(trees), nodes, len(target(()))))
    out[..., 0] = 1.0
    for row, tree in enumerate(trees):
        for node, context in enumerate(tree.contexts):
            out[row, node] = target(context)
    return torch.tensor(out)


def take_rows(tree: TokenTree, rows: Tensor) -> TokenTree:
    proposal = tree.proposal
    if proposal is not None:
        proposal = replace(proposal, ids=proposal.ids[rows], probs=proposal.probs[rows])
    return TokenTree(
        tokens=tree.tokens[rows],
        parents=tree.parents[rows],
        size=tree.size[rows],
        depth=tree.depth,
        proposal=proposal,
    )


# The law of what comes out


def coin_chances(
    rule: CoinRule, tree: TokenTree, target: Tensor, coins: Tensor | None = None
) -> Tensor:
    """[B, N]: what each coin is compared with; nan where a node is not judged.

    Args:
        target: [B, N, V].
        coins: [B, N], for traversal alone: it judges a node by what became of those before.

    Raises:
        ValueError: a rule that is not known here.
    """
    if rule.name == "target_only":
        return target_only.child_probabilities(tree, target)
    trial = Trial.of(rule.name, tree, target, coins)
    match rule.name:
        case "recursive_rejection" | "tokenwise":
            return recursive_rejection.try_children(trial)[0]
        case "block":
            return block.chances(trial)[0]
        case "hsd":
            return hsd.judge_lines(trial)[0]
        case "k_seq":
            return k_seq.chances(trial)[0]
        case "multi_path":
            return _picked_chances(trial)
        case "traversal" if coins is not None:
            return traversal.traverse(trial)[2]
    raise ValueError(f"{rule.name}: it is not known what its coins are compared with")


def _picked_chances(trial: Trial) -> Tensor:
    """[B, N], of the nodes that multi-path block verification picks; nan for all others."""
    path, chain = multi_path.pick(trial)
    found = block.chances(chain)[0]
    # Entries past the end of a path go to an extra last place.
    nodes, inside = trial.tree.nodes, torch.arange(path.shape[1]) < chain.tree.size[:, None]
    to = torch.where(inside, path, nodes)
    chance = found.new_full((len(path), nodes + 1), float("nan"))
    return chance.scatter(1, to, found)[:, :-1]


def emitted_law(
    rule: CoinRule, trees: list[DrawnTree], tree: TokenTree, target: Table, *, every: bool = False
) -> Law:
    """Law of the new tokens of one step, over all trees and all outcomes of the coins.

    A coin is 0 or just below 1. The first stands for all coins below what it is compared with,
    the second for all others, so the chances of a node to be accepted or not are the weights of
    the two. The root, which is always kept, has coin 0.

    Args:
        every: go through all 2^(N - 1) ways the coins may fall even where fewer will do.

    Raises:
        RuntimeError: something that is no probability, or outcomes that do not add up to 1.
    """
    at_nodes = target_at_nodes(trees, target)
    if tree.proposal is not None:
        at_nodes = at_nodes.to(tree.proposal.probs.dtype)
    drawn = torch.tensor([one.probability for one in trees], dtype=torch.float64)
    row, coins, weight = _outcomes(rule, tree, at_nodes, drawn, every)
    law: Law = {}
    for part in torch.arange(len(row)).split(ROWS):
        rows = row[part]
        path, length, rest = rule.judge(take_rows(tree, rows), at_nodes[rows], coins[part])
        rest = rest.double()
        _require(bool((rest >= 0).all()), f"{rule.name}: a law of the next token below 0")
        mass = weight[part][:, None] * rest / rest.sum(-1, keepdim=True)
        _require(bool(mass.isfinite().all()), f"{rule.name}: no law of the next token")
        add_outcomes(law, tree.tokens[rows], path, length, mass)
    return law


def _outcomes(
    rule: CoinRule, tree: TokenTree, target: Tensor, drawn: Tensor, every: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(row [R], coins [R, N], weight [R]) of all that can happen, given the probability [T] of
    each tree."""
    low = _patterns(tree.nodes, one=rule.name == "traversal" and not every)  # [C, N]
    fixed = None if rule.name == "traversal" else coin_chances(rule, tree, target)
    found = []
    for rows in torch.arange(len(drawn)).split(max(1, ROWS // len(low))):
        row = rows.repeat_interleave(len(low))
        pattern = low.repeat(len(rows), 1)
        coins = torch.where(pattern, 0.0, torch.tensor(BELOW_ONE).double())
        if fixed is None:
            chance = coin_chances(rule, take_rows(tree, row), target[row], coins)
        else:
            chance = fixed[row]
        chance = chance.double()[:, 1:]
        skipped, pattern = chance.isnan(), pattern[:, 1:]
        proper = (skipped & (rule.name in SKIPPING)) | (chance >= 0)
        _require(bool(proper.all()), f"{rule.name}: a chance that is none")
        chance = chance.clamp(max=1.0)  # what rounding makes of certainty
        weight = torch.where(pattern, chance, 1.0 - chance)
        # A coin that nobody looks at is taken for high, so that the outcome counts once.
        weight = torch.where(skipped, (~pattern).double(), weight).prod(-1) * drawn[row]
        some = weight > NEVER
        found.append((row[some], coins[some], weight[some]))
    row, coins, weight = (torch.cat(parts) for parts in zip(*found, strict=True))
    whole = math.isclose(float(weight.sum()), float(drawn.sum()), abs_tol=1e-12)
    _require(whole, f"{rule.name}: outcomes of {float(weight.sum())} in all")
    return row, coins, weight


def _patterns(nodes: int, *, one: bool) -> Tensor:
    """[C, N] bool, which coins are low: all ways, the root's aside, or those with one low coin
    at most, which are enough where the first accepted node ends the walk."""
    if one:
        return torch.eye(nodes, dtype=torch.bool) | (torch.arange(nodes) == 0)
    return torch.tensor(list(itertools.product([True], *[[True, False]] * (nodes - 1))))


def context_for(sampling: SamplingParams, batch: int, seed: int = 0) -> StepContext:
    """What a rule is told of a step for the rows of a batch."""

    def draws(stream: int, count: int) -> Tensor:
        return uniforms(seed, list(range(batch)), [0] * batch, stream, count)

    roots = torch.full((batch,), ROOT_TOKEN)
    return StepContext(sequences=[], roots=roots, sampling=sampling, uniforms=draws)


def add_outcomes(law: Law, tokens: Tensor, path: Tensor, length: Tensor, mass: Tensor) -> None:
    """Add the mass [R, V] of next tokens after the paths."""
    drafted = tokens.gather(1, path[:, 1:])  # [R, depth]
    drafted[torch.arange(path.shape[1] - 1) >= length[:, None] - 1] = -1
    prefixes, group = np.unique(drafted.numpy(), axis=0, return_inverse=True)
    total = np.zeros((len(prefixes), mass.shape[1]))
    np.add.at(total, group.reshape(-1), mass.numpy())
    for prefix, following in zip(prefixes.tolist(), total.tolist(), strict=True):
        for token, probability in enumerate(following):
            key = (*(t for t in prefix if t >= 0), token)
            law[key] = law.get(key, 0.0) + probability


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def extend_law(law: Law, target: Table, count: int) -> Law:
    """Law of the first `count` tokens, where plain sampling goes on after the emitted ones."""
    out: Law = {}
    for tokens, mass in law.items():
        if len(tokens) >= count or mass == 0.0:
            out[tokens[:count]] = out.get(tokens[:count], 0.0) + mass
            continue
        for token, probability in enumerate(target(tokens)):
            for longer, more in extend_law(
                {(*tokens, token): mass * float(probability)}, target, count
            ).items():
                out[longer] = out.get(longer, 0.0) + more
    return out


def distance(law: Law, expected: Law) -> float:
    """The largest difference of a probability."""
    return max(abs(law.get(k, 0.0) - expected.get(k, 0.0)) for k in law.keys() | expected.keys())


def accepted_tokens(law: Law) -> float:
    """Expected number of drafted tokens that a step keeps."""
    return sum(mass * (len(tokens) - 1) for tokens, mass in law.items())
