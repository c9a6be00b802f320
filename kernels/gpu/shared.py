"""Sums over the GPUs of a host: each leaves the parts of its product in memory that the others can
read, and whoever adds them up (`add_norm_kernel`) reads all of them over NVLink, in the order of
ranks. There is no reduction of its own, and what all ranks get has equal bits.

For each row of a product two flags go to and fro between any two ranks. Before a rank reads it
sets, in the memory of each other, the flag that says its parts are there, and waits for theirs,
which it takes down: they are 0 again afterwards, and a CUDA graph needs no counters. A rank writes
to the same part of the memory at every other product; it has then met all others in between, who
had read what it overwrites. (The pattern of one-shot reductions: yifuwang/symm-mem-recipes.)
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.stream import PROGRAMS, STREAM_ROWS

FEW_ROWS = 16  # up to so many parts are in float32; more would take too long to read
TILE = 64 * 4  # bytes of a float32 row of a tile of the result
# Of one product: as many splits as there are ever programs for, and rows.
PART_BYTES = 3 * PROGRAMS * TILE * STREAM_ROWS
FLAG_BYTES = 4


class Everyone(NamedTuple):
    """Where all ranks have their parts.

    Args:
        table: address on the device of W addresses, of the memory of each rank.
        offset: bytes in it before the parts.
        rank, size: of this process, and W.
    """

    table: int
    offset: int
    rank: int
    size: int


class SharedParts:
    """Memory for the parts of products, of all ranks of the default group; all make it together,
    and none uses it before all have made it.

    Args:
        device: this rank's GPU.

    Raises:
        RuntimeError: GPUs that cannot read each other's memory.
    """

    ROWS = STREAM_ROWS  # of a product at most: as many programs wait for each other

    def __init__(self, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._flags = self.ROWS * self.size * FLAG_BYTES
        here = torch.device("cuda", torch.cuda.current_device())
        self._memory = symmetric.empty(
            self._flags + 2 * PART_BYTES, dtype=torch.uint8, device=here
        )
        everyone: Any = dist.group.WORLD
        self._handle: Any = symmetric.rendezvous(self._memory, everyone.group_name)
        if self._handle.multicast_ptr:
            raise RuntimeError("NVLink multicast is on: set TORCH_SYMM_MEM_DISABLE_MULTICAST=1")
        self._memory.zero_()
        torch.cuda.synchronize(device)
        self._turn = 0

    def place(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Where the parts of the next product go."""
        offset = self._flags + self._turn * PART_BYTES
        self._turn = 1 - self._turn
        splits, rows, width = shape
        needed = splits * rows * width * dtype.itemsize
        if needed > PART_BYTES:
            raise RuntimeError(f"parts of {needed} bytes exceed the {PART_BYTES} there are")
        return self._memory[offset : offset + needed].view(dtype).view(shape)

    def fits(self, rows: int, width: int) -> bool:
        """Whether parts of a product may go there, whatever its splits."""
        return rows <= self.ROWS and width * rows * 4 <= PART_BYTES

    def of(self, parts: Tensor | None) -> Everyone | None:
        """Where those of all ranks are, if these lie in this memory."""
        if parts is None:
            return None
        offset = parts.data_ptr() - self._memory.data_ptr()
        if not self._flags <= offset < self._memory.numel():
            return None
        return Everyone(self._handle.buffer_ptrs_dev, offset, self.rank, self.size)


@triton.jit
def memory_of(table, rank, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a type in the memory of a rank, so many bytes from its beginning."""
    addresses = table.to(tl.pointer_type(tl.uint64))
    return (tl.load(addresses + rank) + OFFSET).to(tl.pointer_type(DTYPE))


@triton.jit
def meet(table, row, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Wait until all ranks have their parts of this row in place; each calls it."""
    zero = tl.full([], 0, tl.uint32)
    one = tl.full([], 1, tl.uint32)
    mine = memory_of(table, RANK, 0, tl.uint32) + row * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            theirs = memory_of(table, peer, 0, tl.uint32) + row * RANKS + RANK
            while tl.atomic_cas(theirs, zero, one, sem="release", scope="sys") != 0:
                pass
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            while tl.atomic_cas(mine + peer, one, zero, sem="acquire", scope="sys") != 1:
                pass
