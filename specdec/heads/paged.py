"""PagedHead: a head with layers of its own over a paged cache of its own, by the kernels of the
target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.cache import KVShape, PagedKVCache
from specdec.cached_model import pages_of
from specdec.heads.layered import LayeredHead
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import TreeLayout
from specdec.models.direct import Angles
from specdec.models.forward import ForwardPass, layout_of, passes
from specdec.models.paged import PagedLM
from specdec.request import Capacity


class PagedHead:
    """Runs nodes through a head, pairs of a recurrent one. Its cache holds an entry for each token
    of the target's cache that a state is known of.

    Args:
        head: on the device of the target, in its type.
        target: whose context and type it shares.
        kernels: which compute; None for the target's.
    """

    def __init__(
        self,
        head: LayeredHead,
        target: PagedLM,
        *,
        kernels: Kernels | None = None,
    ) -> None:
        which = kernels or target.kernels
        module = which.on(target.device)
        head.kernels, head.exact = module, which.exact
        self.head, self.kernels = head, module
        self.layers = [
            head.run(layer, window, module)
            for layer, window in zip(head.layers, head.windows, strict=True)
        ]
        self.angles = Angles(head.rotary, target.max_context, head.embed_tokens.weight)
        self.device, self.dtype, self.looks = target.device, target.dtype, target.looks
        self.max_context = target.max_context
        attention = head.layers[0].self_attn
        self.kv_shape = KVShape(
            layers=len(self.layers),
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            key_dim=attention.head_dim,
            value_dim=attention.head_dim,
        )
        self._begin, self._exact = passes(which, module), which.exact
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
            successors=capacity.successors,
        )

    @torch.inference_mode()
    def forward(
        self,
        rows: Tensor,
        embedded: Tensor,
        features: Tensor,
        offsets: Tensor,
        *,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over pairs, whose keys and values go to the scratch; may be captured.

        Args:
            embedded: [B, N, D], of the pairs' tokens.
            features: [B, N, D], of the states before them.
            rows, offsets, ancestors, first, key_offsets: as in `PagedLM.forward`, of pairs.

        Returns:
            [B, N, D], the features of the pairs that follow; and what the output head reads.
        """
        layout = self._layout(rows, offsets, ancestors, first, key_offsets)
        paged = self._begin(self.cache, layout, range(len(self.layers)))
        made = self._through(embedded, features, layout.positions, [paged] * len(self.layers))
        paged.store()
        return made

    def _layout(
        self,
        rows: Tensor,
        offsets: Tensor,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
    ) -> TreeLayout:
        self.angles.cover(self.cache, first + offsets.shape[1])
        return layout_of(
            self.cache,
            rows,
            offsets,
            ancestors,
            first,
            key_offsets,
            positions=self.max_context,
            looks=self.looks,
        )

    def _through(
        self,
        embedded: Tensor,
        features: Tensor,
        positions: Tensor,
        passes: Sequence[ForwardPass],
    ) -> tuple[Tensor, Tensor]:
        """Nodes [B, N, D] through all layers, as `forward` returns them; a pass for each layer."""
        head, angles = self.head, self.angles.at(positions)
        inner, hidden = embedded.flatten(0, 1), features.flatten(0, 1)  # [B * N, D]
        parts, bias = None, None
        for index, (layer, paged) in enumerate(zip(self.layers, passes, strict=True)):
            if parts is not None:  # the sum is needed, the norm of it is not
                norm = layer.inner_norm
                hidden, _ = self.kernels.add_norm(
                    hidden, parts, norm.weight, norm.variance_epsilon, bias
                )
            hidden, inputs = head.enter(index, inner, hidden)
            hidden, parts = layer(index, hidden, inputs, angles, paged)
            bias = layer.down_bias
        feature, normal = head.leave(hidden, parts, bias)
        return feature.view_as(features), normal.view_as(features)

    def logits(self, normal: Tensor) -> Tensor:
        """[B, N, D] to [B, N, VD]."""
        every: Tensor = self.kernels.project(normal.flatten(0, 1), self.head.lm_head.weight)
        return every.view(*normal.shape[:2], -1)
