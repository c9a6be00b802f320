"""ForwardPass: what the attention layers of a model talk to while its nodes go through.

Two ways to the same result. `GatheredPass` copies the context of all layers together before the
first of them runs: on a CPU the time goes into the number of operations. `PagedPass` hands each
layer to kernels that read pages and scratch where they lie.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cache import PagedKVCache, PageView
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import TreeLayout


class ForwardPass(Protocol):
    """Keys and values of one forward pass, layer by layer.

    Attributes:
        stored: the type of quantised pages, to which new keys and values are rounded; else None.
    """

    @property
    def stored(self) -> torch.dtype | None: ...

    def scratch(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Where the keys and values of a layer's nodes lie: [B, HKV, M, D] each, and the row of
        the first new node."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the keys and values [B, HKV, N, D] of the new nodes there."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of a layer over its context and its scratch.

        Args:
            query: [B, HQ, N, D].
            scale, window, softcap, sinks: as in `reference.tree_attention`.

        Returns:
            [B, N, HQ, D].
        """

    def store(self) -> None:
        """After the last layer: the new keys and values of all of them are in the scratch, from
        where they can be committed."""


def passes(
    kernels: Kernels, module: ModuleType
) -> Callable[[PagedKVCache, TreeLayout, range], ForwardPass]:
    """How a forward pass through some layers begins, for the implementation in `module` (from
    `kernels.on`)."""
    if module.LOOKS:
        return GatheredPass
    return partial(PagedPass, module, shared_prefix=kernels.shared_prefix)


def layout_of(
    cache: PagedKVCache,
    rows: Tensor,
    offsets: Tensor,
    ancestors: Tensor | None,
    first: int,
    key_offsets: Tensor | None,
    *,
    positions: int,
    looks: bool,
    view: PageView | None = None,
) -> TreeLayout:
    """Who sees whom, for new nodes at these offsets; there is room for them in the scratch.

    Args:
        rows, offsets, ancestors, first, key_offsets: as in `PagedLM.forward`.
        positions: how many the model has.
        looks: whether the host may look at results for free.
        view: the pages that are seen; None for all. With it positions are those in the view, so
            that any attention may take them for a shorter sequence.
    """
    lengths = cache.lengths.index_select(0, rows)
    # Draft nodes past the end of the context are never kept; they must not reach positions the
    # model does not have.
    places = (lengths[:, None] + offsets).clamp(max=positions - 1)
    most = cache.max_tokens
    if view is None:
        table = cache.page_table.index_select(0, rows)
    else:
        table, lengths, most = view.page_table, view.lengths, view.most
        places = places - view.left_out[:, None]
    cache.scratch(len(rows), first + offsets.shape[1])
    return TreeLayout(
        page_table=table,
        context_lens=lengths,
        # A bound of what is read; the reference gathers that much, and is better off with less.
        max_context=int(lengths.max()) if looks else most,
        positions=places,
        key_positions=places if key_offsets is None else lengths[:, None] + key_offsets,
        first=first,
        ancestors=ancestors,
    )


class GatheredPass:
    """Attention of the reference over keys and values that lie together: context, then tree."""

    __slots__ = ("cache", "context", "keys", "layers", "layout", "stored", "values")

    def __init__(self, cache: PagedKVCache, layout: TreeLayout, layers: range) -> None:
        self.cache, self.layout, self.stored = cache, layout, cache.kv_dtype
        self.context = layout.max_context
        self.layers = slice(layers.start, layers.stop)
        # [L, B, HKV, context + M, D] of these layers
        self.keys = self._gather(cache.keys, cache.key_scales, cache.tree_keys)
        self.values = self._gather(cache.values, cache.value_scales, cache.tree_values)

    def _gather(self, pages: Tensor, scales: Tensor | None, tree: Tensor) -> Tensor:
        batch, rows = self.layout.key_positions.shape
        pages, tree = pages[self.layers], tree[self.layers]
        scales = None if scales is None else scales[self.layers]
        layers, _, kv_heads, _, head_dim = pages.shape
        both = tree.new_empty(layers, batch, kv_heads, self.context + rows, head_dim)
        both[..., : self.context, :] = reference.gather_context(pages, self.layout, scales)
        both[..., self.context :, :] = tree[:, :batch, :, :rows]
        return both

    def scratch(self, layer: int) -> tuple[Tensor, Tensor, int]:
        tree, layer = slice(self.context, None), layer - self.layers.start
        return self.keys[layer, :, :, tree], self.values[layer, :, :, tree], self.layout.first

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        keys, values, first = self.scratch(layer)
        reference.write_tree(keys, values, key, value, first, self.stored)

    def attend(self, layer: int, query: Tensor, *, window: int | None, **options: Any) -> Tensor:
        keys, values = (both[layer - self.layers.start] for both in (self.keys, self.values))
        return reference.attention(query, keys, values, self.layout.view(window), **options)

    def store(self) -> None:
        batch, rows = self.layout.key_positions.shape
        own = slice(self.layout.first, rows)
        new = slice(self.context + self.layout.first, None)
        self.cache.tree_keys[self.layers, :batch, :, own] = self.keys[..., new, :]
        self.cache.tree_values[self.layers, :batch, :, own] = self.values[..., new, :]


class PagedPass:
    """Attention of `kernels` over pages and scratch.

    Args:
        kernels: the module.
        layers: all layers find their own pages and scratch.
        options: settings of its `tree_attention` that are the same for all layers.
    """

    __slots__ = ("cache", "kernels", "layout", "options", "stored", "tree_keys", "tree_values")

    def __init__(
        self,
        kernels: ModuleType,
        cache: PagedKVCache,
        layout: TreeLayout,
        layers: range,
        **options: Any,
    ) -> None:
        self.kernels, self.cache, self.layout, self.options = kernels, cache, layout, options
        self.stored = cache.kv_dtype
        batch, rows = layout.key_positions.shape
        self.tree_keys = cache.tree_keys[:, :batch, :, :rows]
        self.tree_values = cache.tree_values[:, :batch, :, :rows]

    def scratch(self, layer: int) -> tuple[Tensor, Tensor, int]:
        return self.tree_keys[layer], self.tree_values[layer], self.layout.first

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        keys, values, first = self.scratch(layer)
        self.kernels.write_tree(keys, values, key, value, first, self.stored)

    def attend(self, layer: int, query: Tensor, **options: Any) -> Tensor:
        cache = self.cache
        out: Tensor = self.kernels.tree_attention(
            query,
            cache.keys[layer],
            cache.values[layer],
            *self.scratch(layer)[:2],
            self.layout,
            key_scales=None if cache.key_scales is None else cache.key_scales[layer],
            value_scales=None if cache.value_scales is None else cache.value_scales[layer],
            **options,
            **self.options,
        )
        return out

    def store(self) -> None:
        """Nothing is left to do: every layer has written its own."""
