"""Survival functions: how likely a step keeps at least d drafted tokens, given the text.

Let c be the context at which a step begins and y1 ... yd what the text goes on with. A lossless
rule drafts and keeps that path with some probability K, and of what it keeps the target's share
goes on as the target has it (`docs/acceptance.md`). So, given the text, at least d drafted tokens
are kept with probability S_d = K / (p(y1) ... p(yd)), a function of the distributions along the
text alone, if the shape of the tree does not depend on what is drawn.

Legend: P texts, n tokens of the longest, T = P * n places, K candidates of the draft, A places
with their histories, D levels. A history is what was drawn and rejected among elder siblings.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.kernels.reference import divisor
from specdec.replay.siblings import (
    TINY,
    Along,
    Array,
    fewer,
    flat,
    own_of,
    picked,
    ranks,
)

Node = tuple[int, ...]
Shape = frozenset[Node]

BY_PLACE = ("tokenwise", "recursive_rejection", "target_only", "k_seq")  # a product of factors
BY_PATH = ("block", "traversal", "hsd", "multi_path")  # a weight goes from level to level
SAMPLED = (*BY_PLACE, *BY_PATH)
INDEPENDENT = ("k_seq", "multi_path")  # of draws with replacement alone
CHAINS = ("tokenwise", "block")


def widths_of(shape: Shape) -> dict[Node, int]:
    """The number of children of every node that has any."""
    found: dict[Node, int] = {}
    for node in shape:
        found[node[:-1]] = found.get(node[:-1], 0) + 1
    return found


def survival(
    rule: str,
    shape: Shape,
    along: Along,
    *,
    children: str,
    histories: int = 8,
    seed: int = 0,
) -> Array:
    """S_d at every place of every text, for trees of one shape.

    Args:
        rule: greedy or target_only of top-k children, or one of SAMPLED.
        shape: nodes as paths of ranks of children, the root left out.
        children: as in `specdec.tree.Proposal`.
        histories: of children drawn without replacement from the second rejection on, a sum over
            what was rejected is replaced by the mean of so many draws, unbiased. EXACT sums.
        seed: of those draws.

    Returns:
        [P, n, D + 1]; 1 at depth 0, and 0 where the text ends before.

    Raises:
        ValueError: a rule without survival function for such children.
    """
    check(rule, shape, children)
    if children == "top_k":
        return _deterministic(shape, along)
    again = children == "sample_with_replacement"
    random = np.random.default_rng(seed)
    if rule in BY_PLACE:
        return _by_place(rule, shape, along, again, histories, random)
    return _by_path(rule, shape, along, again, histories, random)


def check(rule: str, shape: Shape, children: str) -> None:
    """Raise ValueError for what has no survival function."""
    if children == "top_k":
        if rule not in ("greedy", "target_only"):
            raise ValueError(f"acceptance={rule}: not lossless for top-k children")
        return
    if rule not in SAMPLED:
        raise ValueError(f"acceptance={rule}: must be one of {', '.join(SAMPLED)}")
    if rule in INDEPENDENT and children != "sample_with_replacement":
        raise ValueError(f"acceptance={rule}: lossless for draws with replacement alone")
    if rule in CHAINS and any(node[-1] for node in shape):
        raise ValueError(f"acceptance={rule}: judges chains alone")


def nodes_by_level(shape: Shape) -> list[list[Node]]:
    """The children of the root first."""
    deepest = max(map(len, shape), default=0)
    return [sorted(node for node in shape if len(node) == d) for d in range(1, deepest + 1)]


def _inside(along: Along, depth: int) -> Array:
    """[P, n] whether a text has so many tokens from a place on."""
    place = np.arange(along.text.shape[1])
    found: Array = (place + depth <= along.count[:, None]).astype(np.float64)
    return found


def _deterministic(shape: Shape, along: Along) -> Array:
    """Is the path in the tree?"""
    known = np.arange(1 + max((node[-1] for node in shape), default=0))  # some may be skipped

    def factor(depth: int, width: int) -> Array:
        return (along.shifted(depth).own[..., None] == known).astype(np.float64)

    return add_products(nodes_by_level(shape), widths_of(shape), factor, along)


# Rules that judge a node by what its parent has: S is a sum of products of factors


def _by_place(
    rule: str,
    shape: Shape,
    along: Along,
    again: bool,
    histories: int,
    random: np.random.Generator,
) -> Array:
    levels, widths = nodes_by_level(shape), widths_of(shape)
    counts = sorted(set(widths.values()))
    found: dict[int, dict[int, Array]] = {}

    def factor(depth: int, width: int) -> Array:
        if depth not in found:
            at = along.shifted(depth)
            found[depth] = place_factors(
                rule, at, counts, again, histories=histories, random=random
            )
        return found[depth][width]

    return add_products(levels, widths, factors_at(factor, along), along)


def factors_at(factor: Callable[[int, int], Array], along: Along) -> Callable[[int, int], Array]:
    """Factors [P, n, rank] by depth and number of children, of those that `factor` works out: of
    each depth, where the draft depends on where a step begins, else of depth 0, which then stand
    later."""
    if along.deeper is not None:
        return factor

    def late(depth: int, width: int) -> Array:
        values = factor(0, width)
        found = np.zeros_like(values)
        found[:, : max(0, values.shape[1] - depth)] = values[:, depth:]
        return found

    return late


def add_products(
    levels: Sequence[Sequence[Node]],
    widths: dict[Node, int],
    factor: Callable[[int, int], Array],
    along: Along,
) -> Array:
    """S_d of factors [P, n, rank], by depth and the number of children of the parent."""
    found = np.zeros((*along.text.shape, len(levels) + 1))
    found[..., 0] = _inside(along, 0)
    masses: dict[Node, Array] = {(): found[..., 0]}
    for depth, nodes in enumerate(levels, 1):
        known = {
            width: factor(depth - 1, width) for width in {widths[node[:-1]] for node in nodes}
        }
        for node in nodes:
            masses[node] = masses[node[:-1]] * known[widths[node[:-1]]][..., node[-1]]
            found[..., depth] += masses[node]
        found[..., depth] *= _inside(along, depth)
    return found


def place_factors(
    rule: str,
    along: Along,
    counts: Sequence[int],
    again: bool,
    *,
    histories: int,
    random: np.random.Generator,
) -> dict[int, Array]:
    """[P, n, rank] for each number of children: the chance that the text's token is drafted as
    the child of that rank and entered there, over the target's probability of it."""
    if rule == "k_seq":
        return {count: _k_seq(along, count) for count in counts}
    most = max(counts, default=0)
    trial = flat(along)
    found = np.zeros((len(trial.weight), most))
    mode = "target_only" if rule == "target_only" else "recursive_rejection"
    for rank, (mass, _, place) in enumerate(ranks(trial, most, again, mode, histories, random)):
        np.add.at(found[:, rank], place, mass)
    if rule != "target_only":
        found /= along.text.reshape(-1)[:, None]
    shaped = found.reshape(*along.text.shape, most)
    return {count: shaped[..., :count] for count in counts}


