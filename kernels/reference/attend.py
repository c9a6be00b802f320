"""Attention of tree nodes over pages and scratch. Low-precision inputs are computed in float32,
float64 stays.
"""

import torch
from torch import Tensor

from specdec.kernels.layout import TreeLayout, View


def tree_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_tree: Tensor,
    value_tree: Tensor,
    layout: TreeLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    shared_prefix: bool = False,
) -> Tensor:
    """Attention of tree nodes over the committed pages of their sequence and their ancestors in
    the scratch.

    Args:
        query: [B, HQ, N, D].
        key_pages, value_pages: [pages, HKV, S, D], one layer of the page pool.
        key_tree, value_tree: [B, HKV, M, D], one layer of the tree scratch.
        layout: which keys each query sees.
        scale: factor of the dot products.
        window: keys this many positions or more behind a query are hidden (sliding-window
            attention).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, section 2).
        sinks: [HQ], one learned logit per head that takes part in the softmax and has no value
            (gpt-oss).
        key_scales, value_scales: [pages, HKV, S], factors of pages that hold a quantised type.
        shared_prefix: how a kernel divides its work, as in `Kernels`; no matter here.

    Returns:
        [B, N, HQ, D] in the type of `query`. A query that sees nothing gives zeros.
    """

    def context(pages: Tensor, scales: Tensor | None) -> Tensor:
        return gather_context(pages[None], layout, None if scales is None else scales[None])[0]

    keys = torch.cat([context(key_pages, key_scales), key_tree], dim=2)
    values = torch.cat([context(value_pages, value_scales), value_tree], dim=2)
    view = layout.view(window)
    return attention(query, keys, values, view, scale=scale, softcap=softcap, sinks=sinks)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    view: View,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over keys that lie together, context first, then the tree scratch.

    Args:
        query: [B, HQ, N, D].
        keys, values: [B, HKV, K, D].
        view: which keys each query sees.
        scale, softcap, sinks: as in `tree_attention`.

    Returns:
        [B, N, HQ, D] in the type of `query`. A query that sees nothing gives zeros.
    """
    batch, heads, queries, _ = query.shape
    given, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, keys, values = query.to(wide), keys.to(wide), values.to(wide)
    if view.unseen is not None:  # a weight of zero does not silence a NaN
        values = values.masked_fill(view.unseen, 0.0)
        keys = keys.masked_fill(view.unseen, 0.0)
    if softcap is None and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=view.visible, scale=scale, enable_gqa=True
        )
        if view.blind is not None:
            out = out.masked_fill(view.blind, 0.0)
        return out.transpose(1, 2).to(given)
    grouped = query.reshape(batch, keys.shape[1], -1, query.shape[-1])
    scores = (grouped @ keys.mT).mul_(scale)  # [B, HKV, G * N, K]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, heads, queries, -1)
    if view.visible is not None:
        scores = scores.masked_fill_(~view.visible, float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sink = sinks.to(wide).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    if view.blind is not None:
        weights = weights.masked_fill(view.blind, 0.0)
    out = weights.reshape(*grouped.shape[:3], -1) @ values
    return out.view(batch, heads, queries, -1).transpose(1, 2).to(given)


def gather_context(pages: Tensor, layout: TreeLayout, scales: Tensor | None = None) -> Tensor:
    """[L, pages, HKV, S, D] to [L, B, HKV, max_context, D] through the page table.

    With `scales` ([L, pages, HKV, S]) the pages hold a quantised type, and the result is float32.
    """
    batch = layout.page_table.shape[0]
    layers, _, kv_heads, page_size, head_dim = pages.shape
    used = -(-layout.max_context // page_size)
    table = layout.page_table[:, :used].reshape(-1).clamp(min=0)
    gathered = pages.index_select(1, table)
    if scales is not None:
        gathered = gathered.float() * scales.index_select(1, table)[..., None]
    gathered = gathered.view(layers, batch, used, kv_heads, page_size, head_dim)
    joined = gathered.transpose(2, 3).reshape(layers, batch, kv_heads, -1, head_dim)
    return joined[..., : layout.max_context, :]
