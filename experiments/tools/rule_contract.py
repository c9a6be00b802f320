"""What an acceptance rule owes; `contract.py` checks it from the command line."""

from typing import Any, get_args

import numpy as np
import torch

from specdec.experiments.studies.rule_laws import (
    Law,
    Table,
    Tokens,
    context_for,
    dirichlet_table,
    distance,
    drawn_trees,
    extend_law,
    take_rows,
    target_at_nodes,
    token_trees,
    widths,
)
from specdec.protocols import AcceptanceRule
from specdec.sampling import SamplingParams, probabilities
from specdec.tree import Acceptance, Children, TokenTree

TINY = 4  # vocabulary of the world in which rules are judged
ROWS = 1 << 14
TOLERANCE = 0.02  # of a probability: five standard errors of ROWS draws


def require(holds: bool, otherwise: str) -> None:
    """Raise AssertionError with this line unless it holds."""
    if not holds:
        raise AssertionError(otherwise)


def check_rule(rule: AcceptanceRule) -> None:
    """Where it claims to be lossless, what it emits follows the target; and what it keeps is a
    path.

    Raises:
        AssertionError: what is broken, in one line.
    """
    for sampling in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.8)):
        for children in get_args(Children):
            claims = rule.lossy(children, sampling) is None and not rule.synthetic
            check_law(rule, children, sampling, claims=claims)


def check_law(
    rule: AcceptanceRule, children: Children, sampling: SamplingParams, *, claims: bool
) -> None:
    def scores(context: Tokens) -> Any:
        return 1.5 * np.random.default_rng([7, *(t + 1 for t in context)]).normal(size=TINY)

    def target(context: Tokens) -> Any:
        return probabilities(torch.tensor(scores(context)), sampling).numpy()

    draft: Table = dirichlet_table(8, TINY)
    shape = widths(1, 1) if rule.chains else widths(2, 1)
    trees = drawn_trees(shape, 2, draft, children)
    chances = torch.tensor([tree.probability for tree in trees], dtype=torch.float64).cumsum(0)
    places = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
    row = torch.searchsorted(chances, places).clamp(max=len(trees) - 1)
    tree = take_rows(token_trees(trees, draft, children, compact=True), row)
    logits = target_at_nodes(trees, scores)[row]
    kept = rule.accept(context_for(sampling, ROWS, seed=5), tree, logits)
    check_paths(rule.name, tree, kept)
    if claims:
        law = extend_law(emitted(tree, kept), target, 2)
        off = distance(law, extend_law({(): 1.0}, target, 2))
        require(
            off < TOLERANCE,
            f"{rule.name}: claims to be lossless for children={children} at temperature "
            f"{sampling.temperature:g}, and a chance is off by {off:.3f}",
        )


def check_paths(name: str, tree: TokenTree, kept: Acceptance) -> None:
    inside = torch.arange(kept.path.shape[1]) < kept.length[:, None]
    require(bool((kept.length >= 1).all()), f"{name}: a tree of which not even the root is kept")
    require(bool((kept.path[:, 0] == 0).all()), f"{name}: a path that does not begin at the root")
    parents = tree.parents.long().gather(1, kept.path[:, 1:])
    steps = (parents == kept.path[:, :-1]) | ~inside[:, 1:]
    require(bool(steps.all()), f"{name}: a path that does not go from parent to child")


def emitted(tree: TokenTree, kept: Acceptance) -> Law:
    """How often each sequence of new tokens came."""
    tokens = kept.new_tokens(tree)
    tokens[torch.arange(tokens.shape[1]) >= kept.length[:, None]] = -1
    found, counts = np.unique(tokens.numpy(), axis=0, return_counts=True)
    rows = zip(found.tolist(), counts.tolist(), strict=True)
    return {tuple(t for t in row if t >= 0): count / len(tokens) for row, count in rows}
