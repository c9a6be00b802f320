"""PagedBlock: a block head over a paged cache of its own."""

from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from specdec.heads.block import BlockHead
from specdec.heads.paged import PagedHead
from specdec.kernels.layout import pack_bits
from specdec.models.forward import ForwardPass
from specdec.models.paged import PagedLM
from specdec.models.quantised import stacked


class PagedBlock(PagedHead):
    """Its cache holds, for each token of the target's cache, what each layer makes of the target's
    states there.

    Kernels are never the exact ones: slots that see later slots are no function of a prefix.

    Args:
        head: on the device of the target, in its type.
        target: whose context, type and kernels it shares.
    """

    head: BlockHead

    def __init__(self, head: BlockHead, target: PagedLM) -> None:
        kernels = replace(target.kernels, exact=False)
        super().__init__(head, target, kernels=kernels)
        # Keys and values of all layers are one product of what they have in common.
        size = self.kv_shape.key_dim
        each = [layer.self_attn for layer in head.layers]
        self._entries = stacked([p.weight for one in each for p in (one.k_proj, one.v_proj)])
        self._biases = [
            None if layer.qkv_bias is None else layer.qkv_bias[layer.query_heads * size :]
            for layer in self.layers
        ]

    @torch.inference_mode()
    def read(self, rows: Tensor, states: Tensor, length: Tensor) -> None:
        """Commit what the layers make of the first `length` [B] of the target's states
        [B, N, taps * H]; may be captured.

        Args:
            rows: [B] int64, cache rows.
        """
        cache, (batch, nodes, _) = self.cache, states.shape
        chain = torch.arange(nodes, device=rows.device).expand(batch, -1)
        angles = self.angles.at(self._layout(rows, chain).positions)
        parts = self.kernels.linear(self.head.fuse(states).flatten(0, 1), self._entries)
        each = parts.unflatten(-1, (len(self.layers), -1)).movedim(2, 0).contiguous()
        for index, layer in enumerate(self.layers):
            self.kernels.rotate_and_write(
                each[index],
                *angles,
                cache.tree_keys[index],
                cache.tree_values[index],
                0,
                query_heads=0,
                bias=self._biases[index],
                key_norm=layer.key_norm,
                eps=layer.head_eps,
            )
        cache.append(rows, None, length, nodes)

    @torch.inference_mode()
    def draft(self, rows: Tensor, roots: Tensor, levels: int) -> Tensor:
        """[B, levels, D], what the output head reads for each level below the roots [B]; may be
        captured."""
        config = self.head.config
        slots, batch = config.slots(levels), len(roots)
        embedded = self.head.blocks(roots, slots)
        offsets = torch.arange(slots, device=rows.device).expand(batch, -1)
        everyone = pack_bits(torch.ones(slots, dtype=torch.bool, device=rows.device))  # [W]
        layouts = {
            causal: self._layout(
                rows, offsets, None if causal else everyone.expand(batch, slots, -1)
            )
            for causal in set(config.causal)
        }
        passes: list[ForwardPass] = []
        for causal, alike in groupby(config.causal):
            layers = range(len(passes), len(passes) + len(list(alike)))
            passes += [self._begin(self.cache, layouts[causal], layers)] * len(layers)
        positions = next(iter(layouts.values())).positions
        _, normal = self._through(embedded, embedded, positions, passes)
        first = 0 if config.shifted else 1
        return normal[:, first : first + levels].contiguous()

    def logits(self, normal: Tensor) -> Tensor:
        return self.head.finished(super().logits(normal))
