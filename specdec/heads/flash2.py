"""Flash2Head: DFlash 2 (z-lab/dflash `dflash/model.py`, speculators `models/dflash2`), a block
head with convolutions over the slots of a block around each sublayer, and a selector that scores
the best tokens of a level anew after each parent's token.

Legend: B sequences, N slots of a block, F nodes of a level, C candidates of a level, D width of
the head, K taps of a convolution, G groups of channels with a coefficient each, r rank, V tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.block import BlockConfig, BlockHead
from specdec.models.direct import Layer, Turns
from specdec.models.forward import ForwardPass


@dataclass(frozen=True, kw_only=True)
class Flash2Config(BlockConfig):
    """What DFlash 2 has besides.

    Args:
        taps_of_convolution: K, a slot and those before it that one sees.
        channels: of a group, D / G.
        rank: r, of the selector.
        choices: C, tokens of a level that it scores.
    """

    taps_of_convolution: int
    channels: int
    rank: int
    choices: int


class Convolution(nn.Module):
    """Before and after a sublayer each slot is mixed with those before it, by coefficients that
    are learnt and such as follow from what goes into the sublayer."""

    def __init__(self, config: Flash2Config) -> None:
        super().__init__()
        width, self.taps = config.layer.hidden_size, config.taps_of_convolution
        self.channels = config.channels
        self.base_kernel = nn.Parameter(torch.empty(2, self.taps, width))
        groups = width // config.channels
        self.kernel_projection = nn.Linear(width, 2 * self.taps * groups, bias=False)

    def coefficients(self, inputs: Tensor) -> Tensor:
        """[2, B, N, K, D], those before and those after a sublayer with these inputs [B, N, D]."""
        own = self.kernel_projection(inputs).unflatten(-1, (2, self.taps, -1))
        spread = own.repeat_interleave(self.channels, dim=-1).movedim(-3, 0)
        both: Tensor = self.base_kernel[:, None, None] + spread
        return both

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """[B, N, D]: slots [B, N, D] mixed by [B, N, K, D]; there is nothing before slot 0."""
        mixed = coefficients[:, :, 0] * x
        for tap in range(1, min(self.taps, x.shape[1])):
            before = nn.functional.pad(x[:, :-tap], (0, 0, tap, 0))
            mixed = mixed + coefficients[:, :, tap] * before
        return mixed


class Selector(nn.Module):
    """How well a token follows another at a slot."""

    def __init__(self, config: Flash2Config) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(config.target_vocab, config.rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.target_vocab, config.rank))
        self.hidden_projection = nn.Linear(config.layer.hidden_size, config.rank, bias=False)

    def forward(self, normal: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        """[B, F, C] float32, what is added to the logits of candidates after nodes.

        Args:
            normal: [B, 1, D], what the output head reads of their level.
            tokens: [B, F] int64, of the nodes.
            ids: [B, 1, C] int64, the candidates of the level.
        """
        latent = self.predecessor_codebook[tokens] * self.hidden_projection(normal)
        return latent.float() @ self.successor_codebook[ids[:, 0]].float().transpose(1, 2)


class ConvolvedLayer(Layer):
    """A layer with convolutions."""

    def __init__(self, layer: Any, window: int | None, kernels: ModuleType) -> None:
        super().__init__(layer, window, kernels)
        self._convolutions: tuple[Convolution, Convolution] = layer.attention_conv, layer.mlp_conv
        self._bias, self.output_bias = self.output_bias, None  # comes before the convolution
        self._slots = 1  # of the blocks of the pass

    def attend(self, index: int, inputs: Tensor, angles: Turns, paged: ForwardPass) -> Tensor:
        self._slots = angles[0].shape[1]
        inner = super().attend
        return self._between(
            self._convolutions[0], inputs, lambda x: inner(index, x, angles, paged), self._bias
        )

    def mlp(self, normal: Tensor) -> Tensor:
        return self._between(self._convolutions[1], normal, super().mlp, None)

    def _between(
        self,
        convolution: Convolution,
        inputs: Tensor,
        sublayer: Callable[[Tensor], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """[1, B * N, D], what a sublayer makes of [B * N, D] between its convolutions."""
        slots = inputs.unflatten(0, (-1, self._slots))
        before, after = convolution.coefficients(slots)
        parts = sublayer(convolution(slots, before).flatten(0, 1))
        made = parts.sum(0) if bias is None else parts.sum(0) + bias
        made = made.to(inputs.dtype).view_as(slots)
        mixed: Tensor = convolution(made, after)
        return mixed.flatten(0, 1)[None]


class Flash2Head(BlockHead):
    """DFlash 2. Parameters are made, not filled."""

    config: Flash2Config
    run = ConvolvedLayer

    def __init__(self, config: Flash2Config) -> None:
        super().__init__(config)
        self.candidate_selector = Selector(config)

    def _layer(self, index: int) -> Any:
        layer = super()._layer(index)
        layer.attention_conv, layer.mlp_conv = Convolution(self.config), Convolution(self.config)
        return layer
