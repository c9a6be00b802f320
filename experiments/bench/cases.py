"""The shapes and inputs of the attention benchmark, and what a right answer is.

A case holds one shape's queries, trees and several copies of its keys and values, so that calls
which take turns with the copies find nothing in the L2 cache. Keys and values lie in physically
permuted pages; the tree's own rows lie beside them (as ours reads them) and in pages of their own
behind each context (as an implementation without a tree scratch would keep them).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdec.kernels.layout import TreeLayout, pack_bits
from specdec.tree import random_parents

CHECKED_TOKENS = 1 << 18  # context of the sequences whose outputs are compared
TOLERANCE = 2.0  # times the error of torch's own attention in the same type


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One call of tree attention.

    Args:
        batch: sequences.
        context: committed tokens of each.
        nodes: of each tree; 1 is plain decoding.
    """

    batch: int
    context: int
    nodes: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "Shape":
        """From batch, context, nodes and perhaps heads and kv_heads.

        Raises:
            ValueError: another number of sizes.
        """
        names = ("batch", "context", "nodes", "heads", "kv_heads")
        if not 3 <= len(sizes) <= len(names):
            raise ValueError(f"shapes={list(sizes)}: must be [batch,context,nodes,heads,kv_heads]")
        return cls(**dict(zip(names, sizes, strict=False)))

    @property
    def keys(self) -> int:
        return self.context + self.nodes

    def kv_bytes(self, itemsize: int) -> int:
        """What must be read at least: keys and values, each once."""
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim * itemsize

    @property
    def flops(self) -> int:
        """Of both matrix products, every key counted as seen and nothing padded."""
        return 4 * self.batch * self.nodes * self.heads * self.head_dim * self.keys

    def roof_us(self, read: float, compute: float, itemsize: int = 2) -> float:
        """No call can take less, given the ceilings in bytes/s and FLOP/s."""
        return 1e6 * max(self.kv_bytes(itemsize) / read, self.flops / compute)


def ancestors_of(parents: list[int]) -> Tensor:
    """[N, N] bool: entry (i, j) is True if j is i or an ancestor of i."""
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = True
    return seen


def select_rows(flat: Tensor, rows: Tensor) -> Tensor:
    """[len(rows), ...] of a matrix."""
    return flat.index_select(0, rows)


def index_rows(flat: Tensor, rows: Tensor) -> Tensor:
    """The same by indexing; which of the two copies faster depends on the version of torch."""
    return flat[rows]


