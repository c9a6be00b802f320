"""What `generate` does to logits before a token is chosen, at every node by the node's own path.

Legend: B sequences, N nodes, V vocabulary, R cache rows, W = ceil(V / 32) words, A new tokens.
"""

import torch
from torch import Tensor

from specdec.kernels.layout import unpack_bits
from specdec.kernels.reference.trees import tree_structure


def process_logits(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    rows: Tensor,
    seen: Tensor,
    counts: Tensor,
    *,
    penalty: float = 1.0,
    bias: Tensor | None = None,
    not_before: Tensor | None = None,
) -> Tensor:
    """Processed logits of all nodes: a bias, then the penalty of Keskar et al. 2019 (CTRL) on what
    the sequence or the node's path has, the node's own token included, then minus infinity for
    what may not come yet.

    Args:
        logits: [B, N, V].
        tokens: [B, N] int64.
        parents: [B, N], as in `tree_structure`.
        rows: [B] int64, the cache row of each sequence.
        seen: [R, W] int32, bit t % 32 of word t // 32 set if the sequence of the row has token t.
        counts: [R, 2] int32, new tokens and tokens in all that each has, the root included.
        penalty: what logits of known tokens are divided by, multiplied if they are negative.
        bias: [V] float32, added first.
        not_before: [2, V] int32, how many new tokens, and tokens in all, there must be before each
            may come.

    Returns:
        [B, N, V] float32 (float64 for float64 logits).
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    batch, nodes, vocab = scores.shape
    structure = tree_structure(parents)
    if bias is not None:
        scores = scores + bias
    if penalty != 1.0:
        ancestors = unpack_bits(structure.ancestors, nodes).int()  # [B, N, N]
        path = torch.zeros(batch, nodes, vocab, dtype=torch.int32, device=scores.device)
        path.scatter_add_(2, tokens[:, None].expand(-1, nodes, -1), ancestors)
        known = unpack_bits(seen[rows], vocab)[:, None] | (path > 0)
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(known, penalised, scores)
    if not_before is not None:
        have = counts[rows][:, None] + structure.depths[..., None]  # [B, N, 2]
        early = (have[..., None] < not_before).any(2)  # [B, N, V]
        scores = scores.masked_fill(early, float("-inf"))
    return scores


def note_tokens(
    seen: Tensor, counts: Tensor, rows: Tensor, tokens: Tensor, length: Tensor
) -> None:
    """Sequences have got new tokens: `seen` and `counts` of `process_logits`, in place.

    Args:
        rows: [B] int64, none twice but where `length` is 0.
        tokens: [B, A] int64.
        length: [B] int64, how many of them count.
    """
    counts.index_add_(0, rows, length.to(counts.dtype)[:, None].expand(-1, 2))
    for place, token in enumerate(tokens.unbind(1)):
        bit = torch.where(place < length, 1 << (token & 31), 0).to(torch.int32)
        seen[rows, token >> 5] |= bit
