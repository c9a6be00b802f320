"""Bets that tokens are no draws from the laws they are said to be drawn from.

A bet on a token is fair if, whatever it depends on, that is known before the token is drawn and
its return is 1 in the mean. Capital that is staked again and again is then a martingale, and with
probability 1 - alpha it never exceeds 1 / alpha (Ville), however often one looks and whenever one
stops (e-processes; Ramdas et al., arXiv 2210.01948). Five bets share the capital:

p          the mass of tokens more probable than the drawn one, plus a uniform share of its own, is
           uniform in [0, 1] (Rosenblatt 1952). The bet is on which of `BINS` equal parts it lies
           in, at odds learnt from the tokens before (Krichevsky and Trofimov 1981).
q/p        the same with the vocabulary in the order of q / p, q being what the draft would have
           given: any order will do that is known beforehand. What a rule does wrong mixes the
           target's law with the draft's, which the order of p hardly sees.
q above    the token is one whose q exceeds its p. The fair price is what p says of all of them.
rank 1-4   the token is the one that q has in this place. Children of the most probable tokens are
           tried in this order, so that a fault between siblings shows here; a part for each rank.
surprisal  the token was drawn from a power of p, as another temperature would: what prefers
           likely tokens, or has seen something else, moves the surprisal -log p.

The same is done with the tokens at each place of their step alone, which names the place; half of
the capital is in that. Whether there is a token at some place depends on those before it only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALARM = 1e-4  # of all bets together
BINS = 16
TILTS = np.array([-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0])  # of the odds of events, logs
POWERS = np.array([-0.5, -0.25, -0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.25, 0.5])  # less than 1
STEP, LEVELS = 1 / 4, 128  # surprisals are multiples of STEP nats, the last stands for all beyond
RANKS = 4
EVENTS = ("q above", *(f"rank {rank + 1}" for rank in range(RANKS)))
NAMES = ("p", "q/p", "surprisal", *EVENTS)
SHARES = np.array([1, 1, 1, 1, *[1 / RANKS] * RANKS]) / 5  # of the capital
GROUPS = {"0": range(1), "1": range(1, 2), "2-3": range(2, 4), "4-7": range(4, 8)}
DEEPER = "8+"

Array = NDArray[np.float64]


class Found(NamedTuple):
    """What became of the capital.

    Attributes:
        p_value: how often it would have grown as far by chance, if all is well; at most.
        tokens: after how many it exceeded 1 / alpha; None if it did not.
        bet: that which won most, and
        place: of the tokens it was on: that of a group, or "all".
        places: groups of tokens on which alone bets exceeded 1 / alpha, each by its own capital:
            where in a step tokens are wrong.
    """

    p_value: float
    tokens: int | None
    bet: str
    place: str
    places: tuple[str, ...] = ()


@dataclass(slots=True)
class Bets:
    """Tokens as far as bets on them need them, in order."""

    shares: list[Array] = field(default_factory=list)  # [n, 2] in the order of p and of q / p
    powers: list[Array] = field(default_factory=list)  # [n, POWERS] logs of returns
    events: list[NDArray[np.bool_]] = field(default_factory=list)  # [n, EVENTS] which happened
    prices: list[Array] = field(default_factory=list)  # [n, EVENTS] of them
    places: list[NDArray[np.int64]] = field(default_factory=list)  # [n] in the step

    def add(
        self,
        law: Tensor,
        drawn: Tensor,
        share: Array,
        places: NDArray[np.int64],
        draft: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            law: [n, V] float64.
            drawn: [n] int64, of positive probability.
            share: [n] uniform numbers, independent of the tokens.
            places: [n] of each token in its step, known before the token is.
            draft: [n, V] float64, what a draft says; None if it is not known. It may be any
                function of what stands before.
        """
        uniform = torch.from_numpy(share).to(law)
        by_p = place_in(law, -law, drawn, uniform)
        by_ratio = torch.full_like(by_p, torch.nan)
        happened = torch.zeros(len(law), len(EVENTS), dtype=torch.bool)
        prices = torch.zeros(happened.shape, dtype=torch.float64)  # nothing is won or lost
        if draft is not None:
            ratio = torch.where(law > 0, draft / law, 0.0)
            by_ratio = place_in(law, ratio, drawn, uniform)
            happened, prices = events_of(law, draft, drawn)
        self.shares.append(torch.stack([by_p, by_ratio], 1).cpu().numpy())
        self.powers.append(returns_of_powers(law, drawn))
        self.events.append(happened.cpu().numpy())
        self.prices.append(prices.cpu().numpy())
        self.places.append(places)

    def found(self, alpha: float) -> Found:
        """How it went; with no tokens, nothing was won."""
        if not sum(map(len, self.shares)):
            return Found(1.0, None, NAMES[0], "all")
        parts = self.shares, self.powers, self.events, self.prices
        known: list[NDArray[Any]] = [np.concatenate(part) for part in parts]
        groups = np.array([group_of(place) for place in np.concatenate(self.places)])
        capital = {"all": wealths(*known)}  # [n, NAMES] logs
        for name in (*GROUPS, DEEPER):
            mine = groups == name
            own = wealths(*(part[mine] for part in known))
            begun = np.zeros((1, len(NAMES)))
            capital[name] = np.concatenate([begun, own])[np.cumsum(mine)]
        return _found(capital, alpha)


