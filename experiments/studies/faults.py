"""After how many tokens is a fault of an acceptance rule certain, and how often is there an alarm
without one?

    python -m specdec.experiments.studies.faults

On any CPU: in made-up languages of 64 tokens, whose draft is its target with other scores, chains
of three are verified token by token with a fault. For each fault and world the file has the tokens
until each bet of `specdec/lab/bets.py` alone has grown beyond 1 / alpha, and all of them together,
as a run's check has them. Beside them is the test of Kolmogorov and Smirnov in the order of p,
looked at once for each of a few sizes: of a fixed size, it tells what bets lose by being valid
whenever one looks. Then there are audits of rules without a fault, each of a world of its own.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats

from specdec.experiments.figures.faults import faults
from specdec.experiments.figures.markdown import show
from specdec.lab.bets import ALARM, NAMES, Bets, wealths
from specdec.lab.command import Positive, begin, option, run_main, write

VOCABULARY, CONTEXTS, DEPTH = 64, 40, 3
ALPHA = 0.001  # at which a fault is certain
SIZES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)  # of the fixed test
CANDIDATES, EAGER, TEMPERATURE, STALE, LIKELY = 8, 1.1, 0.95, 0.01, 1.02
FAULTS = {
    "none": "none",
    "residual": "residual forgotten: after a rejection the target is drawn from",
    "eager": f"accepts at {EAGER} p / q",
    "cut": f"told of q before the cut to {CANDIDATES} candidates",
    "temperature": f"temperature {TEMPERATURE} in place of 1",
    "stale": f"{STALE:.0%} of tokens from another context",
    "likely": f"the most probable token {LIKELY - 1:.0%} too likely",
}
Array = NDArray[np.float64]


def world(generator: np.random.Generator) -> tuple[Array, Array]:
    """Laws [CONTEXTS, VOCABULARY] of target and draft."""
    scores = 2.0 * generator.normal(size=(CONTEXTS, VOCABULARY))
    other = scores + generator.normal(size=scores.shape)
    target, draft = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in (scores, other))
    return target, draft


def chain(
    generator: np.random.Generator, target: Array, draft: Array, tokens: int, fault: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens that token-wise speculative sampling of chains yields, the contexts they were drawn
    in, and their places in their steps. `fault` is one of FAULTS."""
    drawn, contexts, places, context, place = [], [], [], 0, 0
    for p, q in _laws(target, draft, fault):
        kept, after = False, p[context]
        if fault == "stale" and generator.random() < STALE:
            after = target[generator.integers(CONTEXTS)]
        token = _one(generator, after)  # the bonus
        if place < DEPTH:
            law = q[context]
            told = draft[context] if fault == "cut" else law
            token = _one(generator, law)
            factor = EAGER if fault == "eager" else 1.0
            kept = bool(generator.random() < factor * after[token] / told[token])
            if not kept:
                rest = after if fault == "residual" else np.maximum(after - told, 0.0)
                token = _one(generator, rest)
        drawn.append(token)
        contexts.append(context)
        places.append(place)
        context, place = (7 * context + token) % CONTEXTS, place + 1 if kept else 0
        if len(drawn) == tokens:
            break
    return np.array(drawn), np.array(contexts), np.array(places)


def _laws(target: Array, draft: Array, fault: str) -> Iterator[tuple[Array, Array]]:
    """What tokens and drafts are drawn from, again and again."""
    p, q = target, draft
    if fault == "temperature":
        p = target ** (1 / TEMPERATURE)
    if fault == "likely":
        best = target == target.max(1, keepdims=True)
        p = np.where(best, LIKELY * target, target)
    if fault == "cut":
        q = draft * (draft >= np.sort(draft, 1)[:, -CANDIDATES, None])
    p, q = (laws / laws.sum(1, keepdims=True) for laws in (p, q))
    while True:
        yield p, q


def _one(generator: np.random.Generator, weights: Array) -> int:
    mass = weights.cumsum()
    return int(np.searchsorted(mass, generator.random() * mass[-1], side="right"))


def bets_of(fault: str, seed: int, tokens: int) -> Bets:
    """Bets on the tokens of a world with a fault."""
    generator = np.random.default_rng(seed)
    target, draft = world(generator)
    drawn, contexts, places = chain(generator, target, draft, tokens, fault)
    found = Bets()
    found.add(
        torch.tensor(target[contexts]),
        torch.tensor(drawn),
        generator.random(tokens),
        places,
        torch.tensor(draft[contexts]),
    )
    return found


def certain(bets: Bets) -> dict[str, int | None]:
    """Tokens until each bet has grown beyond 1 / ALPHA, and all together; and the least of SIZES
    at which the fixed test is below ALPHA. None: never."""
    (shares,), (powers,), (events,), (prices,) = bets.shares, bets.powers, bets.events, bets.prices
    grown = wealths(shares, powers, events, prices) >= -np.log(ALPHA)
    found = {
        name: int(column.argmax()) + 1 if column.any() else None
        for name, column in zip(NAMES, grown.T, strict=True)
    }
    found["all"] = bets.found(ALPHA).tokens
    fixed = (n for n in SIZES if n <= len(shares) and _fixed(shares[:n, 0]) < ALPHA)
    found["Kolmogorov-Smirnov"] = next(fixed, None)
    return found


def _fixed(shares: Array) -> float:
    return float(stats.kstest(shares, "uniform").pvalue)


def alarms(audits: int, tokens: int) -> dict[str, Any]:
    """How often there is an alarm where there is no fault: at ALARM, and by p-value."""
    seeds = track(range(audits), description="audits", transient=True)
    found = np.array([bets_of("none", 1000 + n, tokens).found(ALARM).p_value for n in seeds])
    below = {str(p): int((found <= p).sum()) for p in (0.1, 0.01, 0.001)}
    return {"alarms": int((found <= ALARM).sum()), "least": float(found.min()), "below": below}


@dataclass(frozen=True, kw_only=True)
class Options:
    worlds: Positive = option(3, "with each fault")
    tokens: Positive = option(100_000, "of each at most")
    audits: Positive = option(1000, "of worlds without a fault")
    audited: Positive = option(1000, "tokens of each")
    out: Path = option(Path("faults.json"), "result file")


def work(options: Options) -> None:
    torch.set_num_threads(1)
    result = begin(options, torch.device("cpu"))
    result["settings"] |= {"alpha": ALPHA, "alarm": ALARM, "vocabulary": VOCABULARY}
    result["versions"]["scipy"] = version("scipy")
    found = result["faults"] = {}
    for fault, about in FAULTS.items():
        seeds = track(range(options.worlds), description=fault, transient=True)
        worlds = [certain(bets_of(fault, seed, options.tokens)) for seed in seeds]
        found[fault] = {"about": about, "certain": worlds}
    result["clean"] = alarms(options.audits, options.audited)
    write(options.out, result)
    show(faults(result))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
