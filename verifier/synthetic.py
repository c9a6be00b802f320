"""Synthetic acceptance: a coin per child, weighed by the draft probability alone."""

import torch
from torch import Tensor

from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import ACCEPT_STREAM, SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.coins import choose_after
from specdec.verifier.walk import one_of_siblings, walk


class Synthetic(AcceptanceRule):
    """Accept child x of a node with the drafter's own probability of x, whatever the target says.

    For studies of speed: accepted lengths follow the numbers a drafter names
    (`drafter=synthetic`), while every pass of the target is real. Siblings exclude each other: a
    node of rank r is tried with p_r / (1 - sum of its elders' p), so that it is entered with
    probability p_r. The token after the path is the target's own. The outputs are nobody's text,
    and everything a run leaves says so.
    """

    name = "synthetic"
    needs_proposal = True
    synthetic = True

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return "synthetic acceptance does not look at the target"

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        coins = context.uniforms(ACCEPT_STREAM, tree.nodes)
        path, length, last = walk(tree, coins < chances(tree), context.kernels)
        return Acceptance(path=path, length=length, next_token=choose_after(context, logits, last))


def chances(tree: TokenTree) -> Tensor:
    """[B, N] float64: the chance to accept each node once its parent is accepted and its elder
    siblings are not.

    Raises:
        ValueError: a tree with children carries no proposal.
    """
    proposal = tree.proposal
    if proposal is None:
        if tree.depth:
            raise ValueError("acceptance=synthetic: the tree has no draft probabilities")
        return torch.zeros_like(tree.tokens, dtype=torch.float64)
    parent = tree.parents.long().clamp(min=0)[..., None].expand(-1, -1, proposal.ids.shape[2])
    own = proposal.ids.gather(1, parent) == tree.tokens[..., None]  # [B, N, K]
    mass = (proposal.probs.gather(1, parent).double() * own).sum(-1)  # [B, N]
    return one_of_siblings(tree, mass)
