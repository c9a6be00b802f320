"""Block verification: the tokens of a chain are accepted together, not one by one."""

from types import ModuleType

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.tree import Proposal, TokenTree
from specdec.verifier.support import of_parents
from specdec.verifier.traversal import Traversal
from specdec.verifier.walk import Path, descend_to


class Block(Traversal):
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

    def verdict(
        self,
        tree: TokenTree,
        proposal: Proposal,
        target: Tensor,
        coins: Tensor,
        kernels: ModuleType = reference,
    ) -> tuple[Path, Tensor]:
        if kernels is not reference:  # on a chain traversal is the same, and has a kernel
            return super().verdict(tree, proposal, target, coins, kernels)
        chance, weight, left = chances(tree, proposal, target)
        node = torch.arange(tree.nodes, device=chance.device)
        kept = (coins < chance) & (node < tree.size[:, None])
        last = (kept * node).amax(1)
        rows = torch.arange(len(last), device=last.device)
        share = weight[rows, last].clamp(min=_tiny(weight))[:, None]
        inner = (last + 1 < tree.size)[:, None]
        rest = torch.where(inner, left[rows, last] / share, target[rows, last])
        return descend_to(tree, last, kernels), rest


def chances(tree: TokenTree, proposal: Proposal, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the coins are compared with.

    Args:
        target: [B, N, K], the target's mass on the support of every node.

    Returns:
        (chance [B, N]: of each node to be the last one kept, once those after it are not;
        weight [B, N];
        left [B, N, K]: max(w * p - q, 0) on the support of every node.)
    """
    weight = weights(tree, proposal, target)
    node = torch.arange(tree.nodes, device=weight.device)
    left = (weight[..., None] * target - proposal.probs).clamp(min=0.0)
    outside = (1.0 - target.sum(-1)).clamp(min=0.0)
    mass = left.sum(-1) + weight * outside
    # Nothing left at weight 1 means that p equals q: whatever was drafted next has weight 1.
    enough = mass + (1.0 - weight)
    chance = torch.where(enough > 0, mass / enough.clamp(min=_tiny(mass)), 0.0)
    return torch.where(node + 1 < tree.size[:, None], chance, weight), weight, left


def weights(tree: TokenTree, proposal: Proposal, target: Tensor) -> Tensor:
    """[B, N]: 1 at the root, then the parent's times p(x) / q(x), at most 1.

    Unrolled: the logarithm is that of the product of all ratios so far, less the largest such
    logarithm up to there, so no loop over the chain is needed.
    """
    p, q = of_parents(tree, proposal, target, proposal.probs)
    ratio = torch.where(p > 0, p / q.clamp(min=_tiny(p)), 0.0)
    ratio = torch.where(tree.parents >= 0, ratio, 1.0)
    total = ratio.log().cumsum(1)
    return (total - total.cummax(1).values).exp()


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