def wealths(shares: Array, powers: Array, events: NDArray[np.bool_], prices: Array) -> Array:
    """[n, NAMES] logs of what each bet has made of 1 after each token; arguments as in `Bets`. A
    bet does not look at tokens whose share is not a number."""
    tilts = TILTS * events[..., None] - np.log1p(prices[..., None] * np.expm1(TILTS))
    learning = learnt(shares[:, 0]), learnt(shares[:, 1])
    first = np.stack([*learning, _mean(np.cumsum(powers, axis=0))], axis=1)
    return np.concatenate([first, _mean(np.cumsum(tilts, axis=0))], axis=1)


def events_of(law: Tensor, draft: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """[n, EVENTS] whether each of EVENTS happened to the drawn tokens [n], and what the law [n, V]
    says of it."""
    higher = draft > law
    above = higher.gather(1, drawn[:, None])
    best = draft.topk(min(RANKS, draft.shape[1])).indices
    missing = RANKS - best.shape[1]
    happened = torch.cat([above, best == drawn[:, None]], 1)
    prices = torch.cat([(law * higher).sum(1, keepdim=True), law.gather(1, best)], 1)
    pad = torch.nn.functional.pad
    return pad(happened, (0, missing)), pad(prices, (0, missing)).clamp(0.0, 1.0)


def learnt(shares: Array) -> Array:
    """[n] logs of what a bet on one of `BINS` parts of [0, 1] has made of 1, at odds of the parts
    that came before."""
    known = ~np.isnan(shares)
    part = np.clip(np.nan_to_num(shares) * BINS, 0, BINS - 1).astype(int)
    seen = (part[:, None] == np.arange(BINS)) & known[:, None]
    before = np.cumsum(seen, axis=0) - seen
    own = (before * seen).sum(1)
    odds = BINS * (own + 0.5) / (before.sum(1) + BINS / 2)
    logs: Array = np.cumsum(np.where(known, np.log(odds), 0.0))
    return logs


def _found(capital: Mapping[str, Array], alpha: float) -> Found:
    """The capital [n, NAMES] of each place, in logs: half is that of "all"."""
    weights = {name: 0.5 if name == "all" else 0.5 / (len(capital) - 1) for name in capital}
    parts = {name: logs + np.log(SHARES) for name, logs in capital.items()}
    every = np.concatenate([one + np.log(weights[name]) for name, one in parts.items()], axis=1)
    whole: Array = np.logaddexp.reduce(every, axis=1)
    most = float(whole.max())
    reached = np.flatnonzero(whole >= -np.log(alpha))
    when = int(reached[0]) if len(reached) else int(whole.argmax())
    place, bet = divmod(int(every[when].argmax()), len(NAMES))
    return Found(
        p_value=float(np.exp(min(0.0, -most))),
        tokens=when + 1 if len(reached) else None,
        bet=NAMES[bet],
        place=list(capital)[place],
        places=tuple(
            name
            for name, one in parts.items()
            if name != "all" and np.logaddexp.reduce(one, axis=1).max() >= -np.log(alpha)
        ),
    )


def _mean(logs: Array) -> Array:
    """[...] logs of the means of exp(logs) [..., K]."""
    means: Array = np.logaddexp.reduce(logs, axis=-1) - np.log(logs.shape[-1])
    return means


def place_in(law: Tensor, score: Tensor, drawn: Tensor, share: Tensor) -> Tensor:
    """[n] mass of the law [n, V] on tokens of a lower score [n, V] than the drawn one's, plus a
    share [n] of the mass on those of the same."""
    own = score.gather(1, drawn[:, None])
    below, same = ((law * mask).sum(1) for mask in (score < own, score == own))
    return below + share * same


def returns_of_powers(law: Tensor, drawn: Tensor) -> Array:
    """[n, POWERS] logs of what bets on powers of a law [n, V] return for the drawn tokens [n]: the
    law with p ** (1 - power) in place of each p, over the law, with surprisals in steps."""
    level = (-law.log() / STEP).round().clamp(max=LEVELS - 1).long()  # [n, V]
    chances = law.new_zeros(len(law), LEVELS).scatter_add_(1, level, law)
    gains = torch.from_numpy(STEP * POWERS).to(law)[:, None] * torch.arange(LEVELS).to(law)
    mean = (chances @ gains.exp().T).log()  # [n, POWERS]
    own = level.gather(1, drawn[:, None])[:, 0]
    found: Array = (gains.T[own] - mean).cpu().numpy()
    return found


def group_of(place: int) -> str:
    return next((name for name, places in GROUPS.items() if place in places), DEEPER)


def places_of(accepted_lengths: Sequence[int]) -> list[int]:
    """Of each token its place in its step."""
    return list(chain.from_iterable(map(range, accepted_lengths)))
