"""Synthetic acceptance: a coin per child, weighed by the draft probability or a stated rate."""

import torch
from torch import Tensor

from specdec.protocols import AcceptanceRule, StepContext
from specdec.rates import Rates, by_depth
from specdec.sampling import ACCEPT_STREAM, SamplingParams
from specdec.tree import Acceptance, Children, TokenTree, of_parents
from specdec.verifier.coins import choose_after
from specdec.verifier.support import proposal_of
from specdec.verifier.walk import elder_siblings, one_of_siblings, walk


class Synthetic(AcceptanceRule):
    """Accept child x of a node with the drafter's own probability of x, or with stated rates,
    whatever the target says.

    For studies of speed: accepted lengths follow the numbers a drafter names
    (`drafter=synthetic`), or those stated here, while every pass of the target and of the drafter
    is real. Siblings exclude each other: a node of rank r is tried with
    p_r / (1 - sum of its elders' p), so that it is entered with probability p_r. The token after
    the path is the target's own. The outputs are nobody's text, and everything a run leaves says
    so.

    Args:
        rates: the chance to accept a node once its parent is accepted, as `drafter=synthetic`
            takes them; children beyond the ranks of a list are never accepted. None takes the
            drafter's probabilities.

    Raises:
        ValueError: rates that are none.
    """

    name = "synthetic"
    synthetic = True

    def __init__(self, *, rates: Rates | None = None) -> None:
        self.needs_proposal = rates is None
        rows = [] if rates is None else by_depth(rates, "acceptance.rates")
        most = max(map(len, rows), default=0)
        # [D, R + 1]; on the host until the first step, which is none that is captured
        self._rates = torch.tensor(
            [row + [0.0] * (most + 1 - len(row)) for row in rows], dtype=torch.float64
        )

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return "synthetic acceptance does not look at the target"

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        coins = context.uniforms(ACCEPT_STREAM, tree.nodes)
        mass = _told(tree) if self.needs_proposal else self._stated(context, tree)
        taken = coins < one_of_siblings(tree, mass)
        path, length, last = walk(tree, taken, context.kernels)
        return Acceptance(path=path, length=length, next_token=choose_after(context, logits, last))

    def _stated(self, context: StepContext, tree: TokenTree) -> Tensor:
        """[B, N] float64, the rate of each node by depth and rank; 0 for roots and padding."""
        if self._rates.device != tree.tokens.device:
            self._rates = self._rates.to(tree.tokens.device)
        depths, ranks = self._rates.shape
        depth = context.kernels.tree_structure(tree.parents).depths
        rank = elder_siblings(tree).sum(-1)
        place = (depth - 1).clamp(0, depths - 1), rank.clamp(max=ranks - 1)
        return self._rates[place].masked_fill(tree.parents < 0, 0.0)


def _told(tree: TokenTree) -> Tensor:
    """[B, N] float64, the draft probability of each node.

    Raises:
        ValueError: a tree with children carries no proposal.
    """
    proposal = proposal_of(tree, Synthetic.name, torch.float64)
    (mass,) = of_parents(tree, proposal, proposal.probs)
    return mass
