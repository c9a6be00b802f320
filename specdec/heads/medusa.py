"""Medusa heads (Cai et al. 2024, section 2.1.1): each reads the same state of the target, the one
after its final norm at the last committed token that has one, and names a token of its own.

Head i, counted from 0, names the token i + 2 places after the one whose state it reads; in a tree
that begins at the next token, the root, that is depth i + 1. `formats.py` reads all layouts.

Legend: M states in any arrangement, H their width, V tokens a head can name.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import reference
from specdec.observation import Tap


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Sizes of Medusa heads.

    Args:
        heads: how many there are, hence depths they can draft.
        blocks: of each head.
        state_size: H.
        vocab_size: V, rows of an output matrix.
        taps: the one state that they read.
        bias: of the blocks.
        tied: one output matrix for all heads, the target's; else each has its own.
        shared: the blocks of a head are one, gone through several times, as in Medusa's own code.

    Raises:
        ValueError: a number out of range.
    """

    heads: int
    blocks: int
    state_size: int
    vocab_size: int
    taps: tuple[Tap, ...] = ("normal",)
    bias: bool = True
    tied: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        least = {"heads": 1, "blocks": 0, "state_size": 1, "vocab_size": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {number}")
        if len(self.taps) != 1:
            raise ValueError(f"taps={list(self.taps)}: Medusa heads read one state; name one")


class MedusaHeads(nn.Module):
    """All heads. Parameters are made, not filled; `lm_head.weight` of tied ones is to become the
    target's.

    A block makes x + silu(W x + b) of x. `blocks[i][j]` are W and b of block j of head i;
    `lm_heads[i]`, or `lm_head` for all, is the output matrix.

    Attributes:
        width: H.
        names: [V] int64, the target's id of each token they can name, ascending; None: the same.
        drafts: tokens they may draft, the first so many of V.
        kernels: the module that computes products.
    """

    names: Tensor | None
    blocks: Any  # nn.ModuleList of nn.ModuleList of nn.Linear
    lm_heads: Any  # nn.ModuleList of nn.Linear

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config, size, own = config, config.state_size, config.vocab_size
        self.kernels: ModuleType = reference
        self.width, self.drafts = size, own
        made = min(config.blocks, 1) if config.shared else config.blocks
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(size, size, bias=config.bias) for _ in range(made))
            for _ in range(config.heads)
        )
        outputs = 0 if config.tied else config.heads
        self.lm_heads = nn.ModuleList(nn.Linear(size, own, bias=False) for _ in range(outputs))
        self.lm_head = nn.Linear(size, own, bias=False) if config.tied else None
        self.register_buffer("names", None)

    def features(self, state: Tensor, heads: int | None = None) -> Tensor:
        """[M, heads, H] what the blocks of each head make of [M, H]; of the first so many."""
        made = []
        for blocks in self.blocks[:heads]:
            x = state
            for index in range(self.config.blocks):
                block = blocks[0 if self.config.shared else index]
                product = self.kernels.project(x, block.weight)
                if block.bias is not None:
                    product = product + block.bias
                x = x + nn.functional.silu(product)
            made.append(x)
        return torch.stack(made, dim=1)

    def logits(self, state: Tensor, heads: int | None = None) -> Tensor:
        """[M, heads, V] of states [M, H]; of the first so many heads."""
        features = self.features(state, heads)
        if self.lm_head is not None:  # read once for all heads
            rows: Tensor = self.kernels.project(features.flatten(0, 1), self.lm_head.weight)
            return rows.view(*features.shape[:2], -1)
        own: list[Tensor] = [
            self.kernels.project(features[:, index].contiguous(), output.weight)
            for index, output in enumerate(self.lm_heads[:heads])
        ]
        return torch.stack(own, dim=1)

    def forward(self, state: Tensor) -> Tensor:
        return self.logits(state)
