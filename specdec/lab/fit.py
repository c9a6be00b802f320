"""Whether a method fits a target and the memory that is free, before anything is allocated."""

from specdec.models.paged import PagedLM
from specdec.models.placement import free_memory
from specdec.protocols import TreePolicy
from specdec.request import Capacity


def check_fit(target: PagedLM, tree: TreePolicy, max_new_tokens: int) -> None:
    """Raise ValueError for more tokens than the target's context has, or for trees with more
    levels than that, or more children of a node than there are tokens."""
    context, vocabulary = target.max_context, target.vocab_size
    if max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the context of the target has {context} tokens; "
            f"lower it to {context - 1} at most"
        )
    levels = tree.levels(None) if tree.budget else 0
    if levels >= context:
        raise ValueError(
            f"tree.budget={tree.budget}: trees of {levels} levels do not fit the target's context "
            f"of {context} tokens; lower it"
        )
    widest = max((tree.width(level) for level in range(levels)), default=0)
    if widest > vocabulary:
        raise ValueError(
            f"tree: a node may have {widest} children, and the target has {vocabulary} tokens; "
            f"lower tree.widths, tree.width or the ranks of tree.paths"
        )


def check_memory(target: PagedLM, tree: TreePolicy, capacity: Capacity) -> None:
    """Raise ValueError if keys and values of the target, as far as they are not cut to what there
    is, or its logits at the nodes of all trees exceed the free memory of its device."""
    free, rows = free_memory(target.device), capacity.rows
    pages = capacity.pool_pages
    if capacity.pages is None and target.device.type == "cuda":
        pages = capacity.pages_of_a_row  # more requests wait for them
    kind = capacity.kv_dtype or target.dtype
    tokens = pages * capacity.page_size
    needed = tokens * target.kv_shape.bytes_per_token(kind)
    said = f"batch_size={rows}" if capacity.pages is None else f"cache.pages={capacity.pages}"
    if needed > free:
        raise ValueError(
            f"{said}: keys and values of {tokens} tokens take {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; lower batch_size, max_new_tokens or cache.pages"
        )
    nodes = rows * (tree.budget + 1)
    logits = nodes * target.vocab_size * 4
    if logits > free:
        raise ValueError(
            f"batch_size={rows}: the logits of {nodes} nodes (tree.budget={tree.budget}) take "
            f"{logits / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; lower one of them"
        )
