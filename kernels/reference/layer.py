"""What a decoder layer of the Llama kind does besides attention, rounding where transformers does.

A weight in float8 counts as what it is dequantised to in the type of x. A product may come in
parts, whose sum it is; whoever reads it adds them up, in float32 at least, and rounds once.

Legend: M rows (B * N), K inputs, N outputs of a weight, S parts, H hidden size, I intermediate
size; B, N nodes, HQ, HKV, D as elsewhere.
"""

import torch
from torch import Tensor

from specdec.kernels.layout import Fp8Weight, Weight
from specdec.kernels.reference.cache import quantise, write_tree

ROWS_AT_ONCE = 1024  # of a weight that is quantised, for which as many in float32 are needed


def quantise_weight(weight: Tensor) -> Fp8Weight:
    """A weight [N, K] in float8 e4m3 with a scale for each row, as `quantise` rounds: the scale
    is a power of two, so that what it is dequantised to in bfloat16 is exact.

    Raises:
        ValueError: a number that is infinite or NaN.
    """
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    lost = torch.zeros((), dtype=torch.bool, device=weight.device)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        values[some], scale[some] = quantise(weight[some], values.dtype)
        lost |= ~weight[some].isfinite().all()
    if lost:
        raise ValueError("a weight with infinite numbers or NaN cannot be quantised to fp8")
    return Fp8Weight(values, scale)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """A product with a weight, in parts.

    Args:
        x: [M, K].
        weight: [N, K].

    Returns:
        [S, M, N], in the type of x or float32, whose sum over S is x @ weight.T.
    """
    return project(x, weight)[None]


def project(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T: [M, K] and [N, K] to [M, N] in the type of x."""
    plain = weight.dequantised(x.dtype) if isinstance(weight, Fp8Weight) else weight
    return x @ plain.T


def gated_linear(x: Tensor, weight: Weight) -> Tensor:
    """The first two products of a SwiGLU block (Shazeer 2020).

    Args:
        x: [M, K].
        weight: [2 I, K], the rows of the gate, then those that are gated.

    Returns:
        [M, I], silu(gate) * up, rounded once after both products.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = project(x, weight).to(wide).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def add_norm(
    residual: Tensor,
    parts: Tensor | None,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a product to the residual stream, and the RMS norm of the sum.

    Args:
        residual: [M, H].
        parts: [S, M, H]; None adds nothing.
        weight: [H], of the norm.
        eps: of the norm.
        bias: [H], of the product.

    Returns:
        (residual [M, H], normed [M, H]) in the type of `residual`.
    """
    if parts is not None:
        residual = residual + _joined(parts, bias, residual.dtype)
    return residual, _norm(residual, weight, eps)


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
    """From the joined projection of queries, keys and values to rotated queries, and keys and
    values in the scratch (rotary embedding: Su et al. 2021, in halves).

    Args:
        parts: [S, B * N, (HQ + 2 HKV) * D].
        cos, sin: [B, N, D], both halves alike, in the type of the result.
        key_tree, value_tree, first, stored: as in `write_tree`; written in place.
        query_heads: HQ.
        bias: [(HQ + 2 HKV) * D].
        query_norm, key_norm: [D], weights of the RMS norm of every head, before the rotation.
        eps: of the norms.

    Returns:
        [B, HQ, N, D], dense as [B, N, HQ, D].
    """
    batch, nodes, dim = cos.shape
    kv_heads = key_tree.shape[1]
    joined = _joined(parts, bias, cos.dtype).view(batch, nodes, -1, dim)
    query, key, value = joined.split([query_heads, kv_heads, kv_heads], dim=2)
    if query_norm is not None:
        query = _norm(query, query_norm, eps)
    if key_norm is not None:
        key = _norm(key, key_norm, eps)
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    write_tree(
        key_tree, value_tree, key.transpose(1, 2), value.transpose(1, 2), first, stored=stored
    )
    return query.transpose(1, 2)


def _joined(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0] if bias is None else parts[0] + bias
    total = parts.to(torch.promote_types(dtype, torch.float32)).sum(dim=0)
    return (total if bias is None else total + bias).to(dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype.itemsize >= 4:  # one operation, which rounds the same there
        return torch.nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, heads, D] and [B, N, D]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
