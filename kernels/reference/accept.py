"""What acceptance rules read off the target's logits.

Legend: B sequences, N nodes, V vocabulary, K draft candidates.
"""

import torch
from torch import Tensor

from specdec.kernels.layout import TargetLaw
from specdec.kernels.reference.draft import LEAST, over, uniforms


def target_law(
    logits: Tensor, size: Tensor, *, temperature: float, entropy: bool = False
) -> TargetLaw:
    """What turns logits into probabilities, at every node.

    Args:
        logits: [B, N, V].
        size: [B] int32, real nodes of each tree; nothing is said of the others.
        temperature: what the logits are divided by, above 0.
        entropy: whether it is wanted.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scores, top = over(wide, temperature), wide.amax(-1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total, temperature = weights.sum(-1), max(temperature, LEAST)
    if not entropy:
        return TargetLaw(top, total, temperature)
    probs = weights / total[..., None]
    return TargetLaw(top, total, temperature, torch.special.entr(probs).sum(-1))


def masses(
    logits: Tensor, law: TargetLaw, ids: Tensor, *, parents: Tensor | None = None
) -> Tensor:
    """[B, N, K]: the target's probabilities of these tokens after each node.

    Args:
        ids: [B, N, K] int64.
        parents: [B, N]; if given, after each node's parent instead (after the root for the root).
    """
    if parents is None:
        found, top, total = logits.gather(2, ids), law.top, law.total
    else:
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        parent = parents.long().clamp(min=0)  # [B, N]
        found = logits[rows[..., None], parent[..., None], ids]
        top, total = law.top[rows, parent], law.total[rows, parent]
    above = (found.to(top.dtype) - top[..., None]) / law.temperature
    return above.exp() / total[..., None]


def draw_rest(
    logits: Tensor,
    law: TargetLaw,
    node: Tensor,
    length: Tensor,
    *,
    ids: Tensor,
    taken: Tensor,
    keys: Tensor,
    stream: int,
) -> Tensor:
    """[B] int64: a token drawn from what a rule has left of the target after a node, by an
    exponential race (`specdec.sampling.race`); from the target itself if nothing is left.

    Args:
        node: [B] int64.
        length: [B] int64; rows where it is 0 are idle and get token 0.
        ids: [B, K] int64, tokens that something was taken off, none twice but for void entries.
        taken: [B, K], how much; 0 for void entries. No token is left with less than nothing.
        keys: [B, 3] int64, seed, sequence and step as the bits of uint64.
        stream: of the race.
    """
    rows = torch.arange(len(node), device=node.device)
    above = (logits[rows, node].to(law.top.dtype) - law.top[rows, node][:, None]) / law.temperature
    whole = above.exp() / law.total[rows, node][:, None]  # [B, V]
    rest = whole.scatter_add(1, ids, -taken.to(whole.dtype)).clamp(min=0.0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, whole).double()
    uniform = uniforms(keys, stream, logits.shape[2])
    arrival = torch.where(rest > 0, -torch.log1p(-uniform) / rest, float("inf"))
    return torch.where(length > 0, arrival.argmin(-1), 0)
