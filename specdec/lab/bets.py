"""Bets that tokens are no draws from the laws they are said to be drawn from.

A bet on a token is fair if, whatever it depends on, that is known before the token is drawn and
its return is 1 in the mean. Capital that is staked again and again is then a martingale, and with
probability 1 - alpha it never exceeds 1 / alpha (Ville), however often one looks and whenever one
stops (e-processes; Ramdas et al., arXiv 2210.01948). Three bets share the capital:

p        the mass of tokens more probable than the drawn one, plus a uniform share of its own, is
         uniform in [0, 1] (Rosenblatt 1952). The bet is on which of `BINS` equal parts it lies in,
         at odds learnt from the tokens before (Krichevsky and Trofimov 1981).
q/p      the same with the vocabulary in the order of q / p, q being what the draft would have
         given: any order will do that is known beforehand. What a rule does wrong mixes the
         target's law with the draft's, which the order of p hardly sees.
q above  the token is one whose q exceeds its p. The fair price is what p says of all of them.

The same is done with the tokens at each place of their step alone, which names the place; half of
the capital is in that. Whether there is a token at some place depends on those before it only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 16
TILTS = np.array([-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0])  # of the odds of `q above`, logs
NAMES = ("p", "q/p", "q above")
BETS = tuple(enumerate(NAMES))

Array = NDArray[np.float64]


class Found(NamedTuple):
    """What became of the capital.

    Attributes:
        p_value: how often it would have grown as far by chance, if all is well; at most.
        tokens: after how many it exceeded 1 / alpha; None if it did not.
        bet: that which won most, and
        place: of the tokens it was on: that of a group, or "all".
    """

    p_value: float
    tokens: int | None
    bet: str
    place: str


@dataclass(slots=True)
class Bets:
    """Tokens as far as bets on them need them, in order."""

    shares: list[Array] = field(default_factory=list)  # [n, 2] in the order of p and of q / p
    above: list[NDArray[np.bool_]] = field(default_factory=list)  # [n] whether q exceeds p
    prices: list[Array] = field(default_factory=list)  # [n] of that
    groups: list[Sequence[str]] = field(default_factory=list)  # [n] of places

    def add(
        self,
        law: Tensor,
        drawn: Tensor,
        share: Array,
        groups: Sequence[str],
        draft: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            law: [n, V] float64.
            drawn: [n] int64, of positive probability.
            share: [n] uniform numbers, independent of the tokens.
            groups: [n] names of places, known before the tokens are.
            draft: [n, V] float64, what a draft says; None if it is not known. It may be any
                function of what stands before.
        """
        uniform = torch.from_numpy(share).to(law)
        by_p = place_in(law, -law, drawn, uniform).cpu().numpy()
        if draft is None:
            nan = np.full(len(share), np.nan)
            self.shares.append(np.stack([by_p, nan], 1))
            self.above.append(np.zeros(len(share), bool))
            self.prices.append(np.zeros(len(share)))
        else:
            ratio = torch.where(law > 0, draft / law, 0.0)
            by_ratio = place_in(law, ratio, drawn, uniform).cpu().numpy()
            higher = draft > law
            price = (law * higher).sum(1).clamp(0.0, 1.0)
            self.shares.append(np.stack([by_p, by_ratio], 1))
            self.above.append(higher.gather(1, drawn[:, None])[:, 0].cpu().numpy())
            self.prices.append(price.cpu().numpy())
        self.groups.append(groups)

    def found(self, alpha: float) -> Found:
        """How it went; with no tokens, nothing was won."""
        if not sum(map(len, self.shares)):
            return Found(1.0, None, NAMES[0], "all")
        shares = np.concatenate(self.shares)
        above, prices = np.concatenate(self.above), np.concatenate(self.prices)
        groups = np.concatenate([np.array(one, dtype=str) for one in self.groups])
        capital = {"all": wealths(shares, above, prices)}  # [n, 3] logs
        for name in dict.fromkeys(groups.tolist()):
            mine = groups == name
            begun = np.zeros((1, len(NAMES)))
            own = wealths(shares[mine], above[mine], prices[mine])
            capital[name] = np.concatenate([begun, own])[np.cumsum(mine)]
        return _found(capital, alpha)


def wealths(shares: Array, above: NDArray[np.bool_], prices: Array) -> Array:
    """[n, 3] logs of what each bet of `NAMES` has made of 1 after each token; arguments as in
    `Bets`. A bet does not look at tokens whose share is not a number."""
    known = ~np.isnan(shares[:, 1])
    tilts = TILTS * above[:, None] - np.log1p(prices[:, None] * np.expm1(TILTS))
    grid = np.cumsum(np.where(known[:, None], tilts, 0.0), axis=0)
    return np.stack([learnt(shares[:, 0]), learnt(shares[:, 1]), _mean(grid)], axis=1)


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
    groups = [_mean(logs) for name, logs in capital.items() if name != "all"]
    whole = _mean(np.stack([_mean(capital["all"]), _mean(np.stack(groups, 1))], 1))
    most = float(whole.max())
    reached = np.flatnonzero(whole >= -np.log(alpha))
    when = int(reached[0]) if len(reached) else int(whole.argmax())
    won = {(name, bet): logs[when, i] for name, logs in capital.items() for i, bet in BETS}
    place, bet = max(won, key=lambda key: won[key])
    first = int(reached[0]) + 1 if len(reached) else None
    return Found(float(np.exp(min(0.0, -most))), first, bet, place)


def _mean(logs: Array) -> Array:
    """[n] logs of the means of rows of exp(logs) [n, K]."""
    means: Array = np.logaddexp.reduce(logs, axis=1) - np.log(logs.shape[1])
    return means


def place_in(law: Tensor, score: Tensor, drawn: Tensor, share: Tensor) -> Tensor:
    """[n] mass of the law [n, V] on tokens of a lower score [n, V] than the drawn one's, plus a
    share [n] of the mass on those of the same."""
    own = score.gather(1, drawn[:, None])
    below, same = ((law * mask).sum(1) for mask in (score < own, score == own))
    return below + share * same
