"""Moving keys and values, each move in one launch; lengths and tables are read on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.rounding import round_rows, triton_type
from specdec.kernels.gpu.rows import load_rows, outer_strides, store_rows, tile


def write_tree(
    key_tree: Tensor,
    value_tree: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    stored: torch.dtype | None = None,
) -> None:
    """As `specdec.kernels.reference.write_tree`; the last dimension must be dense."""
    batch, kv_heads, nodes, _ = key.shape
    shape, blocks = tile(key.shape[-1], value.shape[-1], nodes * kv_heads)
    write_tree_kernel[(blocks, batch, 2)](
        key_tree,
        value_tree,
        key,
        value,
        first,
        nodes,
        *outer_strides(key_tree),
        *outer_strides(value_tree),
        *outer_strides(key),
        *outer_strides(value),
        KV_HEADS=kv_heads,
        KEY_DIM=key.shape[-1],
        VALUE_DIM=value.shape[-1],
        STORED=None if stored is None else triton_type(stored),
        **shape,
    )


def commit_path(
    key_pages: Tensor,
    value_pages: Tensor,
    key_tree: Tensor,
    value_tree: Tensor,
    path: Tensor | None,
    length: Tensor,
    page_table: Tensor,
    start: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """As `specdec.kernels.reference.commit_path`; pages and scales must be contiguous."""
    layers, pages, kv_heads, page_size, key_dim = key_pages.shape
    most = key_tree.shape[3] if path is None else path.shape[1]
    shape, blocks = tile(key_dim, value_pages.shape[-1], most * kv_heads)
    commit_path_kernel[(blocks, len(length), 2 * layers)](
        _dense(key_pages),
        _dense(value_pages),
        _dense(key_scales),
        _dense(value_scales),
        key_tree,
        value_tree,
        path,
        length,
        page_table,
        start,
        pages,
        *(path.stride() if path is not None else (0, 0)),
        page_table.stride(0),
        *outer_strides(key_tree),
        *outer_strides(value_tree),
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        KEY_DIM=key_dim,
        VALUE_DIM=value_pages.shape[-1],
        **shape,
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"pages of shape {tuple(tensor.shape)} must be contiguous")
    return tensor


@triton.jit(do_not_specialize=["first", "nodes"])
def write_tree_kernel(
    key_tree_ptr,  # [B', HKV, M, D]
    value_tree_ptr,
    key_ptr,  # [B, HKV, N, D]
    value_ptr,
    first,
    nodes,
    stride_key_tree_batch,
    stride_key_tree_head,
    stride_key_tree_row,
    stride_value_tree_batch,
    stride_value_tree_head,
    stride_value_tree_row,
    stride_key_batch,
    stride_key_head,
    stride_key_node,
    stride_value_batch,
    stride_value_head,
    stride_value_node,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program for a block of (node, head) rows of one sequence, either keys or values."""
    sequence = tl.program_id(1).to(tl.int64)
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node = (offs_row // KV_HEADS).to(tl.int64)
    head = (offs_row % KV_HEADS).to(tl.int64)
    alive = node < nodes
    if tl.program_id(2) == 0:
        key_ptr += sequence * stride_key_batch
        key_tree_ptr += sequence * stride_key_tree_batch
        source = head * stride_key_head + node * stride_key_node
        target = head * stride_key_tree_head + (first + node) * stride_key_tree_row
        _write(key_tree_ptr, target, key_ptr, source, alive, KEY_DIM, STORED, BLOCK_DIM)
    else:
        value_ptr += sequence * stride_value_batch
        value_tree_ptr += sequence * stride_value_tree_batch
        source = head * stride_value_head + node * stride_value_node
        target = head * stride_value_tree_head + (first + node) * stride_value_tree_row
        _write(value_tree_ptr, target, value_ptr, source, alive, VALUE_DIM, STORED, BLOCK_DIM)


@triton.jit
def _write(
    tree_ptr,
    target,
    source_ptr,
    source,
    alive,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    rows = load_rows(source_ptr, source, alive, DIM, BLOCK_DIM)
    if STORED is not None:
        rows, scale = round_rows(rows, STORED)
        rows *= scale[:, None]
    store_rows(tree_ptr, target, rows, alive, DIM, BLOCK_DIM)


@triton.jit
def commit_path_kernel(
    key_pages_ptr,  # [L, pages, HKV, S, D]
    value_pages_ptr,
    key_scales_ptr,  # [L, pages, HKV, S] or None
    value_scales_ptr,
    key_tree_ptr,  # [L, B', HKV, M, D]
    value_tree_ptr,
    path_ptr,  # [B, A] or None
    length_ptr,  # [B]
    page_table_ptr,  # [B, P]
    start_ptr,  # [B]
    pages,
    stride_path_batch,
    stride_path_step,
    stride_table_batch,
    stride_key_layer,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_value_layer,
    stride_value_batch,
    stride_value_head,
    stride_value_row,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program for a block of (token, head) rows of one sequence and layer, either keys or
    values."""
    sequence = tl.program_id(1).to(tl.int64)
    layer = (tl.program_id(2) // 2).to(tl.int64)
    length = tl.load(length_ptr + sequence)
    if tl.program_id(0) * BLOCK_ROWS >= length * KV_HEADS:
        return
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    step = offs_row // KV_HEADS
    head = (offs_row % KV_HEADS).to(tl.int64)
    alive = step < length
    if path_ptr is None:
        node = step.to(tl.int64)
    else:
        path_ptrs = path_ptr + sequence * stride_path_batch + step * stride_path_step
        node = tl.load(path_ptrs, mask=alive, other=0).to(tl.int64)
    position = tl.load(start_ptr + sequence) + step
    table_ptrs = page_table_ptr + sequence * stride_table_batch + position // PAGE_SIZE
    page = tl.load(table_ptrs, mask=alive, other=0).to(tl.int64)
    target = ((layer * pages + page) * KV_HEADS + head) * PAGE_SIZE + position % PAGE_SIZE
    if tl.program_id(2) % 2 == 0:
        key_tree_ptr += layer * stride_key_layer + sequence * stride_key_batch
        source = head * stride_key_head + node * stride_key_row
        _append(
            key_pages_ptr, key_scales_ptr, target, key_tree_ptr, source, alive, KEY_DIM, BLOCK_DIM
        )
    else:
        value_tree_ptr += layer * stride_value_layer + sequence * stride_value_batch
        source = head * stride_value_head + node * stride_value_row
        _append(
            value_pages_ptr,
            value_scales_ptr,
            target,
            value_tree_ptr,
            source,
            alive,
            VALUE_DIM,
            BLOCK_DIM,
        )


@triton.jit
def _append(
    pages_ptr,
    scales_ptr,
    target,
    tree_ptr,
    source,
    alive,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    rows = load_rows(tree_ptr, source, alive, DIM, BLOCK_DIM)
    if scales_ptr is not None:
        rows, scale = round_rows(rows, pages_ptr.dtype.element_ty)
        tl.store(scales_ptr + target, scale, mask=alive)
    store_rows(pages_ptr, target * DIM, rows, alive, DIM, BLOCK_DIM)
