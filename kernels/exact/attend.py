"""Tree attention whose bits are a function of a query's own prefix.

A token alone, in a tree, in a batch, in a prompt of any length: what is computed of it is the same
to the last bit, because every query adds up its keys in an order that follows from its position
(`specdec.kernels.exact.pieces`), and every tile has the same shape whatever it is filled with.
Three kernels: keys in pieces, for all queries of a sequence together; the keys next to each query,
for each by itself, at the same time; the merge.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from specdec.kernels.exact.context import context_kernel
from specdec.kernels.exact.pieces import REACH, TAIL, Plan, make_plan
from specdec.kernels.exact.tail import locate_kernel, tail_kernel
from specdec.kernels.gpu.attend import (
    EARLY_TOKENS,
    blocks_for,
    check,
    constants_of,
    descriptor,
    launch_of,
    strides_of,
)
from specdec.kernels.gpu.blocks import Blocks
from specdec.kernels.gpu.merge import merge
from specdec.kernels.layout import TreeLayout

MANY = 2**20  # rows: the tile of many serves all
WORKSPACE = 2**29  # bytes of partial results at a time
Read = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """As `reference.tree_attention`, for queries that do not stand before the end of the context
    and nodes at most `REACH` levels below it.

    Raises:
        ValueError: a type that has no kernels, or a scale that is not positive.
    """
    batch, query_heads, nodes, _ = query.shape
    value_dim = value_pages.shape[3]
    check(query.dtype, scale)
    out = query.new_empty(batch, nodes, query_heads, value_dim)
    if not out.numel():
        return out
    call = Call(
        tensors=(query, key_pages, value_pages, key_tree, value_tree),
        scales=(key_scales, value_scales),
        layout=layout,
        options=(scale, window or 0, softcap or 0.0),
        blocks=blocks_for(query, key_pages, value_pages, MANY),
        shared_prefix=shared_prefix,
    )
    for some in call.portions():
        partials, plan = call.compute(some)
        merge(
            out[:, some.start : some.stop],
            *partials,
            sinks,
            spans=plan.spans,
            most=plan.most,
            always=True,
        )
    return out


class Call:
    """One call of `tree_attention`.

    Args:
        tensors: queries, pages and scratch, keys before values.
        scales: of pages of a quantised type, else None.
        options: scale, window, softcap; 0 is none.
    """

    def __init__(
        self,
        *,
        tensors: Read,
        scales: tuple[Tensor | None, Tensor | None],
        layout: TreeLayout,
        options: tuple[float, int, float],
        blocks: Blocks,
        shared_prefix: bool,
    ) -> None:
        self.tensors, self.scales, self.layout, self.options = tensors, scales, layout, options
        self.blocks, self.shared_prefix = blocks, shared_prefix
        self.batch, query_heads, self.nodes, _ = tensors[0].shape
        self.kv_heads, self.page_size = tensors[1].shape[1:3]
        self.value_dim = tensors[2].shape[3]
        self.group = query_heads // self.kv_heads
        self.interpreting = triton.knobs.runtime.interpret

    def plan(self, some: range) -> Plan:
        """How the work of these nodes is handed out; all layers of a pass share it."""
        key = ("exact", some, *self._shape())
        return self.layout.remember(
            key,
            lambda: make_plan(
                self.layout,
                blocks=self.blocks,
                nodes=some,
                group=self.group,
                kv_heads=self.kv_heads,
                page_size=self.page_size,
                window=self.options[1] or None,
                shared_prefix=self.shared_prefix,
            ),
        )

    def _shape(self) -> tuple[Any, ...]:
        return self.blocks, self.group, self.kv_heads, self.options[1], self.shared_prefix

    def portions(self) -> list[range]:
        """Nodes whose partial results fit in the workspace together."""
        slots = self.plan(range(self.nodes)).slots
        node = slots * self.kv_heads * self.group * self.value_dim * 4
        step = max(WORKSPACE // node, 1)
        return [
            range(start, min(start + step, self.nodes)) for start in range(0, self.nodes, step)
        ]

    def compute(self, some: range) -> tuple[tuple[Tensor, Tensor], Plan]:
        """Partial results of some nodes and their log-sum-exp, [slots, HKV, R, DV] and
        [slots, HKV, R], R their rows; and where they lie."""
        placed = self.layout.remembers(("places",)) and self.layout.remembers(
            ("exact", some, *self._shape())
        )
        plan, places = self.plan(some), self._places()
        partials = self._partials(plan, len(some))
        early = (
            placed
            and not self.interpreting
            and plan.shared_items is None
            and self.batch * self.layout.max_context <= EARLY_TOKENS
        )
        rows = len(some) * self.group
        passes = [(plan.items, triton.cdiv(rows, self.blocks.rows), False)]
        if plan.shared_items is not None:
            passes.insert(0, (plan.shared_items, 1, True))
        for items, row_blocks, shared in passes:
            self._launch_context(some, plan, partials, items, row_blocks, shared, early)
        tail_kernel[(len(some), self.kv_heads, self.batch)](
            *partials,
            *self.tensors,
            *self.scales,
            places,
            plan.spans,
            *self._tables(),
            *self.options,
            rows,
            self.nodes,
            some.start,
            *self._strides(),
            GROUP_PAD=max(16, triton.next_power_of_2(self.group)),
            SLOTS=TAIL,
            # Whole in half precision; else tiles as small as those of the pieces.
            AT_ONCE=TAIL if self.blocks.keys * 2 == TAIL else self.blocks.keys,
            ONE_LOAD=all(map(_aligned, self.tensors[1:])),
            num_warps=self.blocks.warps,
            launch_pdl=not self.interpreting,
            **self._constants(),
        )
        return partials, plan

    def _launch_context(
        self,
        some: range,
        plan: Plan,
        partials: tuple[Tensor, Tensor],
        items: Tensor,
        row_blocks: int,
        shared: bool,
        early: bool,
    ) -> None:
        layout, blocks = self.layout, self.blocks
        chain = layout.ancestors is None
        query, key_pages, value_pages, *trees = self.tensors
        context_kernel[(len(items) * self.kv_heads * row_blocks,)](
            *partials,
            query,
            key_pages,
            value_pages,
            descriptor(key_pages, blocks),
            descriptor(value_pages, blocks),
            *trees,
            *self.scales,
            items,
            plan.spans,
            *self._tables(),
            *self.options,
            len(some) * self.group,
            row_blocks,
            some.start,
            layout.first + some.stop - 1 if chain else REACH,
            *self._strides(),
            SHARED=shared,
            # A shorter chain reaches no keys of the scratch here.
            CAUSAL=chain and layout.first + some.stop - 1 > REACH,
            EARLY=early,
            launch_pdl=early,
            **launch_of(blocks),
            **self._constants(),
        )

    def _places(self) -> Tensor:
        """[B, N, TAIL] int32, the scratch row at every slot of a query's tail."""
        layout = self.layout

        def make() -> Tensor:
            places = layout.positions.new_empty(self.batch, self.nodes, TAIL, dtype=torch.int32)
            words = 0 if layout.ancestors is None else layout.ancestors.shape[2]
            locate_kernel[(self.nodes, self.batch)](
                places,
                layout.positions,
                layout.key_positions,
                layout.ancestors,
                layout.context_lens,
                self.nodes,
                layout.key_positions.shape[1],
                layout.first,
                *layout.positions.stride(),
                *layout.key_positions.stride(),
                *((0, 0) if layout.ancestors is None else layout.ancestors.stride()[:2]),
                SLOTS=TAIL,
                WORDS=words,
                CAUSAL=layout.ancestors is None,
                num_warps=4,
            )
            return places

        return layout.remember(("places",), make)

    def _partials(self, plan: Plan, nodes: int) -> tuple[Tensor, Tensor]:
        """Workspace, shared by all layers of a pass."""
        shape = (plan.slots, self.kv_heads, nodes * self.group)

        def make() -> tuple[Tensor, Tensor]:
            device = plan.items.device
            partial = torch.empty(*shape, self.value_dim, dtype=torch.float32, device=device)
            return partial, torch.empty(shape, dtype=torch.float32, device=device)

        return self.layout.remember(("exact partials", *shape, self.value_dim), make)

    def _tables(self) -> tuple[Tensor, ...]:
        layout = self.layout
        return layout.page_table, layout.context_lens, layout.positions

    def _strides(self) -> tuple[int, ...]:
        """As both kernels take them, in their order."""
        return strides_of(*self.tensors, self.scales[0], self.layout)

    def _constants(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        return {
            **constants_of(*self.tensors),
            "WINDOW": self.options[1] > 0,
            "SOFTCAP": self.options[2] > 0,
            "OVERLAP": not self.interpreting,
        }


def _aligned(rows: Tensor) -> bool:
    """Whether rows [..., D] begin at multiples of 16 bytes."""
    steps = (rows.data_ptr(), *(stride * rows.itemsize for stride in rows.stride()[:-1]))
    return all(step % 16 == 0 for step in steps)
