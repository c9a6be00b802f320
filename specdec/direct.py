"""A shorter way through the models whose structure is known: the same function in fewer
operations.

A small model on a CPU, or any model at batch 1, spends much of a step between the operations. Here
the query, key and value projections are one product, gate and up projections another, and queries
and keys are rotated together. The general way, `model(...)`, stays for every other architecture.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Logits = Literal["all", "last", "none"]


def can_run_directly(model: Any) -> bool:
    """Whether the model is of a known family and made of plain linear layers (not quantised, no
    adapters)."""
    if model.config.model_type not in FAMILIES:
        return False
    parts = (part for layer in model.base_model.layers for part in (layer.self_attn, layer.mlp))
    return all(
        type(child) is nn.Linear
        for part in parts
        for name, child in part.named_children()
        if name.endswith("_proj")
    )


class DirectModel:
    """A causal LM of one of the `FAMILIES`, run module by module.

    The weights of joined projections move into one tensor, and the model's own parameters become
    views of
    it: no memory is needed twice, and `model(...)` still works.

    Args:
        model: the transformers model.
        windows: sliding window of each layer, None for full attention.
    """

    def __init__(self, model: Any, windows: Sequence[int | None]) -> None:
        self.model = model
        self.base = model.base_model
        self.layers = [
            _Layer(layer, window) for layer, window in zip(self.base.layers, windows, strict=True)
        ]

    def __call__(
        self, tokens: Tensor, positions: Tensor, paged: Any, logits: Logits
    ) -> Tensor | None:
        """What `model(...)` computes.

        Args:
            tokens, positions: [B, N] int64.
            paged: whose `attend` is the attention of every layer.
            logits: of which nodes.

        Returns:
            [B, N, V], [B, 1, V] or None.
        """
        hidden = self.base.embed_tokens(tokens)
        cos, sin = self.base.rotary_emb(hidden, position_ids=positions)  # [B, N, D]
        half = sin.shape[-1] // 2
        cos = cos[:, :, None]
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, cos, sin, paged)
        if logits == "none":
            return None
        last = hidden if logits == "all" else hidden[:, -1:]
        result: Tensor = self.model.lm_head(_norm(self.base.norm, last))
        return result


class _Layer:
    def __init__(self, layer: Any, window: int | None) -> None:
        self.layer, self.attention, self.window = layer, layer.self_attn, window
        attention = self.attention
        self.head_dim: int = attention.head_dim
        self.widths = [
            projection.out_features // self.head_dim
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _join(layer.mlp.gate_proj, layer.mlp.up_proj)

    def __call__(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, paged: Any) -> Tensor:
        """[B, N, H] to the same; cos and sin [B, N, 1, D], the first half of sin negated."""
        attention, layer = self.attention, self.layer
        batch, nodes, _ = hidden.shape
        joined = nn.functional.linear(_norm(layer.input_layernorm, hidden), *self.qkv)
        joined = joined.view(batch, nodes, -1, self.head_dim)  # [B, N, HQ + 2 HKV, D]
        queries, keys, _ = self.widths
        rotated, value = joined.split([queries + keys, keys], dim=2)
        if hasattr(attention, "q_norm"):
            query, key = rotated.split([queries, keys], dim=2)
            rotated = torch.cat([attention.q_norm(query), attention.k_norm(key)], dim=2)
        rotated = rotated * cos + rotated.roll(self.head_dim // 2, dims=-1) * sin
        query, key = rotated.transpose(1, 2).split([queries, keys], dim=1)
        out = paged.attend(
            index,
            query,
            key,
            value.transpose(1, 2),
            scale=attention.scaling,
            window=self.window,
            softcap=None,
            sinks=None,
        )
        hidden = hidden + attention.o_proj(out.reshape(batch, nodes, -1))
        gate_up = nn.functional.linear(
            _norm(layer.post_attention_layernorm, hidden), *self.gate_up
        )
        gate, up = gate_up.chunk(2, dim=-1)
        down: Tensor = layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        return hidden + down


@torch.inference_mode(False)
@torch.no_grad()
def _join(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of projections of the same input as one; theirs become views of it.

    Not in inference mode: the model is the caller's, and autograd cannot use inference tensors.
    """
    weight = torch.cat([projection.weight.data for projection in projections])
    start = 0
    for projection in projections:
        projection.weight.data = weight[start : start + projection.out_features]
        start += projection.out_features
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return weight, torch.cat([bias.data for bias in biases]) if biases else None


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """An RMS norm; one operation where that rounds as transformers does, in float32 and
    float64."""
    if hidden.dtype.itemsize < 4:
        result: Tensor = norm(hidden)
        return result
    weight: Tensor = norm.weight
    return nn.functional.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
