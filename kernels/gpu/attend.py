"""Tree attention over paged keys and values.

Query heads of a group and nodes of a tree make up the rows of one matrix product, so a page is
read once for all of them. The context is split into pieces that run side by side; it needs no mask
but at its end. The tree's own keys follow the context, masked by packed ancestor bits. Where a
sequence has several pieces, each leaves a normalised partial result and its log-sum-exp, and a
second kernel merges them (flash-decoding, Dao et al. 2023; packing the heads of a group and
sharing prefixes as in FlashInfer, Ye et al. 2025, section 3).
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.choose import TYPES
from specdec.kernels.gpu.attention import attention_kernel
from specdec.kernels.gpu.blocks import Blocks, choose_blocks, padded
from specdec.kernels.gpu.merge import merge
from specdec.kernels.gpu.plan import Pieces, plan_pieces
from specdec.kernels.layout import TreeLayout

BULK_ALIGNMENT = 16  # bytes, of the rows the bulk copy engine reads
# Programs that start early are spread unevenly, which costs more than it gains where they have
# much to read.
EARLY_TOKENS = 16384


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
    blocks: Blocks | None = None,
) -> Tensor:
    """As `reference.tree_attention`, for queries that do not stand before the end of the context.
    (Long for its parameters and what it hands to the kernel.)

    Args:
        blocks: launch parameters, for tuning; None chooses them by the shape.

    Raises:
        ValueError: a type that has no kernels, or a scale that is not positive.
    """
    batch, query_heads, nodes, _ = query.shape
    kv_heads, page_size, value_dim = key_pages.shape[1], key_pages.shape[2], value_pages.shape[3]
    check(query.dtype, scale)
    out = query.new_empty(batch, nodes, query_heads, value_dim)
    if not out.numel():
        return out
    rows = query_heads // kv_heads * nodes
    blocks = blocks or blocks_for(query, key_pages, value_pages, rows)
    pieces, planned = _pieces(
        layout,
        blocks=blocks,
        rows=rows,
        kv_heads=kv_heads,
        page_size=page_size,
        window=window,
        shared_prefix=shared_prefix,
    )
    row_blocks = triton.cdiv(rows, blocks.rows)
    padded_rows = row_blocks * blocks.rows
    partials = _partials(layout, pieces, kv_heads, padded_rows, value_dim)
    interpreting = triton.knobs.runtime.interpret
    early = planned and not interpreting and batch * layout.max_context <= EARLY_TOKENS
    passes = [(pieces.items, row_blocks, False)]
    if pieces.shared_items is not None:
        early = False
        passes.insert(0, (pieces.shared_items, 1, True))
    read = query, key_pages, value_pages, key_tree, value_tree
    strides = *strides_of(*read, key_scales, layout), *_tree_strides(layout)
    constants = constants_of(*read) | launch_of(blocks) | _tree_constants(layout, blocks)
    for items, blocks_of_an_item, shared in passes:
        attention_kernel[(len(items) * kv_heads * blocks_of_an_item,)](
            out,
            *(partials or (None, None)),
            *read[:3],
            descriptor(key_pages, blocks),
            descriptor(value_pages, blocks),
            *read[3:],
            key_scales,
            value_scales,
            sinks,
            items,
            pieces.spans,
            *_tables(layout),
            scale,
            window or 0,
            softcap or 0.0,
            rows,
            blocks_of_an_item,
            padded_rows,
            layout.key_positions.shape[1],
            layout.first,
            *strides,
            SHARED=shared,
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            OVERLAP=not shared and not interpreting,
            EARLY=early,
            launch_pdl=early,
            **constants,
        )
    if partials is not None:
        merge(out, *partials, sinks, spans=pieces.spans, most=pieces.most)
    return out


def check(dtype: torch.dtype, scale: float) -> None:
    if dtype not in TYPES:
        raise ValueError(f"kernels.impl=triton: no kernels for {dtype}; use kernels=reference")
    if scale <= 0:
        raise ValueError(f"scale={scale}: must be positive")


def _pieces(layout: TreeLayout, **how: Any) -> tuple[Pieces, bool]:
    """The pieces, by the arguments of `plan_pieces`; whether an earlier layer had them made. Only
    then they are there for sure when a kernel starts early."""
    key = ("pieces", *how.values())
    planned = layout.remembers(key)
    return layout.remember(key, lambda: plan_pieces(layout, **how)), planned


def _tables(layout: TreeLayout) -> tuple[Tensor | None, ...]:
    return (
        layout.page_table,
        layout.context_lens,
        layout.positions,
        layout.key_positions,
        layout.ancestors,
    )


def blocks_for(query: Tensor, key_pages: Tensor, value_pages: Tensor, rows: int) -> Blocks:
    """Launch parameters by the shape."""
    plain = key_pages.dtype == query.dtype and all(
        pages.is_contiguous() and pages.stride(2) * pages.itemsize % BULK_ALIGNMENT == 0
        for pages in (key_pages, value_pages)
    )
    return choose_blocks(
        rows=rows,
        head_dim=max(query.shape[3], value_pages.shape[3]),
        dtype=query.dtype,
        page_size=key_pages.shape[2],
        plain=plain,
    )


def strides_of(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_tree: Tensor,
    value_tree: Tensor,
    key_scales: Tensor | None,
    layout: TreeLayout,
) -> tuple[int, ...]:
    """As kernels of attention take them, in their order; those that read trees take
    `_tree_strides` after them."""
    return (
        *query.stride()[:3],
        *key_pages.stride()[:2],
        *value_pages.stride()[:2],
        *key_tree.stride()[:2],
        *value_tree.stride()[:2],
        *((0, 0) if key_scales is None else key_scales.stride()[:2]),
        layout.page_table.stride(0),
        *layout.positions.stride(),
    )


def _tree_strides(layout: TreeLayout) -> tuple[int, ...]:
    ancestors = (0, 0) if layout.ancestors is None else layout.ancestors.stride()[:2]
    return (*layout.key_positions.stride(), *ancestors)


def _tree_constants(layout: TreeLayout, blocks: Blocks) -> dict[str, Any]:
    tree = {"TREE_BLOCK": blocks.tree_keys, "TREE_COST": blocks.tree_cost}
    return {**tree, "CAUSAL": layout.ancestors is None}


def constants_of(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, key_tree: Tensor, value_tree: Tensor
) -> dict[str, Any]:
    """Shapes and types that kernels of attention are compiled for."""
    kv_heads, page_size, value_dim = key_pages.shape[1], key_pages.shape[2], value_pages.shape[3]
    return {
        "KEY_STEP": key_pages.stride(2),
        "VALUE_STEP": value_pages.stride(2),
        "KEY_TREE_STEP": key_tree.stride(2),
        "VALUE_TREE_STEP": value_tree.stride(2),
        "KV_HEADS": kv_heads,
        "GROUP": query.shape[1] // kv_heads,
        "KEY_DIM": query.shape[3],
        "VALUE_DIM": value_dim,
        "KEY_PAD": padded(query.shape[3]),
        "VALUE_PAD": padded(value_dim),
        "PAGE": page_size,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "UPCAST": triton.knobs.runtime.interpret and query.dtype == torch.bfloat16,
    }


def launch_of(blocks: Blocks) -> dict[str, Any]:
    """How a kernel that reads blocks of pages is launched."""
    return {
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "STAGES": blocks.stages,
        "BULK": blocks.bulk,
        "num_warps": blocks.warps,
    }


def descriptor(pages: Tensor, blocks: Blocks) -> TensorDescriptor | None:
    """The rows of all pages for the bulk copy engine."""
    if not blocks.bulk:
        return None
    rows = pages.view(-1, pages.shape[-1])
    return TensorDescriptor.from_tensor(rows, [blocks.keys, padded(pages.shape[-1])])


def _partials(
    layout: TreeLayout, pieces: Pieces, kv_heads: int, padded_rows: int, value_dim: int
) -> tuple[Tensor, Tensor] | None:
    """Workspace for unmerged results and their log-sum-exp, shared by all layers of a pass; None
    where nothing is to be merged."""
    if pieces.most <= 1:
        return None

    def make() -> tuple[Tensor, Tensor]:
        shape, device = (pieces.slots, kv_heads, padded_rows), pieces.items.device
        partial = torch.empty(*shape, value_dim, dtype=torch.float32, device=device)
        return partial, torch.empty(shape, dtype=torch.float32, device=device)

    return layout.remember(("partials", pieces.slots, kv_heads, padded_rows, value_dim), make)
