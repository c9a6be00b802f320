"""Relaxed acceptance: a token that is nearly the target's best will do."""

from torch import Tensor

from specdec.protocols import StepContext
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from specdec.verifier.coins import scores_of
from specdec.verifier.likely import LikelyRule, at_parents

OWN = SamplingParams(temperature=1.0)  # the model's own distribution


class Relaxed(LikelyRule):
    """A node is accepted if its token is among the target's `top_n` most probable and at most
    `delta` less probable than the first of them (relaxed acceptance of TensorRT-LLM for the
    thinking phase of DeepSeek-R1). The longest accepted path is kept.

    Lossy at any temperature; at temperature 0 it reads the target's own distribution, that of
    temperature 1. `delta` 0 accepts the most probable token alone.

    Args:
        top_n: tokens that may do.
        delta: how much less probable they may be.

    Raises:
        ValueError: a setting out of range.
    """

    name = "relaxed"

    def __init__(self, *, top_n: int = 10, delta: float = 0.6) -> None:
        if top_n < 1:
            raise ValueError(f"acceptance.top_n={top_n}: must be at least 1")
        if not 0.0 <= delta <= 1.0:
            raise ValueError(f"acceptance.delta={delta}: must be in [0, 1]")
        self.top_n, self.delta = top_n, delta

    def likely(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Tensor:
        sampling = OWN if context.sampling.greedy else context.sampling
        scores, temperature = scores_of(logits, sampling)
        count = min(self.top_n, scores.shape[2])
        best, probs = context.kernels.top_tokens(
            scores.flatten(0, 1), count, temperature=temperature
        )  # [B * N, count] each
        near = (probs >= probs[:, :1] - self.delta) & (probs > 0)  # a filter leaves some none
        shape = *tree.tokens.shape, count
        allowed = at_parents(tree, best.masked_fill(~near, -1).view(shape))
        return (allowed == tree.tokens[..., None]).any(-1)
