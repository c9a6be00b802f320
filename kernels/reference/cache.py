"""Moving keys and values: from a projection to the scratch, from the scratch to pages, and within
pages.

Pages of a quantised type hold rounded rows. What goes into the scratch is rounded the same way
beforehand, and rounding twice is rounding once, so a node is seen as it will be after its commit.
"""

import struct

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The types keys and values may be stored in with a scale, and the largest number of each."""


def write_tree(
    key_tree: Tensor,
    value_tree: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    stored: torch.dtype | None = None,
) -> None:
    """Put one layer's new keys and values into its scratch rows first .. first + N - 1, in place.

    Args:
        key_tree, value_tree: [B', HKV, M, D], B' >= B and M >= first + N.
        key, value: [B, HKV, N, D].
        first: scratch row of node 0.
        stored: the type of the pages if it is a quantised one; rows are then written `as_stored`.

    Raises:
        ValueError: `stored` needs no scale.
    """
    batch, _, nodes, _ = key.shape
    if stored is not None:
        key, value = as_stored(key, stored), as_stored(value, stored)
    key_tree[:batch, :, first : first + nodes] = key
    value_tree[:batch, :, first : first + nodes] = value


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
    """Append accepted scratch rows of all layers to the pages of their sequences, in place.

    Args:
        key_pages, value_pages: [L, pages, HKV, S, D], the page pool.
        key_tree, value_tree: [L, B', HKV, M, D], the tree scratch, B' >= B.
        path: [B, A] int64, scratch rows in order; None for the rows 0, 1, ... of every sequence.
        length: [B] int, how many of them to append; 0 appends nothing.
        page_table: [B, P] int32, physical page of each logical page.
        start: [B] int32, tokens of each sequence that are there already.
        key_scales, value_scales: [L, pages, HKV, S] float32, given if the pages hold a quantised
            type; see `quantise`.
    """
    if path is None:
        path = torch.arange(key_tree.shape[3]).expand(len(length), -1)
    owner, node, _, _, logical, offset = _moves(path, length, start, key_pages.shape[3])
    page = page_table[owner, logical]
    for pages, tree, scales in (
        (key_pages, key_tree, key_scales),
        (value_pages, value_tree, value_scales),
    ):
        rows = tree[:, owner, :, node]  # [moved, L, HKV, D]
        if scales is not None:
            rows, scales[:, page, :, offset] = quantise(rows, pages.dtype)
        pages[:, page, :, offset] = rows


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation with one scale, a power of two, for each row of the last dimension.

    To divide and multiply by a scale is then exact, every implementation gives the same bits, and
    rows that are quantised already keep their numbers.

    Args:
        x: [..., D].
        dtype: float8_e4m3fn or int8.

    Returns:
        (values [..., D] of `dtype`, scales [...] float32), where values * scales is x to within
        half a step of the type. The scale is the smallest that leaves the largest of a row within
        the type; a row whose scale would be no normal float32 (zeros above all) has scale 1 and
        gives zeros.

    Raises:
        ValueError: a type that needs no scale.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype={dtype}: must be torch.float8_e4m3fn or torch.int8")
    x = x.float()
    scales = _scales(x.abs().amax(dim=-1), LARGEST[dtype])
    values = x / scales[..., None]
    if dtype == torch.int8:
        values = values.round()
    return values.to(dtype), scales


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D], the numbers that pages of a quantised type hold in place of x, in the type of x.

    They fit: none needs more than 7 significant bits, nor a finer step than x itself has. Only a
    number within 1/32 of the limit of its type may round up to infinity (float16: from 63488).

    Raises:
        ValueError: as `quantise`.
    """
    values, scales = quantise(x, dtype)
    return (values.float() * scales[..., None]).to(x.dtype)


def _scales(largest: Tensor, limit: float) -> Tensor:
    """The smallest powers of two that `limit` must be multiplied by to reach `largest`.

    Computed on the bits of float32, an exponent above 23 bits of mantissa: their difference is a
    quotient in powers of two, which is rounded up to a whole one.
    """
    small = largest < limit * torch.finfo(torch.float32).tiny
    quotient = torch.where(small, limit, largest).view(torch.int32) - _bits(limit) + _bits(1.0)
    return (quotient + 0x7FFFFF & 0x7F800000).view(torch.float32)


def _bits(number: float) -> int:
    """Of a float32."""
    (bits,) = struct.unpack("i", struct.pack("f", number))
    assert isinstance(bits, int)
    return bits


def _moves(path: Tensor, length: Tensor, start: Tensor, page_size: int) -> tuple[Tensor, ...]:
    """What becomes of every row that counts: [moved] sequences, nodes, then logical pages and
    offsets of the node and of its place to be.

    Counted in Python: on a CPU a dozen operations on small tensors take longer.
    """
    moves = [
        (owner, node, *divmod(begin + node, page_size), *divmod(begin + step, page_size))
        for owner, (nodes, count, begin) in enumerate(
            zip(path.tolist(), length.tolist(), start.tolist(), strict=True)
        )
        for step, node in enumerate(nodes[:count])
    ]
    table = torch.tensor(moves, dtype=torch.int64, device=length.device)
    return table.view(-1, 6).unbind(1)
