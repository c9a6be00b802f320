"""Typical acceptance: what the target finds likely enough is kept, more where it is unsure."""

from torch import Tensor

from specdec.protocols import StepContext
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.coins import accept_greedily, scores_of
from specdec.verifier.likely import LikelyRule, at_parents


class Typical(LikelyRule):
    """Typical acceptance (Medusa, Cai et al. 2024, section 2.3.1): a node is accepted if the
    target's probability of its token is above min(epsilon, delta * exp(-H)), where H is the
    entropy of the target there. The longest accepted path is kept.

    Lossy above temperature 0: likely tokens come up more often than the target has them. At
    temperature 0 it is greedy acceptance.

    Args:
        epsilon: a probability that is always enough.
        delta: the share of exp(-H) that is enough; Medusa sets it to the root of epsilon.

    Raises:
        ValueError: a setting out of range.
    """

    name = "typical"

    def __init__(self, *, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not 0.0 < epsilon < 1.0:
            raise ValueError(f"acceptance.epsilon={epsilon}: must be between 0 and 1")
        if not 0.0 < delta < float("inf"):
            raise ValueError(f"acceptance.delta={delta}: must be positive")
        self.epsilon, self.delta = epsilon, delta

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return None if sampling.greedy else super().lossy(children, sampling)

    def likely(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Tensor:
        scores, temperature = scores_of(logits, context.sampling)
        law = context.kernels.target_law(scores, tree.size, temperature=temperature, entropy=True)
        floor = (self.delta * (-law.entropy).exp()).clamp(max=self.epsilon)  # [B, N]
        tokens = tree.tokens[..., None]
        own = context.kernels.masses(scores, law, tokens, parents=tree.parents)[..., 0]
        return own > at_parents(tree, floor)

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        if context.sampling.greedy:
            return accept_greedily(context, tree, logits)
        return super().accept(context, tree, logits)
