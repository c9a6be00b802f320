"""Survival functions: how likely a step keeps at least d drafted tokens, given the text.

Let c be the context at which a step begins and y1 ... yd what the text goes on with. A lossless
rule drafts and keeps that path with some probability K, and of what it keeps the target's share
goes on as the target has it (`docs/acceptance.md`). So, given the text, at least d drafted tokens
are kept with probability S_d = K / (p(y1) ... p(yd)), a function of the distributions along the
text alone, if the shape of the tree does not depend on what is drawn.

Legend: P texts, n tokens of the longest, T = P * n places, K candidates of the draft, A places
with their histories, D levels. A history is what was drawn and rejected among elder siblings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Node = tuple[int, ...]
TINY = np.finfo(np.float64).tiny
EXACT = 1 << 40  # histories that are as good as no limit

BY_PLACE = ("tokenwise", "recursive_rejection", "target_only", "k_seq")  # a product of factors
BY_PATH = ("block", "traversal", "multi_path")  # a weight goes from level to level
SAMPLED = (*BY_PLACE, *BY_PATH)
INDEPENDENT = ("k_seq", "multi_path")  # of draws with replacement alone
CHAINS = ("tokenwise", "block")


@dataclass(frozen=True, kw_only=True)
class Along:
    """Distributions along texts, at the places where a token follows.

    Args:
        count: [P], tokens of each text.
        own: [P, n] int64, the place of the text's token in the support, -1 if it is not there.
        text: [P, n], the target's probability of the text's token; 1 where there is none.
        target: [P, n, K], the target's probabilities of the draft's candidates.
        draft: [P, n, K], the draft's, the most probable first; of void entries 0.
    """

    count: NDArray[np.int64]
    own: NDArray[np.int64]
    text: Array
    target: Array
    draft: Array

    def shifted(self, by: int) -> "Along":
        """What stands `by` tokens later; past a text's end no token is in the support."""
        if not by:
            return self
        own, text = np.full_like(self.own, -1), np.ones_like(self.text)
        target, draft = np.zeros_like(self.target), np.zeros_like(self.draft)
        own[:, :-by], text[:, :-by] = self.own[:, by:], self.text[:, by:]
        target[:, :-by], draft[:, :-by] = self.target[:, by:], self.draft[:, by:]
        return replace(self, own=own, text=text, target=target, draft=draft)


def widths_of(shape: frozenset[Node]) -> dict[Node, int]:
    """The number of children of every node that has any."""
    found: dict[Node, int] = {}
    for node in shape:
        found[node[:-1]] = found.get(node[:-1], 0) + 1
    return found


