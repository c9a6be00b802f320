"""Traversal verification: a tree is judged from the leaves to the root."""

from types import ModuleType

from torch import Tensor

from specdec.kernels import reference
from specdec.tree import Proposal, TokenTree
from specdec.verifier.support import SupportRule
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

    def verdict(
        self,
        tree: TokenTree,
        proposal: Proposal,
        target: Tensor,
        coins: Tensor,
        kernels: ModuleType = reference,
    ) -> tuple[Path, Tensor]:
        last, left, _ = kernels.traverse(
            tree.tokens,
            tree.parents,
            tree.size,
            proposal.ids,
            proposal.probs,
            target,
            coins,
            repeats=proposal.children == "sample_with_replacement",
        )
        return descend_to(tree, last, kernels), left
