"""Recurrent heads: small networks that read the target's hidden states, and then their own.

A head reads pairs (state of a token, the next token) and has keys and values of its own for them.
Slot t holds the pair of the state at token t with token t + 1, turned to position t, and predicts
token t + 2. Where the target has no state yet, below the root of a tree, a head goes on with what
it made of the parent.

`Eagle3Head`: EAGLE-3 (Li et al. 2025), EAGLE-3.1 and what `speculators`, SpecForge and DeepSpec
make of it. `EagleHead`: EAGLE and EAGLE-2 (Li et al. 2024), HASS (Zhang et al. 2025). `MTPHead`:
layers for multi-token prediction that models are published with (DeepSeek-AI 2024, section 2.2).
Names of tensors are those of `speculators`; `formats.py` reads all others.

Legend: as in `layered.py`; M pairs in any arrangement.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.heads.layered import HeadConfig, LayeredHead


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(HeadConfig):
    """The flags of EAGLE-3.

    Args:
        norm_before_residual: the residual stream begins with the normed feature.
        norm_before_fc: one norm over the joined states.
        fc_norm: a norm for each state (EAGLE-3.1).
        norm_output: what is fed back is normed (EAGLE-3.1).
        fc: whether states are joined by a product; without it there is one, of D numbers.
        fc_bias: of that product.
        pairs: so many of the first layers read embedding and feature, the others the feature
            alone. 1, and E in DeepSpec.
    """

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc: bool = True
    fc_bias: bool = False
    pairs: int = 1


@dataclass(frozen=True, kw_only=True)
class EagleConfig(HeadConfig):
    """The variants of EAGLE-1.

    Args:
        bias: of fc.
        norms: embedding and state are normed before fc (HASS's `add_para_norm`).
        embedding_norm: the embedding alone is (early `speculators`, `layernorms`).
        input_norm: the first layer norms its input, as the others do.
        output_norm: a norm before the output head.
    """

    bias: bool = True
    norms: bool = False
    embedding_norm: bool = False
    input_norm: bool = False
    output_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class MTPConfig(EagleConfig):
    """The variants of MTP layers, which have all norms.

    Args:
        norm_output: what is handed on is normed (vLLM, SGLang); else the layer's own output.
        gated: attention is weighed, number by number, by a sigmoid of what it reads (Qwen3-Next).
        turned: numbers of an attention head that rotary positions turn, half of them in the first
            half of the head; None is all.
    """

    bias: bool = False
    norms: bool = True
    input_norm: bool = True
    output_norm: bool = True
    norm_output: bool = True
    gated: bool = False
    turned: int | None = None


class Eagle3Head(LayeredHead):
    """EAGLE-3: tapped states are joined by fc; the first layer reads the normed embedding beside
    the normed feature.

    Raises:
        ValueError: without fc, another number or width of states than one of D.
    """

    config: Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        count, states = len(config.taps), len(config.taps) * config.state_size
        if not config.fc and states != self.width:
            raise ValueError(f"{count} states of {config.state_size}, and no fc to join them")
        self.fc = nn.Linear(states, self.width, bias=config.fc_bias) if config.fc else None
        norms = count if config.fc_norm else 0
        self.fc_norm = nn.ModuleList(self._norm(config.state_size) for _ in range(norms))
        self.input_norm = self._norm(states) if config.norm_before_fc else None
        self.norm = self._norm(self.width)

    def _layer(self, index: int) -> Any:
        layer = super()._layer(index)
        if index < self.config.pairs:
            layer.hidden_norm = self._norm(self.width)
            attention: Any = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                of = getattr(attention, name)
                wide = nn.Linear(2 * self.width, of.out_features, bias=of.bias is not None)
                setattr(attention, name, wide)
        return layer

    def fuse(self, states: Tensor) -> Tensor:
        states = self.seen(states)
        if self.config.fc_norm:
            pieces = states.split(self.config.state_size, dim=-1)
            normed = [
                self.normed(norm, piece) for norm, piece in zip(self.fc_norm, pieces, strict=True)
            ]
            states = torch.cat(normed, dim=-1)
        if self.input_norm is not None:
            states = self.normed(self.input_norm, states)
        return states if self.fc is None else self.joined(self.fc, states)

    def enter(self, index: int, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layers[index]
        if index >= self.config.pairs:
            return hidden, self.normed(layer.input_layernorm, hidden)
        feature = self.normed(layer.hidden_norm, hidden)
        both = torch.cat([self.normed(layer.input_layernorm, embedded), feature], dim=-1)
        residual = feature if self.config.norm_before_residual and not index else hidden
        return residual, both

    def leave(
        self, hidden: Tensor, parts: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, normal = super().leave(hidden, parts, bias)
        return (normal if self.config.norm_output else hidden), normal


class EagleHead(LayeredHead):
    """EAGLE-1: fc joins the embedding with the state, of whomever it is."""

    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * self.width, self.width, bias=config.bias)
        embedding_norm = config.norms or config.embedding_norm
        self.embedding_layernorm = self._norm(self.width) if embedding_norm else None
        self.hidden_states_layernorm = self._norm(self.width) if config.norms else None
        self.norm = self._norm(self.width) if config.output_norm else None
        self.register_buffer("one", torch.ones(self.width), persistent=False)

    def _layer(self, index: int) -> Any:
        layer = super()._layer(index)
        if not index and not self.config.input_norm:
            layer.input_layernorm = nn.Identity()
        return layer

    def fuse(self, states: Tensor) -> Tensor:
        return self.seen(states)

    def enter(self, index: int, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layers[index]
        if not index:
            if self.embedding_layernorm is not None:
                embedded = self.normed(self.embedding_layernorm, embedded)
            if self.hidden_states_layernorm is not None:
                hidden = self.normed(self.hidden_states_layernorm, hidden)
            hidden = self.joined(self.fc, torch.cat([embedded, hidden], dim=-1))
            if not self.config.input_norm:
                return hidden, hidden
        return hidden, self.normed(layer.input_layernorm, hidden)

    def leave(
        self, hidden: Tensor, parts: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.norm is not None:
            return super().leave(hidden, parts, bias)
        hidden, _ = self.kernels.add_norm(hidden, parts, self.one, 1.0, bias)
        return hidden, hidden


class MTPHead(EagleHead):
    """An MTP layer: fc joins the normed embedding with the normed state; the next state is what
    its output head reads.

    Attributes:
        later: those of the depths below its own, with its embedding and output head.
    """

    config: MTPConfig
    later: Any  # nn.ModuleList of MTPHead

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        self.later = nn.ModuleList()

    def _layer(self, index: int) -> Any:
        layer = super()._layer(index)
        if self.config.gated:
            attention: Any = layer.self_attn
            attention.gate_proj = nn.Linear(self.width, attention.q_proj.out_features, bias=False)
        return layer

    def turning(self) -> Any:
        size, turned = self.layers[0].self_attn.head_dim, self.config.turned
        if turned is None:
            return super().turning()
        layer = copy.deepcopy(self.config.layer)
        layer.head_dim = turned
        made = LlamaRotaryEmbedding(layer)
        made.inv_freq = nn.functional.pad(made.inv_freq, (0, (size - turned) // 2))
        return made

    def leave(
        self, hidden: Tensor, parts: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, normal = super().leave(hidden, parts, bias)
        return (normal if self.config.norm_output else hidden), normal
