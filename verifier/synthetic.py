"""Synthetic acceptance: a coin per child, weighed by the draft probability alone."""

import torch
from torch import Tensor

from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import ACCEPT_STREAM, SamplingParams
from specdec.tree import Acceptance, Children, TokenTree, of_parents
from specdec.verifier.coins import choose_after
from specdec.verifier.support import proposal_of
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
    proposal = proposal_of(tree, Synthetic.name, torch.float64)
    return one_of_siblings(tree, *of_parents(tree, proposal, proposal.probs))