class Case:
    """Inputs of one shape on one device.

    Args:
        copies: how many different sets of keys and values.
        page_size: tokens of a page; a context must fill its pages.

    Raises:
        ValueError: a context that is no multiple of the page size.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        copies: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """(Long because all is drawn from one generator, in this order.)"""
        if shape.context % page_size:
            raise ValueError(f"context={shape.context}: must be a multiple of {page_size}")
        self.shape, self.copies, self.page_size = shape, copies, page_size
        self.scale = shape.head_dim**-0.5
        host = torch.Generator().manual_seed(seed)
        trees = [random_parents(shape.nodes, host) for _ in range(shape.batch)]
        self.visible = torch.stack([ancestors_of(tree) for tree in trees]).to(device)  # [B, N, N]
        self.parents = torch.tensor(trees, dtype=torch.int32, device=device)

        self.context_pages = shape.context // page_size
        tree_pages = -(-shape.nodes // page_size)
        pages = shape.batch * (self.context_pages + tree_pages)
        order = torch.randperm(pages, generator=host, dtype=torch.int32)
        self.pages = order.view(shape.batch, -1).to(device)  # [B, P + tree pages]

        generator = torch.Generator(device).manual_seed(seed)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        def pool(tree: Tensor) -> Tensor:
            """[pages, HKV, S, D] with random contexts and these trees [B, HKV, N, D]."""
            found = noise(pages, shape.kv_heads, page_size, shape.head_dim)
            padding = (0, 0, 0, tree_pages * page_size - shape.nodes)
            padded = torch.nn.functional.pad(tree, padding).unflatten(2, (tree_pages, page_size))
            found[self.pages[:, self.context_pages :].long()] = padded.transpose(1, 2)
            return found

        batch, kv_heads, dim = shape.batch, shape.kv_heads, shape.head_dim
        self.query = noise(batch, shape.nodes, shape.heads, dim).transpose(1, 2)  # [B, HQ, N, D]
        self.key_tree, self.value_tree = (
            [noise(batch, kv_heads, shape.nodes, dim) for _ in range(copies)] for _ in "kv"
        )
        # Half of every query's attention lies on its few ancestors. On equal terms they would
        # weigh a thousandth, and a wrong mask would look like rounding.
        self.query[..., 0] = dim**0.5
        for tree in self.key_tree:
            tree[..., 0] = math.log(shape.context / 4 + 1) + 1
        self.key_pages = [pool(tree) for tree in self.key_tree]
        self.value_pages = [pool(tree) for tree in self.value_tree]

        lengths = torch.full((batch,), shape.context, dtype=torch.int32, device=device)
        positions = shape.context + self.visible.sum(-1) - 1
        self._layout = partial(
            TreeLayout,
            page_table=self.pages[:, : self.context_pages].contiguous(),
            context_lens=lengths,
            max_context=shape.context,
            positions=positions,
            key_positions=positions,
            ancestors=pack_bits(self.visible),
        )

    def layout(self) -> TreeLayout:
        """A new layout, which remembers nothing yet; no work for the device."""
        return self._layout()

    def mask(self, sequences: slice = slice(None)) -> Tensor:
        """[B, 1, N, K] bool, context then tree, True where a query sees a key."""
        tree = self.visible[sequences]
        context = tree.new_ones(*tree.shape[:2], self.shape.context)
        return torch.cat([context, tree], dim=2)[:, None]

    @cached_property
    def page_rows(self) -> Tensor:
        """[B, HKV, P] int64: each page of one head as a row of a pool seen as [pages * HKV,
        S * D]."""
        kv_heads = self.shape.kv_heads
        heads = torch.arange(kv_heads, device=self.pages.device)
        return self.pages.long()[:, None] * kv_heads + heads[:, None]

    def gather(
        self,
        pool: Tensor,
        sequences: slice = slice(None),
        pick: Callable[[Tensor, Tensor], Tensor] = select_rows,
    ) -> Tensor:
        """[B, HKV, K, D], context then tree, copied out of a pool in one pass by `pick`."""
        rows = self.page_rows[sequences]
        picked = pick(pool.view(pool.shape[0] * pool.shape[1], -1), rows.reshape(-1))
        return picked.view(*rows.shape[:2], -1, pool.shape[-1])[:, :, : self.shape.keys]

    def contiguous(self, copy: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a copy, each [B, HKV, K, D] contiguous."""
        keys, values = self.key_pages[copy], self.value_pages[copy]
        return self.gather(keys).contiguous(), self.gather(values).contiguous()

    @cached_property
    def checked(self) -> list[int]:
        """The sequences whose outputs are compared, evenly spread, first and last among them."""
        batch = self.shape.batch
        count = min(batch, max(2, CHECKED_TOKENS // self.shape.context))
        return [round(i * (batch - 1) / max(1, count - 1)) for i in range(count)]

    @cached_property
    def expected(self) -> tuple[Tensor, float]:
        """The answer of copy 0 for the checked sequences, [C, N, HQ, D] float32, and the largest
        error that may pass: TOLERANCE times that of torch's attention in the type of the inputs.
        """
        answers, plain = [], []
        for sequence in self.checked:
            only = slice(sequence, sequence + 1)
            keys, values = (
                self.gather(self.key_pages[0], only),
                self.gather(self.value_pages[0], only),
            )
            query, mask = self.query[only], self.mask(only)
            answers.append(dense_attention(query, keys, values, mask, self.scale))
            with sdpa_kernel(SDPBackend.MATH):
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True
                )
            plain.append(out.transpose(1, 2))
        answer = torch.cat(answers)
        return answer, TOLERANCE * worst_error(torch.cat(plain), answer)

    def error(self, out: Tensor) -> float:
        """Of a whole output [B, N, HQ, D], at the worst node of the checked sequences."""
        return worst_error(out[self.checked], self.expected[0])


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """[B, N, HQ, D] float32 by the definition, every score at once.

    Args:
        query: [B, HQ, N, D]; keys, values: [B, HKV, K, D]; mask: [B, 1, N, K] bool.
    """
    nodes, group = query.shape[2], query.shape[1] // keys.shape[1]
    rows = query.float().unflatten(1, (-1, group)).flatten(2, 3)  # [B, HKV, G * N, D]
    scores = (rows @ keys.float().mT).mul_(scale).unflatten(2, (group, nodes))
    weights = scores.masked_fill_(~mask[:, :, None], float("-inf")).softmax(-1)
    out = weights.flatten(2, 3) @ values.float()
    return out.unflatten(2, (group, nodes)).flatten(1, 2).transpose(1, 2)


def worst_error(out: Tensor, answer: Tensor) -> float:
    """Relative error of [B, N, HQ, D] in the Euclidean norm over heads and features, of the worst
    node; NaN counts as infinite."""
    answer = answer.float().flatten(2)
    difference = (out.float().flatten(2) - answer).norm(dim=2) / answer.norm(dim=2)
    return float(difference.nan_to_num(nan=float("inf")).max())
