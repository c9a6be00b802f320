"""What kernels are given besides plain tensors. Above all, what the attention of one forward pass
may look at: pages of committed tokens, then rows of tree scratch.

Legend: B sequences, N query rows, M scratch rows, W = ceil(M / 32) words, P pages per sequence.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SCALED_BLOCK = 128  # rows and columns of a weight that may have a scale together


class TreeLayout:
    """Visibility of keys for the N query rows of each sequence, shared by all layers of one
    forward pass.

    A query sees every committed token of its own sequence and the scratch rows whose bit is set in
    its `ancestors`; a sliding window hides keys `window` or more positions behind it.

    Args:
        page_table: [B, P] int32, physical page of each logical page; entries past the context are
            ignored.
        context_lens: [B] int32, committed tokens of each sequence.
        max_context: an upper bound of `context_lens` known on the host.
        positions: [B, N] int64, position of each query in its sequence.
        key_positions: [B, M] int64, position of each scratch row.
        first: scratch row that holds the keys of query 0; query i owns row `first + i`.
        ancestors: [B, N, W] int32, bit m set if the query sees scratch row m (itself included).
            None means a
            causal chain: query i sees the rows 0 .. first + i.
    """

    __slots__ = (
        "_memory",
        "ancestors",
        "context_lens",
        "first",
        "key_positions",
        "max_context",
        "page_table",
        "positions",
    )

    def __init__(
        self,
        *,
        page_table: Tensor,
        context_lens: Tensor,
        max_context: int,
        positions: Tensor,
        key_positions: Tensor,
        first: int = 0,
        ancestors: Tensor | None = None,
    ) -> None:
        self.page_table = page_table
        self.context_lens = context_lens
        self.max_context = max_context
        self.positions = positions
        self.key_positions = key_positions
        self.first = first
        self.ancestors = ancestors
        self._memory: dict[Hashable, Any] = {}

    def remembers(self, key: Hashable) -> bool:
        """Whether `remember` has been asked for this key before."""
        return key in self._memory

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned the first time this key was asked for: all layers of a pass share
        what follows from the layout alone."""
        if key not in self._memory:
            self._memory[key] = make()
        found: T = self._memory[key]
        return found

    def view(self, window: int | None = None) -> "View":
        """Who sees whom as dense masks, for implementations that use them."""
        return self.remember(("view", window), lambda: View(self._visible(window)))

    def _visible(self, window: int | None) -> Tensor:
        """[B, N, max_context + M] bool."""
        batch, queries = self.positions.shape
        rows = self.key_positions.shape[1]
        device = self.positions.device
        context = torch.arange(self.max_context, device=device)  # [max_context]
        in_context = (context < self.context_lens[:, None])[:, None].expand(batch, queries, -1)
        if self.ancestors is None:
            own = torch.arange(self.first, self.first + queries, device=device)
            in_tree = (torch.arange(rows, device=device) <= own[:, None]).expand(batch, -1, -1)
        else:
            in_tree = unpack_bits(self.ancestors, rows)
        visible = torch.cat([in_context, in_tree], dim=2)
        if window is None:
            return visible
        keys = torch.cat([context.expand(batch, -1), self.key_positions], dim=1)
        return visible & (keys[:, None] > self.positions[:, :, None] - window)


class View:
    """Dense masks of one layout and window; None where there is nothing to mask.

    On a GPU a mask is never None: to look would be to wait for it.

    Attributes:
        visible: [B, 1, N, K] bool, True where a query sees a key.
        unseen: [B, 1, K, 1] bool, keys no query looks at: they may hold anything, NaN included.
        blind: [B, 1, N, 1] bool, queries that see nothing.
    """

    __slots__ = ("blind", "unseen", "visible")

    def __init__(self, visible: Tensor) -> None:
        look = visible.device.type == "cpu"
        self.visible: Tensor | None = None
        self.unseen: Tensor | None = None
        self.blind: Tensor | None = None
        if look and visible.all():
            return
        self.visible = visible[:, None]
        unseen = ~visible.any(dim=1)[:, None, :, None]
        blind = ~visible.any(dim=2)[:, None, :, None]
        self.unseen = None if look and not unseen.any() else unseen
        self.blind = None if look and not blind.any() else blind


class TreeStructure(NamedTuple):
    """What follows from the parents of B padded trees of N nodes.

    Attributes:
        ancestors: [B, N, W] int32, bit m set if node m is an ancestor of the node or itself. A
            padding node sees itself only.
        depths: [B, N] int64, edges from the root; 0 for padding.
    """

    ancestors: Tensor
    depths: Tensor


