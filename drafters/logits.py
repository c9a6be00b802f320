"""From a drafting model's logits to the candidates of a frontier."""

from torch import Tensor

from specdec.protocols import StepContext, TreePolicy
from specdec.sampling import probabilities


def candidates_of(
    context: StepContext,
    logits: Tensor,
    tree: TreePolicy,
    level: int,
    *,
    candidates: int,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """What `growth.Expand` returns, for logits [B, F, V] after the nodes of a level.

    Args:
        candidates: sampled children are drawn from so many of the most probable tokens,
            renormalised, after temperature and filters.
        vocab: only so many columns count.
    """
    if tree.children == "top_k":
        return _best(context, logits, min(tree.width(level), vocab), 1.0, vocab)
    sampling, count = context.sampling, min(candidates, vocab)
    if sampling.filters or sampling.greedy:
        probs, ids = probabilities(logits[..., :vocab], sampling).topk(count)
    else:
        ids, probs = _best(context, logits, count, sampling.temperature, vocab)
    return ids, probs / probs.sum(-1, keepdim=True)


def _best(
    context: StepContext, logits: Tensor, count: int, temperature: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """The most probable tokens [B, F, count] and their probabilities."""
    ids, probs = context.kernels.top_tokens(
        logits.flatten(0, 1), count, temperature=temperature, vocab=vocab
    )
    shape = *logits.shape[:2], count
    return ids.view(shape), probs.view(shape)