def _k_seq(along: Along, count: int) -> Array:
    """A token that was drawn several times is entered at its eldest node, whichever of its coins
    fell well."""
    q, p = along.draft, along.target
    draws = torch.full(q.shape[:-1], count)
    ratio = divisor(torch.from_numpy(q), torch.from_numpy(p), draws).numpy()
    once = np.minimum(q, p / ratio[..., None])
    any_ = once.sum(-1)
    own_q, own = own_of(q, along.own), own_of(once, along.own)
    neither = np.clip(1.0 - any_ - (own_q - own), 0.0, None)  # not this token, and rejected
    share = own / np.maximum(any_, TINY)
    found = [
        neither**rank
        * (own + (own_q - own) * share * (1.0 - np.clip(1.0 - any_, 0, 1) ** (count - 1 - rank)))
        for rank in range(count)
    ]
    shaped: Array = np.stack(found, -1) / along.text[..., None]
    return shaped


# Rules that judge a node by the path to it


def _by_path(
    rule: str,
    shape: Shape,
    along: Along,
    again: bool,
    histories: int,
    random: np.random.Generator,
) -> Array:
    levels, widths = nodes_by_level(shape), widths_of(shape)
    shapes, mode = along.text.shape, "hsd" if rule == "hsd" else "traversal"
    found = np.zeros((*shapes, len(levels) + 1))
    found[..., 0] = _inside(along, 0)
    flats = [flat(along.shifted(depth)) for depth in range(len(levels))]
    texts = [along.shifted(depth).text.reshape(-1) for depth in range(len(levels))]
    places = along.text.size

    def enter(node: Node, place: NDArray[np.int64], drawn: Array, weight: Array) -> None:
        """Children of a node that was drawn with these masses, over the target's probability."""
        depth, count = len(node), widths.get(node, 0)
        if not count or not len(place):
            return
        trial = replace(flats[depth].rows(place), chance=weight, weight=drawn, place=place)
        tried = (
            picked(trial, count)
            if rule == "multi_path"
            else ranks(trial, count, again, mode, histories, random)
        )
        for rank, (mass, own, where) in enumerate(tried):
            mass = mass / texts[depth][where]
            kept = np.bincount(where, mass * own, minlength=places)
            found[..., depth + 1] += kept.reshape(shapes)
            if widths.get((*node, rank)):
                some = np.flatnonzero(mass * own > 0)
                enter((*node, rank), *fewer(where[some], mass[some], own[some], histories, random))

    enter((), np.arange(places), found[..., 0].reshape(-1).copy(), np.ones(places))
    for depth in range(1, len(levels) + 1):
        found[..., depth] *= _inside(along, depth)
    return found
