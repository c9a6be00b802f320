"""Launch parameters of the attention kernel, from the shape of a call; measured on an H200."""

from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How large the pieces of work of a program are.

    Args:
        rows: query rows (nodes times query heads of a group) of a program.
        keys: context keys of an iteration.
        tree_keys: tree keys of an iteration, a divisor of `keys` and of 32.
        tree_cost: what `keys` keys of the tree cost, in blocks of context keys: they are masked
            and not prefetched.
        warps, stages: of a program, and of its software pipeline.
        per_processor: programs that run at the same time on one multiprocessor.
        bulk: read pages with the bulk copy engine (TMA); a block then lies in one page.
    """

    rows: int
    keys: int
    tree_keys: int
    tree_cost: int
    warps: int = 4
    stages: int
    per_processor: int
    bulk: bool = False


EXACT = Blocks(rows=16, keys=32, tree_keys=16, tree_cost=1, warps=8, stages=3, per_processor=1)
LARGE_HEADS = Blocks(
    rows=64, keys=32, tree_keys=16, tree_cost=2, warps=8, stages=3, per_processor=1
)
FEW_ROWS = Blocks(rows=16, keys=64, tree_keys=16, tree_cost=1, stages=5, per_processor=2)
FEW_ROWS_LARGE_PAGES = replace(FEW_ROWS, keys=128, stages=3)
# Memory-bound, but with work for the tensor cores: one deep pipeline beats two shallow ones.
SOME_ROWS = Blocks(rows=64, keys=64, tree_keys=16, tree_cost=2, stages=7, per_processor=1)
MANY_ROWS = Blocks(rows=64, keys=64, tree_keys=32, tree_cost=5, stages=5, per_processor=2)


def choose_blocks(
    *, rows: int, head_dim: int, dtype: torch.dtype, page_size: int, plain: bool
) -> Blocks:
    """Launch parameters for `rows` query rows of a sequence and head.

    They do not depend on the batch, nor on lengths.

    Args:
        rows: nodes times query heads of a group.
        head_dim: the larger of key and value dim.
        dtype: of the queries.
        page_size: tokens of a page.
        plain: pages hold the type of the queries, and the bulk copy engine can read them.
    """
    if dtype == torch.float32:  # no tensor cores: exactness is the point, not speed
        return EXACT
    if head_dim > 128:
        return replace(LARGE_HEADS, rows=min(64, max(16, triton.next_power_of_2(rows))))
    if rows <= 16:
        large = plain and page_size % FEW_ROWS_LARGE_PAGES.keys == 0
        blocks = FEW_ROWS_LARGE_PAGES if large else FEW_ROWS
    else:
        blocks = SOME_ROWS if 32 < rows <= 64 else MANY_ROWS
    return replace(blocks, bulk=plain and page_size % blocks.keys == 0)


def padded(dim: int) -> int:
    """Columns of a tile that holds rows of `dim` elements."""
    return max(16, triton.next_power_of_2(dim))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
