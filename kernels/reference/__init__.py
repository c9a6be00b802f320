"""Plain torch functions that define what the kernels compute, on any device and in any floating
type.

Legend: B sequences, N tree nodes or query rows, M scratch rows, L layers, HQ query heads, HKV
key-value heads, D head size, S tokens of a page, A accepted nodes.
"""

from typing import Any

from specdec.kernels.reference.attend import attention, gather_context, tree_attention
from specdec.kernels.reference.cache import (
    as_stored,
    commit_path,
    compact_path,
    quantise,
    write_tree,
)
from specdec.kernels.reference.trees import tree_structure

RULES: dict[str, Any] = {}
"""None: the rules of `specdec.verifier` are their own definition, in torch."""

__all__ = [
    "RULES",
    "as_stored",
    "attention",
    "commit_path",
    "compact_path",
    "gather_context",
    "quantise",
    "tree_attention",
    "tree_structure",
    "write_tree",
]
