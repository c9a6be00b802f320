"""Multi-path block verification: the most promising path of a tree is judged as a block."""

from dataclasses import replace

import torch
from torch import Tensor

from specdec.tree import PADDING, TokenTree, of_parents
from specdec.verifier.block import judge_chains
from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.walk import Path, child_counts, elder_siblings, walk


class MultiPath(SupportRule):
    """Of the children of every node, drawn independently, the one with the greatest p(x) / q(x) is
    picked, from the root to a leaf, and the path is judged by block verification (after greedy
    multi-path block verification, Thomas and Pal 2026, here for the children of every node).

    What block verification needs is the law of what it judges: of k draws the token x is picked
    with probability (1 - c)^k - (1 - c - q(x))^k, where c is the mass of q on the tokens of
    greater ratio. That law is a function of p, q and k alone, so the path is a chain drawn from
    it, and as lossless as any. Picking makes up for what a draft lacks; where the draft is right
    already it spoils it.

    Lossless for children drawn with replacement.
    """

    name = "multi_path"
    draws = ("sample_with_replacement",)

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        path, chain = pick(trial)
        (kept, length, last), left = judge_chains(chain)
        return (path.gather(1, kept), length, path.gather(1, last[:, None])[:, 0]), left


def pick(trial: Trial) -> tuple[Tensor, Trial]:
    """([B, depth + 1], the nodes that are picked, from the root on, as in `Path`; what is left to
    be judged: the chain of them, drawn from the law that the picked child of each node has.)"""
    tree, proposal = trial.tree, trial.proposal
    (path, length, _), law = _pick(trial)
    rows = torch.arange(len(path), device=path.device)[:, None]
    steps = torch.arange(path.shape[1], device=path.device)
    above = torch.where(steps < length[:, None], steps - 1, PADDING)
    chain = TokenTree(
        tokens=tree.tokens[rows, path],
        parents=above.to(tree.parents.dtype),
        size=length,
        depth=tree.depth,
    )
    return path, replace(
        trial,
        tree=chain,
        proposal=replace(proposal, ids=proposal.ids[rows, path], probs=law[rows, path]),
        target=trial.target[rows, path],
        coins=trial.coins.gather(1, path),
    )


def _pick(trial: Trial) -> tuple[Path, Tensor]:
    """(the path of picked children; [B, N, K], the law that the picked child of each node has.)"""
    tree, draft = trial.tree, trial.proposal.probs
    count = child_counts(tree)
    ratio = torch.where(draft > 0, trial.target / draft, -1.0)  # void entries come last
    ordered = ratio.argsort(dim=-1, descending=True, stable=True)
    before = draft.gather(2, ordered).cumsum(-1)
    # [B, N, K] mass of the tokens that come after, with a token itself and without it
    after = (1.0 - before).clamp(min=0.0)
    least = torch.nn.functional.pad(after, (1, 0), value=1.0)
    best = (least ** count[..., None]).diff(dim=-1).neg()
    law = torch.zeros_like(draft).scatter(2, ordered, best).masked_fill(draft <= 0, 0.0)

    place = torch.zeros_like(ordered).scatter(
        2, ordered, torch.arange(draft.shape[2], device=draft.device).expand_as(ordered)
    )
    (own,) = of_parents(
        tree, trial.proposal, place
    )  # [B, N] a node's place among its parent's tokens
    siblings = elder_siblings(tree)
    siblings = siblings | siblings.mT
    beaten = (siblings & (own[:, None] < own[..., None])).any(-1)
    return walk(tree, ~beaten, trial.kernels), law
