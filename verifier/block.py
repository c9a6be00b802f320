"""Block verification: the tokens of a chain are accepted together, not one by one."""

import torch
from torch import Tensor

from specdec.tree import of_parents
from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.traversal import traverse
from specdec.verifier.walk import Path, at, descend_to


class Block(SupportRule):
    """Block verification of chains (Sun et al. 2024, algorithm 2).

    A node has the weight w = min(1, w' * p(x) / q(x)), where w' is that of its parent, and the
    longest beginning of the chain is kept whose coin falls below m / (m + 1 - w); m is the mass of
    max(w * p - q, 0) after it, the law of the next token. At the end of the chain the coin is
    compared with w, and the next token follows the target. What one token lacks the ones before it
    may make up for, so the expected length is at least that of token-wise sampling.

    Lossless for sampled children of chains, and of all rules that look at nothing else the longest
    on average (theorem 2 of the paper).
    """

    name = "block"
    chains = True

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        return judge_chains(trial)


def judge_chains(trial: Trial) -> tuple[Path, Tensor]:
    """The verdict of block verification."""
    if trial.kernels.LOOKS:
        last, left = _all_at_once(trial)
    else:  # on a chain traversal is the same, and has a kernel
        last, left, _ = traverse(trial)
    return descend_to(trial.tree, last, trial.kernels), left


def _all_at_once(trial: Trial) -> tuple[Tensor, Tensor]:
    """(last [B], left [B, K]) as in `traverse`."""
    chance, weight, left = chances(trial)
    size = trial.tree.size
    node = torch.arange(trial.tree.nodes, device=chance.device)
    kept = (trial.coins < chance) & (node < size[:, None])
    last = (kept * node).amax(1)
    rest, share, whole = at(last, left, weight[..., None], trial.target)
    inner = (last + 1 < size)[:, None]
    return last, torch.where(inner, rest / share.clamp(min=_tiny(share)), whole)


def chances(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """What the coins are compared with.

    Returns:
        (chance [B, N]: of each node to be the last one kept, once those after it are not;
        weight [B, N];
        left [B, N, K]: max(w * p - q, 0) on the support of every node.)
    """
    tree, target, weight = trial.tree, trial.target, weights(trial)
    node = torch.arange(tree.nodes, device=weight.device)
    left = (weight[..., None] * target - trial.proposal.probs).clamp(min=0.0)
    outside = (1.0 - target.sum(-1)).clamp(min=0.0)
    mass = left.sum(-1) + weight * outside
    # Nothing left at weight 1 means that p equals q: whatever was drafted next has weight 1.
    enough = mass + (1.0 - weight)
    chance = torch.where(enough > 0, mass / enough.clamp(min=_tiny(mass)), 0.0)
    return torch.where(node + 1 < tree.size[:, None], chance, weight), weight, left


def weights(trial: Trial) -> Tensor:
    """[B, N]: 1 at the root, then the parent's times p(x) / q(x), at most 1.

    Unrolled: the logarithm is that of the product of all ratios so far, less the largest such
    logarithm up to there, so no loop over the chain is needed.
    """
    p, q = of_parents(trial.tree, trial.proposal, trial.target, trial.proposal.probs)
    ratio = torch.where(p > 0, p / q.clamp(min=_tiny(p)), 0.0)
    ratio = torch.where(trial.tree.parents >= 0, ratio, 1.0)
    total = ratio.log().cumsum(1)
    return (total - total.cummax(1).values).exp()


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
