"""Hierarchical verification: line after line of a tree, each as a block."""

import torch
from torch import Tensor

from specdec.tree import TokenTree
from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.walk import Path, descend_to, elder_siblings


class Hsd(SupportRule):
    """Hierarchical speculative decoding (Zhou et al. 2026, arXiv 2601.05724, algorithms 2 and 3).

    The line of eldest children from the root is judged from its end: kept is the longest beginning
    whose coin falls below the share of what the target lacks in what the draft has too much of,
    both counted below that node with ratios of joint probabilities that are capped at the greatest
    one before. What is left of the target there is the new target, and the line of the next child
    of that node is judged in the same way, until no child is left.

    Capped as in definition 5 of the paper a ratio is the weight of block verification, and the
    share its chance: on chains the two are the same rule, against theorem 7 of the paper, which
    has this one keep more (docs/acceptance.md). On trees algorithm 3 never gives up what it has
    kept, so children beside the line are lost with a node that a coin turns down before they were
    tried; `traversal` tries them first.

    Lossless for sampled children.
    """

    name = "hsd"

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        chance, left = judge_lines(trial)
        last = _end(trial, trial.coins < chance)
        rows = torch.arange(len(last), device=last.device)
        return descend_to(trial.tree, last, trial.kernels), left[rows, last]


def judge_lines(trial: Trial) -> tuple[Tensor, Tensor]:
    """What the coins are compared with, which depends on no coin: whoever looks at that of a node
    has turned down all that is tried before it. (Long because it is one loop over the nodes.)

    Returns:
        (chance [B, N]: of each node to be where its line ends, once those after it are not;
        left [B, N, K]: what is left of the target on the support of each node when all its
        children are turned down, where all of it is left outside.)
    """
    tree, proposal = trial.tree, trial.proposal
    rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
    inside, draft = trial.target.clone(), proposal.probs.clone()  # [B, N, K] each
    tiny = torch.finfo(inside.dtype).tiny
    outside = (1.0 - inside.sum(-1)).clamp(min=0.0)  # [B, N]
    scale, weight = torch.ones_like(outside), torch.ones_like(outside)
    chance, eldest = torch.ones_like(outside), _eldest(tree)
    for node in range(1, tree.nodes):
        real, parent = tree.parents[:, node] >= 0, tree.parents[:, node].long().clamp(min=0)
        at = rows, parent
        p, q, beyond = inside[at], draft[at], outside[at]
        # The line of a younger child begins anew: its parent is kept.
        w = torch.where(eldest[:, node], weight[at], 1.0)
        here = (proposal.ids[at] == tree.tokens[:, node, None]) & (q > 0)
        px, qx = (p * here).sum(1), (q * here).sum(1)
        ratio = torch.where(px > 0, w * px / qx.clamp(min=tiny), 0.0).clamp(max=1.0)
        weight[:, node] = chance[:, node] = ratio

        lacking = (w[:, None] * p - q).clamp(min=0.0)
        mass = lacking.sum(1) + w * beyond
        share = mass.clamp(min=tiny)
        ends = mass / (mass + (1.0 - w)).clamp(min=tiny)
        chance[at] = torch.where(eldest[:, node], ends, chance[at])
        # Nothing left: the coin never stops here, or p equals q and the child is kept for certain.
        some = real & (mass > 0)
        inside[at] = torch.where(some[:, None], lacking / share[:, None], p)
        outside[at] = torch.where(some, w * beyond / share, beyond)
        scale[at] = torch.where(some, scale[at] * w / share, scale[at])
        if not trial.repeats:
            rest = q.masked_fill(here, 0.0)
            rest = rest / rest.sum(1, keepdim=True).clamp(min=tiny)
            draft[at] = torch.where(real[:, None], rest, q)
    return chance, inside / scale.clamp(min=tiny)[..., None]


def _end(trial: Trial, taken: Tensor) -> Tensor:
    """[B] int64: the node at which the walk ends, where the coins take `taken` ([B, N] bool)."""
    tree = trial.tree
    parents, eldest = tree.parents.long(), _eldest(tree)
    rows = torch.arange(len(parents), device=parents.device)
    node = torch.arange(tree.nodes, device=parents.device).expand_as(parents)
    head = node.clone()
    for i in range(1, tree.nodes):
        head[:, i] = torch.where(eldest[:, i], head[rows, parents[:, i].clamp(min=0)], i)
    # Children come after their parents, so the deepest node of a line is its last.
    kept = torch.where(taken & (parents >= 0), node, -1)
    reach = torch.full_like(head, -1).scatter_reduce(1, head, kept, "amax")
    last = reach[:, 0].clamp(min=0)
    for _ in range(tree.depth):
        lines = (parents == last[:, None]) & (reach >= 0)  # reach is of heads alone
        further = reach[rows, lines.int().argmax(1)]
        last = torch.where(lines.any(1), further, last)
    return last


def _eldest(tree: TokenTree) -> Tensor:
    """[B, N] bool: whether a node is the first child of its parent."""
    return (tree.parents >= 0) & ~elder_siblings(tree).any(-1)
