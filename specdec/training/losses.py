"""What a drafter's distribution is compared by with the target's.

Legend: M positions, V tokens of the target, VD tokens that the drafter can name; p of the target,
q of the drafter.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("kl", "reverse_kl", "tv", "lk", "ce")
DSPARK = "dspark"  # a tenth of CE, nine tenths of the L1 distance (DeepSpec `dspark/loss.py`)
LK_FALL = 3.0  # how fast KL leaves as drafts are accepted


class Compared(NamedTuple):
    """Of each position [M].

    Args:
        loss: in nats, or a probability with tv.
        overlap: sum of min(p, q), the chance that a draft drawn from q is kept.
        agrees: whether the most probable token is the same, which is kept at temperature 0.
        counts: whether the position is of use: False if the drafter cannot name what it should.
    """

    loss: Tensor
    overlap: Tensor
    agrees: Tensor
    counts: Tensor


def compare(
    drafted: Tensor, wanted: Tensor, labels: Tensor, names: Tensor | None, loss: str
) -> Compared:
    """Compare logits with the target's.

    KL is of p limited to what the drafter can name; where the target's best token is not among
    that, a position does not count (EAGLE-3). The overlap is that with all of p.

    Args:
        drafted: [M, VD] logits.
        wanted: [M, V] logits.
        labels: [M] int64, the token of the text.
        names: [VD] int64 ascending, target ids of the drafter's tokens; None if they are the same.
        loss: one of `LOSSES`, or `DSPARK`; lk as one number for each position is mixed by `lk`.
    """
    drafted, wanted = drafted.float(), wanted.float()
    best = wanted.argmax(-1)
    mass = wanted.logsumexp(-1, keepdim=True)
    named = wanted if names is None else wanted[:, names]
    log_p = named - mass  # of all of p
    log_q = drafted.log_softmax(-1)
    overlap = torch.minimum(log_p, log_q).exp().sum(-1)
    if names is None:
        counts = torch.ones_like(best, dtype=torch.bool)
        agrees = drafted.argmax(-1) == best
    else:
        at = torch.searchsorted(names, best).clamp(max=len(names) - 1)
        counts = names[at] == best
        agrees = names[drafted.argmax(-1)] == best
    if loss in ("ce", DSPARK):
        value, nameable = _of_labels(log_q, labels, names)
        counts = counts & nameable
        if loss == DSPARK:  # p and q are 2 (1 - overlap) apart
            value = 0.1 * value + 0.9 * 2 * (1 - overlap)
    elif loss == "tv":
        value = 1 - overlap
    else:
        value = _divergence(log_p - log_p.logsumexp(-1, keepdim=True), log_q, loss)
    return Compared(value, overlap, agrees, counts)


def _of_labels(log_q: Tensor, labels: Tensor, names: Tensor | None) -> tuple[Tensor, Tensor]:
    """Minus the log probability of the text's token, and whether it has a name."""
    if names is None:
        return F.nll_loss(log_q, labels, reduction="none"), torch.ones_like(
            labels, dtype=torch.bool
        )
    at = torch.searchsorted(names, labels).clamp(max=len(names) - 1)
    return F.nll_loss(log_q, at, reduction="none"), names[at] == labels


def _divergence(log_p: Tensor, log_q: Tensor, loss: str) -> Tensor:
    if loss == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def lk(kl: Tensor, overlap: Tensor, accepted: Tensor) -> Tensor:
    """Expected acceptance itself, with KL as long as little is accepted (LK losses, arXiv
    2602.23881): 1 - overlap and KL, mixed by e^(-3 accepted).

    Args:
        accepted: the mean overlap, which no gradient goes through.
    """
    share = torch.exp(-LK_FALL * accepted.detach())
    return share * kl + (1 - share) * (1 - overlap)


def sequence_means(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of [R, T] over what counts in each sequence [R], and whether anything does [R]."""
    count = mask.sum(1)
    values = torch.where(mask, values, torch.zeros_like(values))
    return values.sum(1) / count.clamp(min=1), count > 0
