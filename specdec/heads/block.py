"""Block heads: one pass drafts many tokens (DFlash, Chen et al. 2026, and what follows it).

A head's context is the target's own: for every committed token but the root the joined states,
through fc and a norm, are the keys and values of each layer, which never pass through the layers.
What does is the block: slot 0 holds the root, the others the embedding of a mask token. All see
the context, and each other both ways, or only what is before them in layers that are causal. Slot
j stands j places after the root, and names the token there; in the shifted form that of the next
place, so that slot 0 is of use too.

Legend: B sequences, N slots of a block, T tokens of context, D, H, E as in `layered.py`, HKV and d
key-value heads and their size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.heads.layered import HeadConfig, LayeredHead

MASK_ROW = "mask_embedding"  # name of that parameter


@dataclass(frozen=True, kw_only=True)
class BlockConfig(HeadConfig):
    """What DFlash is made of.

    Args:
        block: slots of a block, the root's among them.
        mask: id of the mask token in the target's vocabulary.
        own_mask: the mask's embedding is not the row of that id.
        shifted: a slot names the token after its own place.
        causal: of each layer, whether a slot sees only those before it and itself.
        windows: of each layer's attention, None for all.
        scale: of the embeddings of a block.
        multiplier: of logits; then come `softcap` * tanh(logits / `softcap`), if it is given.
    """

    block: int
    mask: int
    own_mask: bool = False
    shifted: bool = False
    causal: tuple[bool, ...]
    windows: tuple[int | None, ...]
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None

    @property
    def levels(self) -> int:
        """Most levels that a block drafts."""
        return self.block - (not self.shifted)

    def slots(self, levels: int) -> int:
        """How many slots a draft of so many levels takes: all, unless none sees a later one."""
        return levels + (not self.shifted) if all(self.causal) else self.block


class BlockHead(LayeredHead):
    """DFlash. Parameters are made, not filled; `embed_tokens` and `lm_head` are usually to become
    the target's."""

    config: BlockConfig

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(len(config.taps) * config.state_size, self.width, bias=False)
        self.hidden_norm = self._norm(self.width)
        self.norm = self._norm(self.width)
        self.mask_embedding = nn.Parameter(torch.empty(self.width)) if config.own_mask else None

    def fuse(self, states: Tensor) -> Tensor:
        return self.normed(self.hidden_norm, self.fc(self.seen(states)))

    def enter(self, index: int, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.normed(self.layers[index].input_layernorm, hidden)

    def blocks(self, roots: Tensor, slots: int) -> Tensor:
        """[..., slots, D], the embeddings of blocks that begin with these tokens [...]."""
        first, own = self.embed(roots)[..., None, :], self.mask_embedding
        row: Tensor = self.embed_tokens.weight[self.config.mask] if own is None else own
        rest = row.expand(*roots.shape, slots - 1, -1)
        return torch.cat([first, rest], dim=-2) * self.config.scale

    def entries(
        self, index: int, context: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, HKV, T, d] of a layer for a context [B, T, D] that `fuse` made,
        differentiable; drafting has them from `PagedBlock`.

        Args:
            angles: cosine and sine of each token's position [B, T, d].
        """
        attention = self.layers[index].self_attn
        shape = (*context.shape[:-1], -1, attention.head_dim)
        key = attention.k_proj(context).view(shape)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key, value = key.transpose(1, 2), attention.v_proj(context).view(shape).transpose(1, 2)
        key, _ = apply_rotary_pos_emb(key, key, *angles)
        return key, value

    def finished(self, logits: Tensor) -> Tensor:
        """What the output matrix says, as the head means it."""
        config = self.config
        if config.multiplier != 1:
            logits = logits * config.multiplier
        if config.softcap is not None:
            logits = torch.tanh(logits / config.softcap) * config.softcap
        return logits
