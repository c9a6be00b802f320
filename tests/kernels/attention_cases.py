"""Calls of tree attention, and the right answers to them.

Whatever a call must not look at is poisoned: pages that nobody owns, slots behind a context,
scratch rows that no query sees, and the memory around every tensor hold NaN; entries of a page
table past its context point nowhere.

Legend: B sequences, N queries, M scratch rows, HKV key-value heads, G query heads of each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.kernels.gpu import plan
from specdec.kernels.gpu.attend import blocks_for
from specdec.kernels.layout import TreeLayout
from tests.kernels.memory import DEVICE, bits, guarded, part_of_wider, poison, poisoned_allocations

NOWHERE = 2**30
# Relative error that float32 is always allowed, 16 units in the last place: a kernel adds block
# after block where torch adds in pairs, and the exp2 of a GPU is good to two units.
FLOOR = 16 * 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors of one call, and in plain Python what they mean.

    Attributes:
        contexts: [B], committed tokens.
        parents: [B][M], the parent of each scratch row, negative for a root and for padding.
        chain: the layout says so instead of giving ancestors.
    """

    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    key_tree: Tensor
    value_tree: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    page_table: Tensor
    context_lens: Tensor
    positions: Tensor
    key_positions: Tensor
    ancestors: Tensor
    contexts: list[int]
    parents: list[list[int]]
    max_context: int
    first: int
    chain: bool

    def layout(self) -> TreeLayout:
        return TreeLayout(
            page_table=self.page_table,
            context_lens=self.context_lens,
            max_context=self.max_context,
            positions=self.positions,
            key_positions=self.key_positions,
            first=self.first,
            ancestors=None if self.chain else self.ancestors,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def rows(self, chosen: list[int]) -> "Case":
        """These sequences alone, over the same pages."""
        of_pool = {"key_pages", "value_pages", "key_scales", "value_scales"}
        parts: dict[str, Any] = {
            name: tensor[chosen] for name, tensor in self.tensors().items() if name not in of_pool
        }
        parts["contexts"] = [self.contexts[row] for row in chosen]
        parts["parents"] = [self.parents[row] for row in chosen]
        return replace(self, **parts)

    def attend(
        self,
        layout: TreeLayout | None = None,
        *,
        kernels: ModuleType = gpu,
        splits: int | None = None,
        **options: Any,
    ) -> Tensor:
        """What the kernels make of it. `scale` is 1 / sqrt(D) unless given.

        Args:
            splits: pieces of every context on average, as a GPU would make that runs as many
                programs as that takes; None is the GPU there is. Of no concern to exact kernels.
        """
        options.setdefault("scale", self.query.shape[-1] ** -0.5)
        runs = self._processors(splits) if splits else plan.processors
        read = self.query, self.key_pages, self.value_pages, self.key_tree, self.value_tree
        with mock.patch.object(plan, "processors", runs):
            found: Tensor = kernels.tree_attention(
                *read,
                self.layout() if layout is None else layout,
                key_scales=self.key_scales,
                value_scales=self.value_scales,
                **options,
            )
        return found

    def _processors(self, splits: int) -> Callable[[torch.device], int]:
        """A machine on which every context is read in `splits` pieces."""
        (batch, heads, nodes, _), kv_heads = self.query.shape, self.key_pages.shape[1]
        rows = heads // kv_heads * nodes
        blocks = blocks_for(self.query, self.key_pages, self.value_pages, rows)
        programs = splits * batch * kv_heads * -(-rows // blocks.rows)
        return lambda device: -(-programs // blocks.per_processor)


# Answers


def line_of(parents: Sequence[int], node: int) -> list[int]:
    """The node and its ancestors, by walking up."""
    line = [node]
    while parents[line[-1]] >= 0:
        line.append(parents[line[-1]])
    return line


def visible_keys(case: Case, sequence: int, query: int, window: int | None) -> list[int]:
    """Keys one query sees: p is the committed token of position p, context + m scratch row m."""
    parents, context = case.parents[sequence], case.contexts[sequence]
    line = line_of(parents, case.first + query)
    here = context + len(line) - 1
    behind = {p: here - p for p in range(context)}
    behind |= {context + row: distance for distance, row in enumerate(line)}
    return sorted(key for key, back in behind.items() if window is None or back < window)


def sequence_keys(case: Case, sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [context + M, HKV, D] each."""
    page_size = case.key_pages.shape[2]
    table = case.page_table[sequence].tolist()
    places = [(table[p // page_size], p % page_size) for p in range(case.contexts[sequence])]
    page = torch.tensor([page for page, _ in places], dtype=torch.int64, device=DEVICE)
    slot = torch.tensor([slot for _, slot in places], dtype=torch.int64, device=DEVICE)
    found = []
    for pages, scales, tree in (
        (case.key_pages, case.key_scales, case.key_tree),
        (case.value_pages, case.value_scales, case.value_tree),
    ):
        committed = pages.view(torch.uint8)[page, :, slot].view(pages.dtype).double()
        if scales is not None:
            committed *= scales[page, :, slot].double()[..., None]
        found.append(torch.cat([committed, tree[sequence].transpose(0, 1).double()]))
    return found[0].to(dtype), found[1].to(dtype)


def answer(
    case: Case,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, N, HQ, DV]: attention of one query at a time over its keys alone.

    In float64 this is what is right. In a low precision it is what models do without a kernel:
    every product is rounded to the type, the softmax is computed in float32 (Hugging Face calls
    it eager attention).
    """
    batch, heads, queries, key_dim = case.query.shape
    kv_heads, value_dim = case.value_tree.shape[1], case.value_tree.shape[3]
    wide = torch.promote_types(dtype, torch.float32)
    given = case.query.to(dtype)
    out = torch.zeros(batch, queries, heads, value_dim, dtype=dtype, device=DEVICE)
    for sequence in range(batch):
        keys, values = sequence_keys(case, sequence, dtype)
        for query in range(queries):
            seen = visible_keys(case, sequence, query, window)
            rows = given[sequence, :, query].reshape(kv_heads, -1, key_dim)
            scores = rows @ keys[seen].permute(1, 2, 0)  # [HKV, G, seen]
            scores = scores * (key_dim**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                sink = sinks.to(dtype).view(kv_heads, -1, 1)
                scores = torch.cat([scores, sink], dim=-1)
            weights = torch.softmax(scores.to(wide), dim=-1).to(dtype)[..., : len(seen)]
            out[sequence, query] = (weights @ values[seen].transpose(0, 1)).view(heads, -1)
    return out


def worst_error(found: Tensor, exact: Tensor) -> float:
    """Of all rows of the last dimension, the largest error relative to the size of the row."""
    error = (found.double() - exact).norm(dim=-1)
    return float((error / exact.norm(dim=-1).clamp(min=1e-30)).max())


def error_and_bound(found: Tensor, case: Case, **options: Any) -> tuple[float, float]:
    """Worst error of an output, and the most it may be: twice that of torch in the same type.

    The interpreter has no bfloat16: the kernel computes in float32 there, and of the result the
    lower bits are cut off. So they are of torch's.
    """
    exact = answer(case, **options)
    if cuts_off(case.query.dtype):
        single = answer(case, torch.float32, **options)
        theirs = (single.view(torch.int32) & -(2**16)).view(torch.float32)
    else:
        theirs = answer(case, case.query.dtype, **options)
    return worst_error(found, exact), 2 * worst_error(theirs.double(), exact) + FLOOR


def cuts_off(dtype: torch.dtype) -> bool:
    """Whether results are rounded towards zero."""
    return triton.knobs.runtime.interpret and dtype == torch.bfloat16


# Cases


def random_parents(nodes: int, size: int, reach: int, generator: torch.Generator) -> list[int]:
    """A random tree of `size` nodes, then padding; a node's parent is one of the `reach` nodes
    before it."""
    tree = [
        int(torch.randint(max(0, i - reach), i, (1,), generator=generator)) for i in range(1, size)
    ]
    return [*[-1][:size], *tree, *[-2] * (nodes - size)]


def random_case(
    *,
    contexts: list[int],
    sizes: list[int],
    reach: int = 5,
    first: int = 0,
    spare: int = 0,
    chain: bool = False,
    group: int = 2,
    kv_heads: int = 1,
    key_dim: int = 16,
    value_dim: int | None = None,
    page_size: int = 16,
    alike: list[int] | None = None,
    max_context: int | None = None,
    stored: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    deck_seed: int = 0,
) -> Case:
    """Ragged trees over ragged contexts, pages dealt out in random order.

    Args:
        contexts, sizes: [B], committed tokens, and real nodes of each tree; max(sizes) scratch
            rows, and the queries are those from `first` on.
        reach: see `random_parents`; 1 makes chains.
        spare: scratch rows behind those of the queries, which nobody sees.
        chain: every tree is a chain, without ancestors.
        alike: [B], so many first pages each sequence shares with the one before it.
        max_context: more than the longest context, for a bound that is loose.
        stored: type of the pages if they are quantised.
        deck_seed: which page is where.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, nodes = len(contexts), max(sizes)
    dims = (key_dim, key_dim if value_dim is None else value_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    parents = [
        list(range(-1, nodes - 1)) if chain else random_parents(nodes, size, reach, generator)
        for size in sizes
    ]
    parents = [tree + [-2] * spare for tree in parents]
    contents = [[normal(context, kv_heads, dim) for context in contexts] for dim in dims]
    trees = [normal(batch, kv_heads, nodes + spare, dim) for dim in dims]
    return assemble(
        query=normal(batch, nodes - first, kv_heads * group, key_dim),
        contents=contents,
        trees=trees,
        parents=parents,
        first=first,
        chain=chain,
        page_size=page_size,
        alike=alike,
        max_context=max_context,
        stored=stored,
        deck_seed=deck_seed,
    )


def assemble(
    *,
    query: Tensor,
    contents: list[list[Tensor]],
    trees: list[Tensor],
    parents: list[list[int]],
    first: int = 0,
    chain: bool = False,
    page_size: int = 16,
    alike: list[int] | None = None,
    max_context: int | None = None,
    stored: torch.dtype | None = None,
    deck_seed: int = 0,
) -> Case:
    """A case of given numbers; the other arguments are those of `random_case`.

    Args:
        query: [B, N, HQ, D].
        contents: keys and values of the committed tokens of each sequence, [context, HKV, D].
        trees: keys and values of scratch rows, [B, HKV, M, D] each; where nobody sees one, it
            becomes NaN.
        parents: [B][M], see `Case`.
    """
    contexts = [len(content) for content in contents[0]]
    batch, queries = query.shape[:2]
    nodes, rows = first + queries, trees[0].shape[2]
    max_context = max(contexts) if max_context is None else max_context
    table, pages = _deal(contexts, page_size, alike or [0] * batch, max_context, deck_seed)
    places = [
        [(table[row][p // page_size], p % page_size) for p in range(context)]
        for row, context in enumerate(contexts)
    ]
    pools = [_pool(numbers, places, pages, page_size, stored) for numbers in contents]
    lines = [[line_of(tree, node) for node in range(rows)] for tree in parents]
    for row, tree_lines in enumerate(lines):
        seen = {node for line in tree_lines[first:nodes] for node in line}
        unseen = sorted(set(range(rows)) - seen)
        for tree in trees:
            tree[row, :, unseen] = math.nan
    offsets = torch.tensor([[len(line) - 1 for line in tree] for tree in lines])
    positions = torch.tensor(contexts)[:, None] + offsets.view(batch, -1)
    words = max(1, -(-rows // 32))
    numbers = [[_pack(line, words) for line in tree[first:nodes]] for tree in lines]
    ancestors = torch.tensor(numbers, dtype=torch.int32)
    (keys, key_scales), (values, value_scales) = pools
    return Case(
        query=part_of_wider(query).transpose(1, 2),
        key_pages=keys,
        value_pages=values,
        key_tree=part_of_wider(trees[0]),
        value_tree=part_of_wider(trees[1]),
        key_scales=key_scales,
        value_scales=value_scales,
        page_table=part_of_wider(torch.tensor(table, dtype=torch.int32).view(batch, -1)),
        context_lens=guarded(torch.tensor(contexts, dtype=torch.int32)),
        positions=part_of_wider(positions[:, first:nodes].T).T,
        key_positions=part_of_wider(positions.T).T,
        ancestors=part_of_wider(ancestors.view(batch, queries, words)),
        contexts=contexts,
        parents=parents,
        max_context=max_context,
        first=first,
        chain=chain,
    )


def _deal(
    contexts: list[int], page_size: int, alike: list[int], max_context: int, deck_seed: int
) -> tuple[list[list[int]], int]:
    """A page table as wide as `max_context` takes, and how many pages there are."""
    width = -(-max_context // page_size)
    pages = len(contexts) * width + 3
    deck = torch.randperm(pages, generator=torch.Generator().manual_seed(deck_seed)).tolist()
    table: list[list[int]] = []
    for row, context in enumerate(contexts):
        shared = table[-1][: alike[row]] if row else []
        used = -(-context // page_size)
        own = [deck.pop() for _ in range(used - len(shared))]
        nowhere = [(-1, NOWHERE)[i % 2] for i in range(width - used)]
        table.append(shared + own + nowhere)
    return table, pages


def _pool(
    rows: list[Tensor],
    places: list[list[tuple[int, int]]],
    pages: int,
    page_size: int,
    stored: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Pages [pages, HKV, S, D] that hold `rows` ([context, HKV, D] of each sequence) at their
    places, and the scales of a quantised type."""
    _, kv_heads, dim = rows[0].shape
    dtype = rows[0].dtype if stored is None else stored
    pool = poison(pages * kv_heads * page_size * dim, dtype).view(pages, kv_heads, page_size, dim)
    pool_bytes = pool.view(torch.uint8)  # not every operation knows float8
    scales = None
    if stored is not None:
        scales = poison(pages * kv_heads * page_size, torch.float32).view(pages, kv_heads, -1)
    for content, where in zip(rows, places, strict=True):
        if not where:
            continue
        page, slot = torch.tensor(where, device=DEVICE).unbind(1)
        content = content.to(DEVICE)
        if scales is not None and stored is not None:
            content, factors = reference.quantise(content, stored)
            scales[page, :, slot] = factors
        pool_bytes[page, :, slot] = bits(content)
    return guarded(pool), None if scales is None else guarded(scales)


def _pack(line: list[int], words: int) -> list[int]:
    """Bit m of the words is set if row m is in the line, as int32 has it."""
    number = sum(1 << row for row in line)
    unsigned = [number >> 32 * word & 0xFFFFFFFF for word in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


ON_GPU = DEVICE.type == "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTISED = [torch.float8_e4m3fn, torch.int8]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
# One type is enough to see a wrong mask or address; what differs between them is the hardware's.
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16, FP32] if ON_GPU else [BF16], ids=str)
# To merge pieces takes a program for every few rows, and most of the interpreter's time.
SPLITS = [1, None] if ON_GPU else [1]


def attend(case: Case, **options: Any) -> Tensor:
    """What the kernels make of it, in poisoned memory."""
    with poisoned_allocations():
        return case.attend(**options)


def assert_right(
    case: Case,
    *,
    kernels: ModuleType = gpu,
    splits: int | None = None,
    shared_prefix: bool = False,
    **options: Any,
) -> None:
    found = attend(case, kernels=kernels, splits=splits, shared_prefix=shared_prefix, **options)
    batch, heads, queries, _ = case.query.shape
    assert found.shape == (batch, queries, heads, case.value_tree.shape[3])
    assert found.dtype == case.query.dtype
    error, bound = error_and_bound(found, case, **options)
    assert error <= bound


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))
