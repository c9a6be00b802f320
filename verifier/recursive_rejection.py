"""Recursive rejection: a coin per child, weighed by target over draft, the rejected mass removed
each time."""

import torch
from torch import Tensor

from specdec.tree import TokenTree
from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.walk import Path, at, elder_siblings, walk


class RecursiveRejection(SupportRule):
    """Multi-candidate speculative sampling with the real draft probabilities.

    Child x of a node is accepted with probability min(1, p(x) / q(x)); after a rejection p becomes
    the normalised positive part of p - q and the next child is tried; after the last one a token
    is drawn from what is left of p. Children drawn with replacement keep q (SpecInfer, Miao et al.
    2024, algorithm 2); drawn without replacement, q loses each rejected token and is renormalised
    (Sequoia, Chen et al. 2024, algorithm 2). One child is speculative sampling (Leviathan et al.
    2023).

    Lossless for sampled children. For top-k children it is a common practice and not lossless.
    """

    name = "recursive_rejection"

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        chance, inside, scale = try_children(trial)
        path = walk(trial.tree, trial.coins < chance, trial.kernels)
        left, factor = at(path[2], inside, scale[..., None])
        return path, left / factor


def try_children(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """The chance to accept each node, and what rejecting all children of a node leaves of the
    target.

    Only the K tokens of a proposal's support are touched: outside it the draft has no mass, so
    every step merely rescales the target there.

    Returns:
        (chance [B, N], as in `target_only`;
        inside [B, N, K]: what is left of the target on the support of each node's proposal;
        scale [B, N]: the factor of the target outside the support.)
    """
    tree, proposal = trial.tree, trial.proposal
    children = _children(tree)  # [B, N, R], -1 where there are fewer
    draft, inside = proposal.probs, trial.target  # [B, N, K] each
    outside = (1.0 - inside.sum(-1)).clamp(min=0.0)  # [B, N]
    scale = torch.ones_like(outside)
    chance = torch.zeros_like(outside)
    tiny = torch.finfo(draft.dtype).tiny
    for child in children.unbind(-1):  # [B, N]: the next child of every node
        token = tree.tokens.gather(1, child.clamp(min=0))
        here = (
            (proposal.ids == token[..., None]) & (draft > 0) & (child >= 0)[..., None]
        )  # [B, N, K]
        p, q = (inside * here).sum(-1), (draft * here).sum(-1)
        ratio = torch.where(p > 0, p / q.clamp(min=tiny), 0.0).clamp(max=1.0)
        chance = chance.scatter_add(1, child.clamp(min=0), ratio.masked_fill(child < 0, 0.0))

        left = (inside - draft).clamp(min=0.0)
        mass = left.sum(-1) + outside
        # Nothing left means p equals q: the child was accepted for certain, and no residual is
        # ever asked for.
        rejected = (child >= 0) & (mass > 0)
        inside = torch.where(rejected[..., None], left / mass.clamp(min=tiny)[..., None], inside)
        factor = torch.where(rejected, 1.0 / mass.clamp(min=tiny), 1.0)
        outside, scale = outside * factor, scale * factor
        if not trial.repeats:
            remaining = draft.masked_fill(here, 0.0)
            draft = remaining / remaining.sum(-1, keepdim=True).clamp(min=tiny)
    return chance, inside, scale


def _children(tree: TokenTree) -> Tensor:
    """[B, N, R] int64: the children of every node in the order they are tried, -1 where there are
    fewer than R."""
    rank = elder_siblings(tree).sum(-1)  # [B, N]
    most = int(rank.max()) + 1 if tree.nodes > 1 else 0
    batch, nodes = tree.tokens.shape
    table = torch.full((batch, (nodes + 1) * most), -1, dtype=torch.int64, device=rank.device)
    # Roots and padding, who are nobody's children, go to an extra last row.
    parent = torch.where(tree.parents >= 0, tree.parents.long(), nodes)
    index = torch.arange(nodes, device=rank.device).expand(batch, -1)
    if most:
        table.scatter_(1, parent * most + rank, index)
    return table.view(batch, nodes + 1, most)[:, :nodes]