def survival(
    rule: str,
    shape: frozenset[Node],
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


def check(rule: str, shape: frozenset[Node], children: str) -> None:
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


def _levels(shape: frozenset[Node]) -> list[list[Node]]:
    deepest = max(map(len, shape), default=0)
    return [sorted(node for node in shape if len(node) == d) for d in range(1, deepest + 1)]


def _inside(along: Along, depth: int) -> Array:
    """[P, n] whether a text has so many tokens from a place on."""
    place = np.arange(along.text.shape[1])
    found: Array = (place + depth <= along.count[:, None]).astype(np.float64)
    return found


def _deterministic(shape: frozenset[Node], along: Along) -> Array:
    """Is the path in the tree?"""
    levels = _levels(shape)
    found = np.zeros((*along.text.shape, len(levels) + 1))
    found[..., 0] = _inside(along, 0)
    masses: dict[Node, Array] = {(): found[..., 0]}
    for depth, nodes in enumerate(levels, 1):
        own = along.shifted(depth - 1).own
        for node in nodes:
            masses[node] = masses[node[:-1]] * (own == node[-1])
            found[..., depth] += masses[node]
        found[..., depth] *= _inside(along, depth)
    return found


# Rules that judge a node by what its parent has: S is a sum of products of factors


def _by_place(
    rule: str,
    shape: frozenset[Node],
    along: Along,
    again: bool,
    histories: int,
    random: np.random.Generator,
) -> Array:
    levels, widths = _levels(shape), widths_of(shape)
    factors = place_factors(
        rule, along, sorted(set(widths.values())), again, histories=histories, random=random
    )
    return add_products(levels, widths, factors, along)


def add_products(
    levels: Sequence[Sequence[Node]],
    widths: dict[Node, int],
    factors: dict[int, Array],
    along: Along,
) -> Array:
    """S_d of factors [P, n, rank], by the number of children of the parent."""
    found = np.zeros((*along.text.shape, len(levels) + 1))
    found[..., 0] = _inside(along, 0)
    masses: dict[Node, Array] = {(): found[..., 0]}
    for depth, nodes in enumerate(levels, 1):
        late: dict[int, Array] = {}
        for width, factor in factors.items():
            late[width] = np.zeros_like(factor)
            stop = factor.shape[1] - depth + 1
            late[width][:, : max(0, stop)] = factor[:, depth - 1 :]
        for node in nodes:
            masses[node] = masses[node[:-1]] * late[widths[node[:-1]]][..., node[-1]]
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
    flat = _flat(along)
    found = np.zeros((len(flat.weight), most))
    weight = np.ones(len(flat.weight))
    trial = replace(flat, weight=weight)
    mode = "target_only" if rule == "target_only" else "recursive_rejection"
    for rank, (mass, _, place) in enumerate(_ranks(trial, most, again, mode, histories, random)):
        np.add.at(found[:, rank], place, mass)
    if rule != "target_only":
        found /= along.text.reshape(-1)[:, None]
    shaped = found.reshape(*along.text.shape, most)
    return {count: shaped[..., :count] for count in counts}


def _k_seq(along: Along, count: int) -> Array:
    """A token that was drawn several times is entered at its eldest node, whichever of its coins
    fell well."""
    q, p = along.draft, along.target
    ratio = divisor(q, p, count)
    once = np.minimum(q, p / ratio[..., None])
    any_ = once.sum(-1)
    own_q, own = _own(q, along.own), _own(once, along.own)
    neither = np.clip(1.0 - any_ - (own_q - own), 0.0, None)  # not this token, and rejected
    share = own / np.maximum(any_, TINY)
    found = [
        neither**rank
        * (own + (own_q - own) * share * (1.0 - np.clip(1.0 - any_, 0, 1) ** (count - 1 - rank)))
        for rank in range(count)
    ]
    shaped: Array = np.stack(found, -1) / along.text[..., None]
    return shaped


def divisor(draft: Array, target: Array, count: int) -> Array:
    """[P, n], the divisor of K-SEQ (SpecTr, Sun et al. 2023), by bisection."""
    low, high = np.ones(draft.shape[:-1]), np.full(draft.shape[:-1], float(count))
    for _ in range(60):
        middle = (low + high) / 2
        once = np.minimum(draft, target / middle[..., None]).sum(-1).clip(max=1.0)
        with np.errstate(divide="ignore"):
            enough = -np.expm1(count * np.log1p(-once)) <= middle * once
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def _own(values: Array, own: NDArray[np.int64]) -> Array:
    """[...] the entry of the text's token of values [..., K], 0 where it has none."""
    found = np.take_along_axis(values, own.clip(min=0)[..., None], -1)[..., 0]
    return np.where(own >= 0, found, 0.0)


# The children of one node, tried in turn


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A node at A places with their histories.

    Args:
        place: [A] among T.
        own: [A], as in `Along`.
        p, q: [A, K], what is left of target and draft.
        outside: [A], of the target outside the support.
        chance: [A], the node's weight.
        weight: [A], the mass of this history.
    """

    place: NDArray[np.int64]
    own: NDArray[np.int64]
    p: Array
    q: Array
    outside: Array
    chance: Array
    weight: Array

    def rows(self, index: NDArray[np.int64]) -> "_Trial":
        return _Trial(
            place=self.place[index],
            own=self.own[index],
            p=self.p[index],
            q=self.q[index],
            outside=self.outside[index],
            chance=self.chance[index],
            weight=self.weight[index],
        )


def _flat(along: Along) -> _Trial:
    places = along.text.size
    p = along.target.reshape(places, -1)
    return _Trial(
        place=np.arange(places),
        own=along.own.reshape(-1),
        p=p,
        q=along.draft.reshape(places, -1),
        outside=np.clip(1.0 - p.sum(-1), 0.0, None),
        chance=np.ones(places),
        weight=np.ones(places),
    )


def _ranks(
    trial: _Trial,
    count: int,
    again: bool,
    mode: str,
    histories: int,
    random: np.random.Generator,
) -> Iterator[tuple[Array, Array, NDArray[np.int64]]]:
    """For each child in turn: ([A] the mass of the text's token being this child and, where the
    node is judged alone, entered; [A] the child's weight; [A] its place)."""
    for rank in range(count):
        p, q = _own(trial.p, trial.own), _own(trial.q, trial.own)
        if mode == "traversal":
            ratio = trial.chance * p / np.maximum(q, TINY)
            yield trial.weight * q, np.minimum(1.0, ratio), trial.place
        else:
            mass = q if mode == "target_only" else np.minimum(p, q)
            yield trial.weight * mass, np.ones_like(mass), trial.place
        if rank + 1 < count:
            trial = _rejected(trial, again, mode, histories, random)


def _rejected(
    trial: _Trial, again: bool, mode: str, histories: int, random: np.random.Generator
) -> _Trial:
    """After the next child was rejected, with all below it."""
    law = trial.q
    if mode != "target_only":
        scaled = trial.chance[:, None] * trial.p
        law = np.clip(trial.q - scaled, 0.0, None)
        left = np.clip(scaled - trial.q, 0.0, None)
        outside = trial.chance * trial.outside
        mass = left.sum(-1) + outside
        some = mass > 0
        safe = np.maximum(mass, TINY)
        trial = replace(
            trial,
            p=np.where(some[:, None], left / safe[:, None], trial.p),
            outside=np.where(some, outside / safe, trial.outside),
            chance=np.where(some, mass / np.maximum(mass + 1.0 - trial.chance, TINY), 0.0),
        )
    if again:
        law = law if mode != "target_only" else _without(law, trial.own)
        return replace(trial, weight=trial.weight * law.sum(-1))
    return _branched(trial, _without(law, trial.own), histories, random)


def _without(values: Array, place: NDArray[np.int64]) -> Array:
    """Values [A, K] with 0 at a place of each row, -1 for none."""
    found = values.copy()
    rows = np.flatnonzero(place >= 0)
    found[rows, place[rows]] = 0.0
    return found


def _branched(trial: _Trial, law: Array, histories: int, random: np.random.Generator) -> _Trial:
    """A history for each token that may have been rejected, by [A, K] the mass of each; or for
    some of them, drawn in strata."""
    candidates = law.shape[1]
    most = int(np.bincount(trial.place).max()) if len(trial.place) else 0
    if most * candidates <= histories:
        rows, tokens = np.nonzero(law > 0)
        weight = trial.weight[rows] * law[rows, tokens]
    else:
        each = max(1, histories // max(1, most))
        total = law.sum(-1)
        cumulative = law.cumsum(-1)
        where = (np.arange(each) + random.random((len(law), each))) / each * total[:, None]
        tokens = (cumulative[:, None] <= where[..., None]).sum(-1).clip(max=candidates - 1)
        rows = np.repeat(np.arange(len(law)), each)
        tokens = tokens.reshape(-1)
        weight = (trial.weight * total / each)[rows]
    found = trial.rows(rows)
    q = _without(found.q, tokens)
    sums = q.sum(-1, keepdims=True)
    return replace(found, q=np.where(sums > 0, q / np.maximum(sums, TINY), 0.0), weight=weight)


# Rules that judge a node by the path to it


def _by_path(
    rule: str,
    shape: frozenset[Node],
    along: Along,
    again: bool,
    histories: int,
    random: np.random.Generator,
) -> Array:
    levels, widths = _levels(shape), widths_of(shape)
    shapes = along.text.shape
    found = np.zeros((*shapes, len(levels) + 1))
    found[..., 0] = _inside(along, 0)
    flats = [_flat(along.shifted(depth)) for depth in range(len(levels))]
    texts = [along.shifted(depth).text.reshape(-1) for depth in range(len(levels))]
    places = along.text.size

    def enter(node: Node, place: NDArray[np.int64], drawn: Array, weight: Array) -> None:
        """Children of a node that was drawn with these masses, over the target's probability."""
        depth, count = len(node), widths.get(node, 0)
        if not count or not len(place):
            return
        trial = replace(flats[depth].rows(place), chance=weight, weight=drawn, place=place)
        tried = (
            _picked(trial, count)
            if rule == "multi_path"
            else _ranks(trial, count, again, "traversal", histories, random)
        )
        for rank, (mass, own, where) in enumerate(tried):
            mass = mass / texts[depth][where]
            kept = np.bincount(where, mass * own, minlength=places)
            found[..., depth + 1] += kept.reshape(shapes)
            if widths.get((*node, rank)):
                some = np.flatnonzero(mass * own > 0)
                enter(
                    (*node, rank), *_fewer(where[some], mass[some], own[some], histories, random)
                )

    enter((), np.arange(places), found[..., 0].reshape(-1).copy(), np.ones(places))
    for depth in range(1, len(levels) + 1):
        found[..., depth] *= _inside(along, depth)
    return found


def _fewer(
    place: NDArray[np.int64],
    mass: Array,
    own: Array,
    histories: int,
    random: np.random.Generator,
) -> tuple[NDArray[np.int64], Array, Array]:
    """One history of each place, drawn by its mass, where a sum over all would grow too long."""
    if histories >= EXACT or len(place) == len(np.unique(place)):
        return place, mass, own
    score = np.log1p(-random.random(len(place))) / np.maximum(mass, TINY)  # an exponential race
    order = np.lexsort((-score, place))
    first = np.unique(place[order], return_index=True)[1]
    total: Array = np.bincount(place, mass).astype(np.float64)
    chosen = order[first]
    return place[chosen], total[place[chosen]], own[chosen]


def _picked(trial: _Trial, count: int) -> Iterator[tuple[Array, Array, NDArray[np.int64]]]:
    """As `_ranks`, where the child of the greatest p / q is picked: rank r is the text's token and
    the eldest such, no other is of greater ratio. Children of equal ratio go by their place."""
    ratio = np.where(trial.q > 0, trial.p / np.maximum(trial.q, TINY), -1.0)
    order = np.argsort(-ratio, axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), -1)
    own_place = np.take_along_axis(place, trial.own.clip(min=0)[:, None], -1)
    before = np.where(place < own_place, trial.q, 0.0).sum(-1)  # mass of greater ratio
    p, q = _own(trial.p, trial.own), _own(trial.q, trial.own)
    worse = np.clip(1.0 - before - q, 0.0, None)
    least = np.clip(1.0 - before, 0.0, None)
    law = least**count - worse**count
    weight = np.minimum(1.0, trial.chance * p / np.maximum(law, TINY))
    for rank in range(count):
        mass = worse**rank * q * least ** (count - 1 - rank)
        yield trial.weight * mass, weight, trial.place
