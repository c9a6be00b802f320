"""Greedy acceptance: keep what the target would have chosen itself."""

from torch import Tensor

from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.coins import accept_greedily


class Greedy(AcceptanceRule):
    """Accept a node if it is the target's most probable token after its parent (Stern et al.
    2018).

    Lossless at temperature 0, for any children; above 0 it decodes greedily whatever the
    temperature.
    """

    name = "greedy"

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        if sampling.greedy:
            return None
        return f"greedy acceptance ignores sampling.temperature={sampling.temperature}"

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        return accept_greedily(context, tree, logits)
