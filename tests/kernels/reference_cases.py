"""The torch functions that define what the kernels compute, against loops in float64.

The oracle looks at one sequence, one head and one node at a time and collects its keys one by one:
committed tokens through the page table, then scratch rows.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.kernels.layout import TreeLayout, pack_bits
from specdec.kernels.reference import tree_attention

PAGE_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors of one call and, in plain Python, who sees which scratch row."""

    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    key_tree: Tensor
    value_tree: Tensor
    page_table: Tensor
    contexts: list[int]
    positions: Tensor
    key_positions: Tensor
    visible: list[list[set[int]]]  # [B][N], scratch rows a query sees
    first: int = 0
    chain: bool = False

    def layout(self, max_context: int | None = None) -> TreeLayout:
        rows = self.key_tree.shape[2]
        dense = torch.zeros(len(self.contexts), len(self.visible[0]), rows, dtype=torch.bool)
        for sequence, nodes in enumerate(self.visible):
            for node, seen in enumerate(nodes):
                dense[sequence, node, list(seen)] = True
        return TreeLayout(
            page_table=self.page_table,
            context_lens=torch.tensor(self.contexts, dtype=torch.int32),
            max_context=max(self.contexts) if max_context is None else max_context,
            positions=self.positions,
            key_positions=self.key_positions,
            first=self.first,
            ancestors=None if self.chain else pack_bits(dense),
        )

    def run(self, *, max_context: int | None = None, **options: object) -> Tensor:
        options.setdefault("scale", self.query.shape[-1] ** -0.5)
        return tree_attention(
            self.query,
            self.key_pages,
            self.value_pages,
            self.key_tree,
            self.value_tree,
            self.layout(max_context),
            **options,  # type: ignore[arg-type]
        )

    def to(self, dtype: torch.dtype) -> "Case":
        names = ("query", "key_pages", "value_pages", "key_tree", "value_tree")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def random_parents(nodes: int, size: int, generator: torch.Generator) -> list[int]:
    """A random tree of `size` nodes, then padding."""
    tree = [int(torch.randint(i, (1,), generator=generator)) for i in range(1, size)]
    return [*[-1][:size], *tree, *[-2] * (nodes - size)]


def ancestors_of(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors, by walking up."""
    found = [node]
    while parents[found[-1]] >= 0:
        found.append(parents[found[-1]])
    return found


def random_case(
    *,
    contexts: list[int],
    sizes: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Ragged trees over ragged contexts, pages dealt out in random order, some left over."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, nodes = len(contexts), max(sizes)
    needed = [-(-context // PAGE_SIZE) for context in contexts]
    pages = sum(needed) + 3
    deck = torch.randperm(pages, generator=generator).tolist()
    table = torch.full((batch, max([*needed, 1])), -1, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([deck.pop() for _ in range(count)], dtype=torch.int32)
    parents = [random_parents(nodes, size, generator) for size in sizes]
    visible = [[set(ancestors_of(row, node)) for node in range(nodes)] for row in parents]
    depths = torch.tensor([[len(seen) - 1 for seen in row] for row in visible])
    positions = torch.tensor(contexts)[:, None] + depths
    return Case(
        query=normal(batch, heads, nodes, key_dim),
        key_pages=normal(pages, kv_heads, PAGE_SIZE, key_dim),
        value_pages=normal(pages, kv_heads, PAGE_SIZE, value_dim),
        key_tree=normal(batch, kv_heads, nodes, key_dim),
        value_tree=normal(batch, kv_heads, nodes, value_dim),
        page_table=table,
        contexts=contexts,
        positions=positions,
        key_positions=positions,
        visible=visible,
    )


def visible_keys(
    case: Case, sequence: int, kv_head: int, node: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Keys [T, D] and values [T, DV] that one query sees, in float64."""
    here = int(case.positions[sequence, node])
    keys, values = [], []
    for position in range(case.contexts[sequence]):
        if window is None or here - position < window:
            page = int(case.page_table[sequence, position // PAGE_SIZE])
            keys.append(case.key_pages[page, kv_head, position % PAGE_SIZE])
            values.append(case.value_pages[page, kv_head, position % PAGE_SIZE])
    for row in sorted(case.visible[sequence][node]):
        if window is None or here - int(case.key_positions[sequence, row]) < window:
            keys.append(case.key_tree[sequence, kv_head, row])
            values.append(case.value_tree[sequence, kv_head, row])
    return torch.stack(keys).double(), torch.stack(values).double()


def oracle(
    case: Case,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, N, HQ, DV] float64."""
    batch, heads, queries, key_dim = case.query.shape
    kv_heads, value_dim = case.key_pages.shape[1], case.value_pages.shape[-1]
    out = torch.zeros(batch, queries, heads, value_dim, dtype=torch.float64)
    for sequence in range(batch):
        for head in range(heads):
            for node in range(queries):
                keys, values = visible_keys(
                    case, sequence, head // (heads // kv_heads), node, window
                )
                query = case.query[sequence, head, node].double()
                scores = [
                    sum(float(a) * float(b) for a, b in zip(query, key, strict=True))
                    * (key_dim**-0.5 if scale is None else scale)
                    for key in keys
                ]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights)
                if sinks is not None:
                    total += math.exp(float(sinks[head]) - top)
                for weight, value in zip(weights, values, strict=True):
                    out[sequence, node, head] += weight / total * value
    return out


RAGGED = {"contexts": [0, 1, PAGE_SIZE, 2 * PAGE_SIZE + 1, 11], "sizes": [5, 1, 3, 7, 2]}
