"""Acceptance rates of a record, for tree policies that choose shapes by them."""

from functools import cache
from typing import Any

import numpy as np

from specdec.lab.build import sampling_of
from specdec.models.fingerprint import fingerprint
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter
from specdec.replay.chain import starts
from specdec.replay.record import Record, write_json
from specdec.replay.siblings import Along, Array
from specdec.replay.survival import factors_at, place_factors, survival

RATES = "rates.json"
RANKS, LEVELS, ADVANCE = 8, 8, 4
CHAIN = frozenset((0,) * depth for depth in range(1, ADVANCE + 1))


def rates_of(along: Along, children: str) -> Array:
    """[D, R] as in `AcceptanceRates`, of places where steps with a chain begin."""
    again = children == "sample_with_replacement"
    rule = "target_only" if children == "top_k" else "recursive_rejection"

    def factor(depth: int, width: int) -> Array:
        at = along.shifted(depth)
        if children == "top_k":
            return (at.own[..., None] == np.arange(width)).astype(np.float64)
        random = np.random.default_rng(0)
        return place_factors(rule, at, [width], again, histories=8, random=random)[width]

    known = LEVELS if along.deeper is None else min(LEVELS, 1 + len(along.deeper))
    chain = frozenset(node for node in CHAIN if len(node) <= known)
    reached = starts(survival(rule, chain, along, children=children), along.count)
    late = factors_at(cache(factor), along)
    found = np.zeros((LEVELS, RANKS))
    for depth in range(LEVELS):
        mass = 0.0
        if depth < known:
            inside = np.arange(along.text.shape[1]) + depth < along.count[:, None]
            here, reached = late(depth, RANKS), reached * inside
            mass = float(reached.sum())
        if mass > 0:
            found[depth] = (reached[..., None] * here).sum((0, 1)) / mass
            reached = reached * here.sum(-1)
        elif depth:
            found[depth] = found[depth - 1]
    found = found.clip(0.0, 1.0)
    return found / np.maximum(found.sum(-1, keepdims=True), 1.0)


def write_rates(record: Record, drafter: Drafter, target: PagedLM) -> None:
    """`rates.json` in the folder of a record, for tree.rates; none without a drafter's law."""
    if not record.drafts:
        return
    sampling = sampling_of(record.settings)
    candidates = int(getattr(drafter, "candidates", 64))
    kinds = ["top_k"] if sampling.greedy else ["top_k", "sample", "sample_with_replacement"]
    cases: list[dict[str, Any]] = []
    for children in kinds:
        try:
            along = record.along(sampling, candidates=candidates, children=children)
        except ValueError:  # filters that a record cannot follow
            continue
        rates = rates_of(along, children)
        cases.append(
            {
                "children": children,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "rates": (np.floor(rates * 1e6) / 1e6).tolist(),  # never above 1 in all
            }
        )
    lm = drafter.own_model
    about = {
        "settings": {"drafter": drafter.name, "target": target.name, "draft": lm and lm.name},
        "models": {"target": fingerprint(target), "draft": lm and fingerprint(lm)},
    }
    write_json(record.path / RATES, {"cases": cases, **about})
