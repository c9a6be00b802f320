"""PagedHead: a recurrent head over a paged cache of its own, by the kernels of the target."""

import torch
from torch import Tensor

from specdec.cache import KVShape, PagedKVCache
from specdec.cached_model import pages_of
from specdec.heads.recurrent import RecurrentHead
from specdec.models.direct import Angles, Layer
from specdec.models.forward import layout_of, passes
from specdec.models.paged import PagedLM
from specdec.request import Capacity


class PagedHead:
    """Runs pairs through a head. Its cache holds a pair for each token of the target's cache.

    Args:
        head: on the device of the target, in its type.
        target: whose kernels, context and type it shares.
    """

    def __init__(self, head: RecurrentHead, target: PagedLM) -> None:
        kernels = target.kernels.on(target.device)
        head.kernels = kernels
        self.head, self.kernels = head, kernels
        self.layers = [Layer(layer, None, kernels) for layer in head.layers]
        self.angles = Angles(head.rotary, target.max_context, head.lm_head.weight)
        self.device, self.dtype, self.looks = target.device, target.dtype, target.looks
        self.max_context = target.max_context
        attention = head.layers[0].self_attn
        self.kv_shape = KVShape(
            layers=len(self.layers),
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            key_dim=attention.head_dim,
            value_dim=attention.head_dim,
        )
        self._begin, self._exact = passes(target.kernels, kernels), target.kernels.exact
        self.cache: PagedKVCache

    def prepare(self, capacity: Capacity) -> None:
        """Start over with an empty cache, in the head's type: one layer is soon read.

        Raises:
            ValueError: the memory of the GPU does not hold one sequence.
        """
        if hasattr(self, "cache"):
            del self.cache  # its memory is free for the new one
        self.cache = PagedKVCache(
            shape=self.kv_shape,
            rows=capacity.rows,
            pages=pages_of(capacity, self.kv_shape, self.dtype, self.device),
            page_size=capacity.page_size,
            max_tokens=capacity.max_tokens,
            dtype=self.dtype,
            device=self.device,
            kernels=self.kernels,
            exact=self._exact,
        )

    @torch.inference_mode()
    def forward(
        self,
        rows: Tensor,
        tokens: Tensor,
        features: Tensor,
        offsets: Tensor,
        *,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over pairs, whose keys and values go to the scratch; may be captured.

        Args:
            tokens: [B, N] int64, of the pairs.
            features: [B, N, D], of the states before them.
            rows, offsets, ancestors, first, key_offsets: as in `PagedLM.forward`, of pairs.

        Returns:
            [B, N, D], the features of the pairs that follow; and what the output head reads.
        """
        cache, head = self.cache, self.head
        self.angles.cover(cache, first + offsets.shape[1])
        layout = layout_of(
            cache,
            rows,
            offsets,
            ancestors,
            first,
            key_offsets,
            positions=self.max_context,
            looks=self.looks,
        )
        paged = self._begin(cache, layout, range(len(self.layers)))
        angles = self.angles.at(layout.positions)
        embedded, hidden = head.embed(tokens).flatten(0, 1), features.flatten(0, 1)  # [B * N, D]
        parts, bias = None, None
        for index, layer in enumerate(self.layers):
            if parts is not None:  # the sum is needed, the norm of it is not
                norm = layer.inner_norm
                hidden, _ = self.kernels.add_norm(
                    hidden, parts, norm.weight, norm.variance_epsilon, bias
                )
            hidden, inputs = head.enter(index, embedded, hidden)
            hidden, parts = layer(index, hidden, inputs, angles, paged)
            bias = layer.down_bias
        feature, normal = head.leave(hidden, parts, bias)
        paged.store()
        return feature.view_as(features), normal.view_as(features)

    def logits(self, normal: Tensor) -> Tensor:
        """[B, N, D] to [B, N, VD]."""
        every: Tensor = self.kernels.project(normal.flatten(0, 1), self.head.lm_head.weight)
        return every.view(*normal.shape[:2], -1)
