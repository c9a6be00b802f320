"""A shorter way through the models whose structure is known: the same numbers with less work on
the host.

A small model on a CPU, or any model at batch 1, spends much of a step between the operations. The
general way, `model(...)`, stays for every other architecture.
"""

from typing import Any, Literal

from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Logits = Literal["all", "last", "none"]


def forward(
    model: Any, tokens: Tensor, positions: Tensor, paged: Any, logits: Logits
) -> Tensor | None:
    """What `model(...)` computes, by calling its modules one after the other.

    Args:
        tokens, positions: [B, N] int64.
        paged: handed on to the attention of every layer.
        logits: of which nodes.

    Returns:
        [B, N, V], [B, 1, V] or None.
    """
    base = model.base_model
    hidden = base.embed_tokens(tokens)
    embedded_positions = base.rotary_emb(hidden, position_ids=positions)
    for layer in base.layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=embedded_positions,
            paged=paged,
        )
    if logits == "none":
        return None
    hidden = base.norm(hidden)
    result: Tensor = model.lm_head(hidden if logits == "all" else hidden[:, -1:])
    return result
