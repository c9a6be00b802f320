"""K-SEQ: independent draws are tried one after the other with one chance for all."""

import torch
from torch import Tensor

from specdec.tree import of_parents
from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.walk import Path, at, child_counts, walk


class KSeq(SupportRule):
    """K-SEQ (SpecTr, Sun et al. 2023, algorithm 3), applied to the children of every node.

    Child x is accepted with probability min(1, p(x) / (r * q(x))), whatever became of its elder
    siblings; r is the least divisor for which the mass so accepted stays below p everywhere
    (`kernels.divisor`). After the last child the next token is drawn from what p has more than
    that. Of a single level it accepts at least
    1 - 1/e times as many tokens as optimal transport.

    Lossless for children drawn with replacement. A token drawn twice is tried twice; what is
    entered is the eldest of its nodes, which is the one that has children.
    """

    name = "k_seq"
    draws = ("sample_with_replacement",)

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        chance, divisor, count = chances(trial)
        path = walk(trial.tree, trial.coins < chance, trial.kernels)
        tiny = torch.finfo(chance.dtype).tiny
        p, q, r, draws = at(
            path[2], trial.target, trial.proposal.probs, divisor[..., None], count[..., None]
        )
        once = torch.minimum(q, p / r)  # accepted by one draw
        overlap = once.sum(-1, keepdim=True)
        ever = 1.0 - (1.0 - overlap).clamp(min=0.0) ** draws  # by any of them; 0 for a leaf
        return path, (p - once * ever / overlap.clamp(min=tiny)).clamp(min=0.0)


def chances(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """What the coins are compared with.

    Returns:
        (chance [B, N]: of each node once its parent is accepted and its elder siblings are not;
        divisor [B, N] of the children of every node;
        count [B, N]: how many children it has.)
    """
    tree, draft = trial.tree, trial.proposal.probs
    count = child_counts(tree)
    divisor = trial.kernels.divisor(draft, trial.target, count)
    p, q = of_parents(tree, trial.proposal, trial.target, draft)
    above = divisor.gather(1, tree.parents.long().clamp(min=0)) * q
    chance = torch.where(p > 0, p / above.clamp(min=torch.finfo(p.dtype).tiny), 0.0)
    return chance.clamp(max=1.0), divisor, count
