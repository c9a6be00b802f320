"""Greedy acceptance: keep what the target would have chosen itself."""

from torch import Tensor

from specdec.protocols import StepContext
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.coins import accept_by_kernel
from specdec.verifier.walk import walk


class Greedy:
    """Accept a node if it is the target's most probable token after its parent (Stern et al.
    2018).

    Lossless at temperature 0, for any children; above 0 it decodes greedily whatever the
    temperature.
    """

    name = "greedy"
    needs_proposal = False

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        if sampling.greedy:
            return None
        return f"greedy acceptance ignores sampling.temperature={sampling.temperature}"

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        if self.name in context.kernels.RULES:
            return accept_by_kernel(self.name, context, tree, logits)
        choice = logits.argmax(dim=-1)  # [B, N]
        parent = tree.parents.long().clamp(min=0)
        path, length, last = walk(tree, tree.tokens == choice.gather(1, parent))
        return Acceptance(
            path=path, length=length, next_token=choice.gather(1, last[:, None])[:, 0]
        )
