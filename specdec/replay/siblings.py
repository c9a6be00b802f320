"""Children of one node, tried in turn, at many places of many texts at once.

Legend: P texts, n tokens of the longest, T = P * n places, K candidates of the draft, A places
with their histories. A history is what was drawn and rejected among elder siblings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TINY = np.finfo(np.float64).tiny
EXACT = 1 << 40  # histories that are as good as no limit
WHOLE = ("traversal", "hsd")  # modes of `ranks` that judge whole paths


@dataclass(frozen=True, kw_only=True)
class Along:
    """Distributions along texts, at the places where a token follows.

    Args:
        count: [P], tokens of each text.
        own: [P, n] int64, the place of the text's token in the support, -1 if it is not there.
        text: [P, n], the target's probability of the text's token; 1 where there is none.
        target: [P, n, K], the target's probabilities of the draft's candidates.
        draft: [P, n, K], the draft's, the most probable first; of void entries 0.
        deeper: of a draft that depends on where a step begins, what it says there after the text's
            next 1, 2, ... tokens, likewise; None of others.
    """

    count: NDArray[np.int64]
    own: NDArray[np.int64]
    text: Array
    target: Array
    draft: Array
    deeper: "tuple[Along, ...] | None" = None

    def shifted(self, by: int) -> "Along":
        """What stands `by` tokens later; past a text's end no token is in the support."""
        if not by:
            return self
        if self.deeper is not None:
            return self.deeper[by - 1]
        own, text = np.full_like(self.own, -1), np.ones_like(self.text)
        target, draft = np.zeros_like(self.target), np.zeros_like(self.draft)
        own[:, :-by], text[:, :-by] = self.own[:, by:], self.text[:, by:]
        target[:, :-by], draft[:, :-by] = self.target[:, by:], self.draft[:, by:]
        return replace(self, own=own, text=text, target=target, draft=draft)


def own_of(values: Array, own: NDArray[np.int64]) -> Array:
    """[...] the entry of the text's token of values [..., K], 0 where it has none."""
    found = np.take_along_axis(values, own.clip(min=0)[..., None], -1)[..., 0]
    return np.where(own >= 0, found, 0.0)


@dataclass(frozen=True, kw_only=True)
class Trial:
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

    def rows(self, index: NDArray[np.int64]) -> "Trial":
        return Trial(**{one.name: getattr(self, one.name)[index] for one in fields(self)})


def flat(along: Along) -> Trial:
    places = along.text.size
    p = along.target.reshape(places, -1)
    return Trial(
        place=np.arange(places),
        own=along.own.reshape(-1),
        p=p,
        q=along.draft.reshape(places, -1),
        outside=np.clip(1.0 - p.sum(-1), 0.0, None),
        chance=np.ones(places),
        weight=np.ones(places),
    )


def ranks(
    trial: Trial,
    count: int,
    again: bool,
    mode: str,
    histories: int,
    random: np.random.Generator,
) -> Iterator[tuple[Array, Array, NDArray[np.int64]]]:
    """For each child in turn: ([A] the mass of the text's token being this child and, where the
    node is judged alone, entered; [A] the child's weight; [A] its place)."""
    for rank in range(count):
        p, q = own_of(trial.p, trial.own), own_of(trial.q, trial.own)
        if mode in WHOLE:
            ratio = trial.chance * p / np.maximum(q, TINY)
            yield trial.weight * q, np.minimum(1.0, ratio), trial.place
        else:
            mass = q if mode == "target_only" else np.minimum(p, q)
            yield trial.weight * mass, np.ones_like(mass), trial.place
        if rank + 1 < count:
            trial = _rejected(trial, again, mode, histories, random)


def _rejected(
    trial: Trial, again: bool, mode: str, histories: int, random: np.random.Generator
) -> Trial:
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
    if mode == "hsd":  # the coin falls at once, and what is kept is not given up again
        trial = replace(trial, weight=trial.weight * trial.chance, chance=np.ones_like(mass))
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


def _branched(trial: Trial, law: Array, histories: int, random: np.random.Generator) -> Trial:
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


def fewer(
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


def picked(trial: Trial, count: int) -> Iterator[tuple[Array, Array, NDArray[np.int64]]]:
    """As `ranks`, where the child of the greatest p / q is picked: rank r is the text's token and
    the eldest such, no other is of greater ratio. Children of equal ratio go by their place."""
    ratio = np.where(trial.q > 0, trial.p / np.maximum(trial.q, TINY), -1.0)
    order = np.argsort(-ratio, axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), -1)
    own_place = np.take_along_axis(place, trial.own.clip(min=0)[:, None], -1)
    before = np.where(place < own_place, trial.q, 0.0).sum(-1)  # mass of greater ratio
    p, q = own_of(trial.p, trial.own), own_of(trial.q, trial.own)
    worse = np.clip(1.0 - before - q, 0.0, None)
    least = np.clip(1.0 - before, 0.0, None)
    law = least**count - worse**count
    weight = np.minimum(1.0, trial.chance * p / np.maximum(law, TINY))
    for rank in range(count):
        mass = worse**rank * q * least ** (count - 1 - rank)
        yield trial.weight * mass, weight, trial.place
