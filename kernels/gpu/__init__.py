"""Triton kernels for NVIDIA GPUs, behind the names and signatures of `specdec.kernels.reference`.

No function waits for the device, and every one may be captured in a CUDA graph: lengths are read
from device tensors when it runs.
"""

from specdec.kernels.gpu.accept import RULES
from specdec.kernels.gpu.attend import tree_attention
from specdec.kernels.gpu.cache import commit_path, write_tree
from specdec.kernels.gpu.draft import top_tokens, uniforms
from specdec.kernels.gpu.growth import best, compact, extend, places
from specdec.kernels.gpu.layer import add_norm, rotate_and_write
from specdec.kernels.gpu.linear import gated_linear, linear, project
from specdec.kernels.gpu.process import note_tokens, process_logits
from specdec.kernels.gpu.race import draw_rest
from specdec.kernels.gpu.rounding import quantise
from specdec.kernels.gpu.scan import target_law
from specdec.kernels.gpu.traverse import divisor, traverse
from specdec.kernels.gpu.trees import tree_structure
from specdec.kernels.reference.accept import masses

LOOKS = False

__all__ = [
    "LOOKS",
    "RULES",
    "add_norm",
    "best",
    "commit_path",
    "compact",
    "divisor",
    "draw_rest",
    "extend",
    "gated_linear",
    "linear",
    "masses",
    "note_tokens",
    "places",
    "process_logits",
    "project",
    "quantise",
    "rotate_and_write",
    "target_law",
    "top_tokens",
    "traverse",
    "tree_attention",
    "tree_structure",
    "uniforms",
    "write_tree",
]