class DraftedTrees(NamedTuple):
    """B padded token trees of N nodes, and the distributions their children were drawn from.

    Attributes:
        tokens: [B, N] int64.
        parents: [B, N] int, -1 at the root, -2 for padding, else an earlier node; siblings stand
            in the order they are tried in.
        size: [B] int, real nodes, which come first; 0 is an idle row.
        depth: no path has more edges than this.
        draft_ids: [B, N, K] int64, the support of each node's draft distribution, no token twice.
        draft_probs: [B, N, K] float, zero (and the id void) where there are fewer than K.
        repeats: children were drawn with replacement.
    """

    tokens: Tensor
    parents: Tensor
    size: Tensor
    depth: int
    draft_ids: Tensor | None = None
    draft_probs: Tensor | None = None
    repeats: bool = False


class TargetLaw(NamedTuple):
    """What turns logits of B trees of N nodes into probabilities: those of a node are
    exp((logits - top) / temperature) / total.

    Attributes:
        top: [B, N] float, the largest logit of each node.
        total: [B, N] float.
        temperature: what the logits are divided by.
        entropy: [B, N] float, in nats; None unless asked for.
    """

    top: Tensor
    total: Tensor
    temperature: float
    entropy: Tensor | None = None


class Fp8Weight(NamedTuple):
    """A weight of a product in float8 e4m3 (Micikevicius et al. 2022), with scales.

    Attributes:
        values: [N, K] float8_e4m3fn, contiguous.
        scale: float32, [N], one for each row, or [ceil(N / 128), ceil(K / 128)], one for each
            block of 128 x 128; the weight is values * scale.
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, K]"""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @property
    def blocked(self) -> bool:
        """Whether scales belong to blocks and not to rows."""
        return self.scale.dim() == 2

    def part(self, dim: int, parts: int, one: int) -> "Fp8Weight":
        """One of so many parts of its rows (dim 0) or columns (1), cut as `Tensor.chunk` cuts, in
        memory of its own. Each number has the scale that it has in the whole.

        Raises:
            ValueError: a cut through blocks that have a scale together.
        """
        values, scale = self.values.chunk(parts, dim), self.scale
        size = values[0].shape[dim]
        if self.blocked and size % SCALED_BLOCK:
            lines = ("rows", "columns")[dim]
            raise ValueError(
                f"parts of {size} {lines} would cut through blocks of {SCALED_BLOCK} x "
                f"{SCALED_BLOCK}, which have a scale together"
            )
        if self.blocked or dim == 0:
            scale = scale.chunk(parts, dim)[one]
        return Fp8Weight(values[one].clone(), scale.clone())

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[N, K] of a type, rounded once: of bfloat16 it is exact if scales are powers of two."""
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.scale[:, None]
        if self.blocked:
            rows, columns = self.shape
            scale = self.scale.repeat_interleave(SCALED_BLOCK, 0)[:rows]
            scale = scale.repeat_interleave(SCALED_BLOCK, 1)[:, :columns]
        return _widened(self.values, wide).mul_(scale).to(dtype)


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in float8 e4m3, NaN not among them, in a wide type. On a CPU torch takes them one by
    one, but float16 many at a time: its exponent has a bit more in front, and counts from 8 lower.
    """
    if values.device.type != "cpu":
        return values.to(dtype)
    bits = values.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).to(dtype).mul_(1 << 8)


Weight = Tensor | Fp8Weight


def words(rows: int) -> int:
    """32-bit words that hold one bit for each of `rows` scratch rows."""
    return max(1, (rows + 31) // 32)


def pack_bits(dense: Tensor) -> Tensor:
    """[..., M] bool to [..., W] int32; bit m % 32 of word m // 32 stands for row m."""
    rows = dense.shape[-1]
    padded = torch.nn.functional.pad(dense, (0, words(rows) * 32 - rows))
    shifts = torch.arange(32, device=dense.device)
    packed = (padded.unflatten(-1, (-1, 32)).long() << shifts).sum(
        -1
    )  # [..., W] in 0 .. 2**32 - 1
    return packed.to(torch.int32)


def unpack_bits(packed: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_bits`: [..., W] int32 to [..., rows] bool."""
    shifts = torch.arange(32, device=packed.device, dtype=torch.int32)
    return (packed[..., None] >> shifts & 1).bool().flatten(-2)[..., :rows]
