"""A shorter way through the models whose structure is known: the same function in fewer
operations.

A small model on a CPU, or any model at batch 1, spends much of a step between the operations. Here
the query, key and value projections are one product, gate and up projections another, and what
stands between products is one operation each, of `specdec.kernels`. The general way, `model(...)`,
stays for every other architecture.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.models.forward import ForwardPass

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
POSITIONS_AT_ONCE = 4096  # of the tables of angles, which grow by as many
Logits = Literal["all", "none"]


def can_run_directly(model: Any) -> bool:
    """Whether the model is of a known family and made of plain linear layers: no adapters, and
    weights that are plain tensors, neither quantised nor sharded ones."""
    if model.config.model_type not in FAMILIES or model.config.hidden_act != "silu":
        return False
    layers = model.base_model.layers
    if any(layer.mlp.gate_proj.bias is not None for layer in layers):
        return False
    parts = (part for layer in layers for part in (layer.self_attn, layer.mlp))
    projections = [
        child for part in parts for name, child in part.named_children() if name.endswith("_proj")
    ]
    # Quantised and sharded weights are tensors of classes of their own in a plain nn.Linear.
    return all(type(child) is nn.Linear for child in projections) and all(
        type(parameter.data) is Tensor for parameter in model.parameters()
    )


class DirectModel:
    """A causal LM of one of the `FAMILIES`, run operation by operation.

    The weights of joined projections move into one tensor, and the model's own parameters become
    views of it: no memory is needed twice, and `model(...)` still works.

    Args:
        model: the transformers model.
        windows: sliding window of each layer, None for full attention.
        positions: how many the model has; `reach` says how many of them are used.
        kernels: the module that computes, `specdec.kernels.reference` or `gpu`.
    """

    def __init__(
        self, model: Any, windows: Sequence[int | None], positions: int, kernels: ModuleType
    ) -> None:
        base = model.base_model
        self.kernels = kernels
        self.embedding: Tensor = base.embed_tokens.weight
        self.head: Tensor = model.lm_head.weight
        self.norm: Tensor = base.norm.weight
        self.eps: float = base.norm.variance_epsilon
        self.layers = [
            _Layer(layer, window, kernels)
            for layer, window in zip(base.layers, windows, strict=True)
        ]
        self._rotary, self._positions = base.rotary_emb, positions
        self.cos = self.sin = self.embedding.new_empty(0, 0)  # [positions so far, D]
        self._outgrown: list[Tensor] = []

    def reach(self, positions: int) -> None:
        """Make the tables of angles long enough for so many positions, or all the model has: a
        configuration may state millions, and a run needs those of its longest sequence.

        Tables that were too short are kept on a GPU: graphs captured over them go on using them.
        """
        have, wanted = len(self.cos), min(positions, self._positions)
        if have >= wanted:
            return
        if have and self.cos.is_cuda:
            self._outgrown += [self.cos, self.sin]
        end = min(-(-wanted // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE, self._positions)
        self.cos, self.sin = _angles(self._rotary, self.embedding, end)

    def __call__(
        self, tokens: Tensor, positions: Tensor, paged: ForwardPass, logits: Logits | Tensor
    ) -> Tensor | None:
        """What `model(...)` computes.

        Args:
            tokens, positions: [B, N] int64.
            paged: keys, values and attention.
            logits: of all nodes, of none, or of the nodes [B] int64.

        Returns:
            [B, N, V], None or [B, V].
        """
        _, normal = self.through(tokens, positions, paged, range(len(self.layers)))
        return self.logits(normal, logits)

    def through(
        self, nodes: Tensor, positions: Tensor, paged: ForwardPass, layers: range
    ) -> tuple[Tensor, Tensor]:
        """Some layers, one after the other.

        Args:
            nodes: [B, N] int64 tokens, or [B, N, H] hidden states after the layers before.
            positions: [B, N] int64.

        Returns:
            [B, N, H] hidden states, and what the final norm makes of them.
        """
        cos, sin = self.cos[positions], self.sin[positions]  # [B, N, D]
        if not nodes.is_floating_point():
            nodes = nn.functional.embedding(nodes, self.embedding)
        hidden = nodes.flatten(0, 1)  # [B * N, H]
        parts, bias = None, None
        for index in layers:
            layer = self.layers[index]
            hidden, parts = layer(index, hidden, parts, bias, cos, sin, paged)
            bias = layer.down_bias
        hidden, normal = self.kernels.add_norm(hidden, parts, self.norm, self.eps, bias)
        return hidden.view_as(nodes), normal.view_as(nodes)

    def logits(self, normal: Tensor, which: Logits | Tensor) -> Tensor | None:
        """The output head on normalised hidden states [B, N, H], as in `__call__`."""
        if isinstance(which, str) and which == "none":
            return None
        batch, nodes, _ = normal.shape
        rows = normal.flatten(0, 1)
        if isinstance(which, Tensor):
            first = torch.arange(0, batch * nodes, nodes, device=which.device)
            chosen: Tensor = self.kernels.project(rows[first + which], self.head)
            return chosen
        every: Tensor = self.kernels.project(rows, self.head)
        return every.view(batch, nodes, -1)


class _Layer:
    def __init__(self, layer: Any, window: int | None, kernels: ModuleType) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kernels, self.window = kernels, window
        self.scale: float = attention.scaling
        self.query_heads = attention.q_proj.out_features // attention.head_dim
        self.qkv, self.qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.query_norm, self.key_norm = (
            getattr(getattr(attention, name, None), "weight", None)
            for name in ("q_norm", "k_norm")
        )
        self.output: Tensor = attention.o_proj.weight
        self.output_bias: Tensor | None = attention.o_proj.bias
        self.gate_up, _ = _join(mlp.gate_proj, mlp.up_proj)
        self.down: Tensor = mlp.down_proj.weight
        self.down_bias: Tensor | None = mlp.down_proj.bias
        self.norms: tuple[Tensor, Tensor] = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )
        self.eps: float = layer.input_layernorm.variance_epsilon

    def __call__(
        self,
        index: int,
        hidden: Tensor,
        parts: Tensor | None,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        paged: ForwardPass,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [B * N, H] and what is still to be added to it, parts [S, B * N, H]
        and bias [H]; to the same after this layer."""
        do, eps = self.kernels, self.eps
        keys, values, first = paged.scratch(index)
        hidden, normal = do.add_norm(hidden, parts, self.norms[0], eps, bias)
        query = do.rotate_and_write(
            do.linear(normal, self.qkv),
            cos,
            sin,
            keys,
            values,
            first,
            query_heads=self.query_heads,
            bias=self.qkv_bias,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            eps=eps,
            stored=paged.stored,
        )
        seen = paged.attend(
            index, query, scale=self.scale, window=self.window, softcap=None, sinks=None
        )
        parts = do.linear(seen.flatten(0, 1).flatten(1), self.output)
        hidden, normal = do.add_norm(hidden, parts, self.norms[1], eps, self.output_bias)
        return hidden, do.linear(do.gated_linear(normal, self.gate_up), self.down)


def _angles(rotary: Any, like: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles [positions, D] in the type of the model, by its own
    module."""
    tables = []
    for start in range(0, positions, POSITIONS_AT_ONCE):
        chosen = torch.arange(start, min(start + POSITIONS_AT_ONCE, positions), device=like.device)
        tables.append(rotary(like, position_ids=chosen[None]))
    cos, sin = (torch.cat(parts, dim=1)[0] for parts in zip(*tables, strict=True))
    return cos, sin


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
