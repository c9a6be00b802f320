"""Plain torch functions that define what the kernels compute, on any device and in any floating
type.

Legend: B sequences, N tree nodes or query rows, M scratch rows, L layers, HQ query heads, HKV
key-value heads, D head size, S tokens of a page, A accepted nodes.
"""

from typing import Any

from specdec.kernels.reference.accept import draw_rest, masses, target_law
from specdec.kernels.reference.attend import attention, gather_context, tree_attention
from specdec.kernels.reference.cache import (
    as_stored,
    commit_path,
    quantise,
    write_tree,
)
from specdec.kernels.reference.draft import over, top_tokens, uniforms
from specdec.kernels.reference.growth import best, compact, extend, places
from specdec.kernels.reference.layer import (
    add_norm,
    gated_linear,
    linear,
    project,
    quantise_weight,
    rotate_and_write,
)
from specdec.kernels.reference.process import note_tokens, process_logits
from specdec.kernels.reference.traverse import divisor, traverse
from specdec.kernels.reference.trees import tree_structure

LOOKS = True
"""Whether the host may look at what was computed, and what follows depend on it: sizes are read,
passes shrink to them, walks go level by level. Where it is False a step is a fixed sequence of few
launches, which a CUDA graph can capture."""

RULES: dict[str, Any] = {}
"""None: the rules of `specdec.verifier` are their own definition, in torch."""

__all__ = [
    "LOOKS",
    "RULES",
    "add_norm",
    "as_stored",
    "attention",
    "best",
    "commit_path",
    "compact",
    "divisor",
    "draw_rest",
    "extend",
    "gated_linear",
    "gather_context",
    "linear",
    "masses",
    "note_tokens",
    "over",
    "places",
    "process_logits",
    "project",
    "quantise",
    "quantise_weight",
    "rotate_and_write",
    "target_law",
    "top_tokens",
    "traverse",
    "tree_attention",
    "tree_structure",
    "uniforms",
    "write_tree",
]
