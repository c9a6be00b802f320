"""LayeredHead: what heads with decoder layers of their own have in common: those that go on with
what they made (`recurrent.py`) and those that draft a block at once (`block.py`).

Legend: M nodes in any arrangement, H width of the target's states, D width of the head, V and VD
tokens of target and head, E layers of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from specdec.kernels import reference
from specdec.models.direct import Layer
from specdec.observation import Tap

LAYERS = {"llama": LlamaDecoderLayer, "qwen3": Qwen3DecoderLayer}
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [B, HQ, T, d], key and value [B, HKV, T, d]) to [B, HQ, T, d]; rotated already."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What every such head has.

    Args:
        layer: configuration of its decoder layers in transformers, of a type in `LAYERS`:
            hidden_size D, num_hidden_layers E, heads, rotary angles.
        taps: which states of the target it reads, in the order it joins them.
        state_size: H.
        target_vocab: V, rows of its embedding.
        vocab_size: VD, tokens it can name.
        output_bias: with `layer.attention_bias`, whether o_proj has one beside q, k and v.
        windows: tokens that attention reaches back over in each layer, None for all; () is all in
            every layer.
    """

    layer: Any
    taps: tuple[Tap, ...]
    state_size: int
    target_vocab: int
    vocab_size: int
    output_bias: bool = True
    windows: tuple[int | None, ...] = ()


class LayeredHead(nn.Module):
    """Decoder layers between an embedding and an output head. Parameters are made, not filled.

    Attributes:
        names: [VD] int64, the target's id of each token it can name, ascending; None: the same.
        drafts: tokens it may draft, the first so many of its output head's; fewer than VD where
            the rest is padding.
        blind: a dimension of the target's states that it takes for zero; None: it sees all.
        kernels: the module that computes norms.
        exact: it has `Kernels.exact`.
        description: a line for the start of a run; of a head that was loaded.
        run: what `PagedHead` runs a layer by.
    """

    blind: int | None = None
    exact = False
    names: Tensor | None
    description: str = ""
    run: ClassVar[type[Layer]] = Layer
    layers: Any  # nn.ModuleList of transformers' decoder layers
    norm: Any  # before the output head

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config, layer = config, config.layer
        self.kernels: ModuleType = reference
        self.width: int = layer.hidden_size
        self.drafts = config.vocab_size
        self.embed_tokens = nn.Embedding(config.target_vocab, self.width)
        self.layers = nn.ModuleList(self._layer(index) for index in range(layer.num_hidden_layers))
        self.lm_head = nn.Linear(self.width, config.vocab_size, bias=False)
        self.rotary = self.turning()
        self.register_buffer("names", None)

    def _layer(self, index: int) -> Any:
        made = LAYERS[self.config.layer.model_type](self.config.layer, index)
        if not self.config.output_bias:
            made.self_attn.o_proj.bias = None
        return made

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, as the configuration has them; None where it sees all."""
        return self.config.windows or (None,) * len(self.layers)

    def turning(self) -> Any:
        """What computes its rotary angles."""
        return LlamaRotaryEmbedding(self.config.layer)

    def _norm(self, size: int) -> Any:
        return LlamaRMSNorm(size, eps=self.config.layer.rms_norm_eps)

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        """What a norm makes of [..., size]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # a piece of joined states is not
        _, out = self.kernels.add_norm(rows, None, norm.weight, norm.variance_epsilon)
        same: Tensor = out.view_as(x)
        return same

    def joined(self, fc: nn.Linear, x: Tensor) -> Tensor:
        """What fc makes of [..., K]; torch rounds it by the number of rows."""
        if not self.exact:
            made: Tensor = fc(x)
            return made
        made = self.kernels.project(x.flatten(0, -2), fc.weight).unflatten(0, x.shape[:-1])
        return made if fc.bias is None else made + fc.bias

    def fuse(self, states: Tensor) -> Tensor:
        """The feature [..., D] that the target's states [..., taps * H], joined, are to it."""
        raise NotImplementedError

    def seen(self, states: Tensor) -> Tensor:
        """States [..., taps * H], joined, without what it is blind to."""
        if self.blind is None:
            return states
        states = states.clone()
        states.unflatten(-1, (-1, self.config.state_size))[..., self.blind].zero_()
        return states

    def enter(self, index: int, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into a layer.

        Args:
            embedded: [M, D], of the pairs' tokens.
            hidden: [M, D] what comes out of the layer before; of the first, the pairs' features.

        Returns:
            (residual stream [M, D]; what its attention reads.)
        """
        raise NotImplementedError

    def leave(
        self, hidden: Tensor, parts: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the last layer's output means: the next feature [M, D], and what the output head
        reads. `parts` and `bias` as of `reference.add_norm`."""
        norm = self.norm
        made: tuple[Tensor, Tensor] = self.kernels.add_norm(
            hidden, parts, norm.weight, norm.variance_epsilon, bias
        )
        return made

    def forward(
        self, embedded: Tensor, feature: Tensor, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Pairs [B, T, D] through all layers, differentiable, as `leave` has them; drafting goes
        through `PagedHead`.

        Args:
            angles: cosine and sine of each pair's position [B, T, d].
        """
        hidden = feature
        for index, layer in enumerate(self.layers):
            hidden, inputs = self.enter(index, embedded, hidden)
            hidden = _through(layer, index, hidden, inputs, angles, attend)
        return self.leave(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded


def _through(
    layer: Any,
    index: int,
    hidden: Tensor,
    inputs: Tensor,
    angles: tuple[Tensor, Tensor],
    attend: Attend,
) -> Tensor:
    """One decoder layer on [B, T, D]."""
    attention = layer.self_attn
    shape = (*inputs.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        project(inputs).view(shape)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = apply_rotary_pos_emb(query, key, *angles)
    seen = attend(index, query, key, value).transpose(1, 2).flatten(2)
    if hasattr(attention, "gate_proj"):
        seen = seen * attention.gate_proj(inputs).sigmoid()
    hidden = hidden + attention.o_proj(seen)
    after: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return after
