"""What lossy rules share that keep every node the target finds likely enough."""

import torch
from torch import Tensor

from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.coins import choose_after
from specdec.verifier.walk import deepest, descend_to


class LikelyRule(AcceptanceRule):
    """Keeps the longest path of nodes that are `likely`; the next token is the target's own."""

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return f"{self.name} acceptance prefers what the target finds likely"

    def likely(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Tensor:
        """[B, N] bool: whether the target finds a node likely enough, after its parent."""
        raise NotImplementedError

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        taken = self.likely(context, tree, logits)
        last = deepest(tree, taken, context.kernels)
        path, length, _ = descend_to(tree, last, context.kernels)
        return Acceptance(path=path, length=length, next_token=choose_after(context, logits, last))


def at_parents(tree: TokenTree, values: Tensor) -> Tensor:
    """[B, N, ...] values of each node's parent; the root's own for the root."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, tree.parents.long().clamp(min=0)]
