"""Triton kernels for NVIDIA GPUs, behind the names and signatures of `specdec.kernels.reference`.

No function waits for the device, and every one may be captured in a CUDA graph: lengths are read
from device tensors when it runs.
"""

from specdec.kernels.gpu.accept import RULES
from specdec.kernels.gpu.attend import tree_attention
from specdec.kernels.gpu.cache import commit_path, compact_path, write_tree
from specdec.kernels.gpu.rounding import quantise
from specdec.kernels.gpu.trees import tree_structure

__all__ = [
    "RULES",
    "commit_path",
    "compact_path",
    "quantise",
    "tree_attention",
    "tree_structure",
    "write_tree",
]
