"""Traversal verification: a tree is judged from the leaves to the root."""

from torch import Tensor

from specdec.verifier.support import SupportRule, Trial
from specdec.verifier.walk import Path, descend_to


class Traversal(SupportRule):
    """Traversal verification (Weng et al. 2025, algorithm 2): block verification for trees.

    The leaves come first: a node is judged for the whole path to it, after all its children have
    been rejected, and what they were rejected for is taken off the target after it and, in part,
    off its own chance. So nothing that lies deeper is given up before it was tried.
    `kernels.traverse` is the algorithm.

    Lossless for sampled children; on chains it is block verification.
    """

    name = "traversal"

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        last, left, _ = traverse(trial)
        return descend_to(trial.tree, last, trial.kernels), left


def traverse(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """What `kernels.traverse` finds."""
    tree, proposal = trial.tree, trial.proposal
    found: tuple[Tensor, Tensor, Tensor] = trial.kernels.traverse(
        tree.tokens,
        tree.parents,
        tree.size,
        proposal.ids,
        proposal.probs,
        trial.target,
        trial.coins,
        repeats=trial.repeats,
    )
    return found
