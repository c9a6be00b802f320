"""What stands between the products of a decoder layer: sums, norms, rotation, the way into the
scratch. Each step is one small kernel, which starts while the one before it ends; see
`specdec.kernels.gpu.linear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.rounding import round_rows, triton_type
from specdec.kernels.gpu.rows import outer_strides
from specdec.kernels.gpu.shared import Everyone, meet, memory_of


def add_norm(
    residual: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    *,
    everyone: Everyone | None = None,
) -> tuple[Tensor, Tensor]:
    """As `specdec.kernels.reference.add_norm`; of the parts of all ranks, if they are given."""
    rows, hidden = residual.shape
    table, offset, rank, ranks = everyone or Everyone(0, 0, 0, 1)
    _dense(residual, parts)
    normed = torch.empty_like(residual)
    total = residual if parts is None else torch.empty_like(residual)
    block = triton.next_power_of_2(hidden)
    interpreting = triton.knobs.runtime.interpret
    if rows:
        add_norm_kernel[(rows,)](
            total,
            normed,
            residual,
            parts,
            weight,
            bias,
            eps,
            rows,
            table,
            OFFSET=offset,
            RANK=rank,
            RANKS=ranks,
            HIDDEN=hidden,
            BLOCK=block,
            SPLITS=0 if parts is None else len(parts),
            OVERLAP=not interpreting,
            # One program does a whole row: more threads have more of it on the way.
            num_warps=max(1, min(16, block // 256)),
            launch_pdl=not interpreting,
        )
    return total, normed


def rotate_and_write(
    parts: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_tree: Tensor,
    value_tree: Tensor,
    first: int,
    *,
    query_heads: int,
    bias: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    stored: torch.dtype | None = None,
) -> Tensor:
    """As `specdec.kernels.reference.rotate_and_write`; the last dimension of the trees must be
    dense. (Long for what it hands to the kernel.)"""
    batch, nodes, dim = cos.shape
    kv_heads = key_tree.shape[1]
    _dense(parts, cos, sin)
    query = cos.new_empty(batch, nodes, query_heads, dim)
    rows = batch * nodes
    heads = query_heads + 2 * kv_heads
    half = triton.next_power_of_2(dim // 2)
    # However many rows there are: the norms of a head are sums over a tile of this shape.
    block = max(1, min(512 // half, 4))
    interpreting = triton.knobs.runtime.interpret
    if rows:
        rotate_kernel[(heads * triton.cdiv(rows, block),)](
            query,
            key_tree,
            value_tree,
            parts,
            cos,
            sin,
            bias,
            query_norm,
            key_norm,
            eps,
            first,
            rows,
            nodes,
            *outer_strides(key_tree),
            *outer_strides(value_tree),
            QUERY_HEADS=query_heads,
            KV_HEADS=kv_heads,
            HALF=dim // 2,
            BLOCK_ROWS=block,
            BLOCK_HALF=half,
            SPLITS=len(parts),
            STORED=None if stored is None else triton_type(stored),
            OVERLAP=not interpreting,
            num_warps=max(1, min(4, block * half // 64)),
            launch_pdl=not interpreting,
        )
    return query.transpose(1, 2)


def _dense(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} must be "
                "contiguous"
            )


@triton.jit(do_not_specialize=["rows", "table"])
def add_norm_kernel(
    total_ptr,  # [M, H]
    normed_ptr,  # [M, H]
    residual_ptr,  # [M, H]
    parts_ptr,  # [S, M, H] or None
    weight_ptr,  # [H]
    bias_ptr,  # [H] or None
    eps,
    rows,
    table,  # address of the addresses of the memory of all ranks
    OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program for one row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < HIDDEN
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    here = row * HIDDEN + offs
    total = tl.load(residual_ptr + here, mask=inside, other=0.0)
    if SPLITS > 0:
        added = tl.zeros([BLOCK], tl.float32)
        if RANKS > 1:
            meet(table, row, RANK, RANKS)
        for rank in tl.static_range(RANKS):
            if RANKS > 1:
                parts_ptr = memory_of(table, rank, OFFSET, parts_ptr.dtype.element_ty)
            for split in tl.static_range(SPLITS):
                part = tl.load(parts_ptr + split * rows * HIDDEN + here, mask=inside, other=0.0)
                added += part.to(tl.float32)
        added = (added + bias).to(total.dtype).to(tl.float32)
        total = (total.to(tl.float32) + added).to(total.dtype)
        tl.store(total_ptr + here, total, mask=inside)
    wide = total.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)).to(total.dtype)
    normed = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + here, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "rows", "nodes"])
def rotate_kernel(
    query_ptr,  # [B, N, HQ, D]
    key_tree_ptr,  # [B', HKV, M, D]
    value_tree_ptr,
    parts_ptr,  # [S, B * N, (HQ + 2 HKV) * D]
    cos_ptr,  # [B, N, D]
    sin_ptr,
    bias_ptr,  # [(HQ + 2 HKV) * D] or None
    query_norm_ptr,  # [D] or None
    key_norm_ptr,
    eps,
    first,
    rows,
    nodes,
    stride_key_tree_batch,
    stride_key_tree_head,
    stride_key_tree_row,
    stride_value_tree_batch,
    stride_value_tree_head,
    stride_value_tree_row,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    STORED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program for one head, of queries, keys or values, and a block of rows; a head in
    halves. All in one dimension of the grid: the others end at 65,535."""
    HEADS: tl.constexpr = QUERY_HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    head = tl.program_id(0) % HEADS
    offs_row = tl.program_id(0) // HEADS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_half = tl.arange(0, BLOCK_HALF)
    row = offs_row.to(tl.int64)
    mask = (offs_row < rows)[:, None] & (offs_half < HALF)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    near = tl.zeros([BLOCK_ROWS, BLOCK_HALF], tl.float32)
    far = tl.zeros([BLOCK_ROWS, BLOCK_HALF], tl.float32)
    for split in tl.static_range(SPLITS):
        here = ((split * rows + row) * HEADS + head)[:, None] * (2 * HALF) + offs_half
        near += tl.load(parts_ptr + here, mask=mask, other=0.0).to(tl.float32)
        far += tl.load(parts_ptr + here + HALF, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        near += _halves(bias_ptr + head * 2 * HALF, offs_half, HALF)
        far += _halves(bias_ptr + head * 2 * HALF + HALF, offs_half, HALF)
    near = near.to(dtype)
    far = far.to(dtype)
    if head < QUERY_HEADS + KV_HEADS:
        if query_norm_ptr is not None and head < QUERY_HEADS:
            near, far = _norm_halves(near, far, query_norm_ptr, offs_half, HALF, eps)
        if key_norm_ptr is not None and head >= QUERY_HEADS:
            near, far = _norm_halves(near, far, key_norm_ptr, offs_half, HALF, eps)
        place = row[:, None] * (2 * HALF) + offs_half
        cos = tl.load(cos_ptr + place, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32)
        turned = _sum(near.to(tl.float32) * cos, -far.to(tl.float32) * sin, dtype)
        far = _sum(far.to(tl.float32) * cos, near.to(tl.float32) * sin, dtype)
        near = turned
    if head < QUERY_HEADS:
        target = query_ptr + (row * QUERY_HEADS + head)[:, None] * (2 * HALF) + offs_half
        _store_halves(target, near, far, mask, HALF)
    else:
        if STORED is not None:
            near, far = _round_halves(near, far, STORED)
        sequence = row // nodes
        node = first + row % nodes
        if head < QUERY_HEADS + KV_HEADS:
            key_tree_ptr += (head - QUERY_HEADS).to(tl.int64) * stride_key_tree_head
            rows_of = sequence * stride_key_tree_batch + node * stride_key_tree_row
            _store_halves(key_tree_ptr + rows_of[:, None] + offs_half, near, far, mask, HALF)
        else:
            head -= QUERY_HEADS + KV_HEADS
            value_tree_ptr += head.to(tl.int64) * stride_value_tree_head
            rows_of = sequence * stride_value_tree_batch + node * stride_value_tree_row
            _store_halves(value_tree_ptr + rows_of[:, None] + offs_half, near, far, mask, HALF)


@triton.jit
def _store_halves(pointers, near, far, mask, HALF: tl.constexpr):
    tl.store(pointers, near.to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, far.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _halves(pointer, offs_half, HALF: tl.constexpr):
    return tl.load(pointer + offs_half, mask=offs_half < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm_halves(near, far, weight_ptr, offs_half, HALF: tl.constexpr, eps):
    """The RMS norm of a head, in its type."""
    x, y = near.to(tl.float32), far.to(tl.float32)
    scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF) + eps)[:, None]
    x = (x * scale).to(near.dtype).to(tl.float32) * _halves(weight_ptr, offs_half, HALF)
    y = (y * scale).to(far.dtype).to(tl.float32) * _halves(weight_ptr + HALF, offs_half, HALF)
    return x.to(near.dtype), y.to(far.dtype)


@triton.jit
def _sum(x, y, DTYPE: tl.constexpr):
    """Of products, each rounded to a type as torch does."""
    return (x.to(DTYPE).to(tl.float32) + y.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _round_halves(near, far, STORED: tl.constexpr):
    """What `round_rows` makes of a head; in which order its numbers stand does not matter."""
    ROWS: tl.constexpr = near.shape[0]
    HALF: tl.constexpr = near.shape[1]
    rows = tl.join(near, far).reshape(ROWS, 2 * HALF)
    rows, scale = round_rows(rows, STORED)
    return (rows * scale[:, None]).to(near.dtype).reshape(ROWS, HALF, 2).split()
