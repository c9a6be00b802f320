"""A head that reads less: `drafter.quantize=fp8`, the weights of its layers, and its output matrix
where that is no one else's, in float8 e4m3 with a scale for each row (as `models/quantised.py` has
those of models).

What joins states, embeddings, norms and what corrects logits stay in the type of the model. Rules
are told the probabilities of this head, so that lossless ones stay lossless.
"""

from typing import Any

import torch
from torch import Tensor

from specdec.heads.host import Host
from specdec.heads.medusa import MedusaHeads
from specdec.kernels.reference import quantise_weight
from specdec.models.quantised import put, quantise_layer


@torch.no_grad()
def quantise_head(head: Any, host: Host) -> str:
    """Put `Fp8Linear` in the place of linear layers of a head of the size that it runs at.

    Args:
        host: the target.

    Returns:
        What is in float8 now, for the line of a head.
    """
    if isinstance(head, MedusaHeads):
        linears = [(blocks, name) for blocks in head.blocks for name, _ in blocks.named_children()]
        outputs = [(head.lm_heads, name) for name, _ in head.lm_heads.named_children()]
        outputs += [(head, "lm_head")] if head.lm_head is not None else []
        for part, name in linears:
            _quantise(part, name)
    else:
        outputs = [(head, "lm_head")]
        for one in (head, *getattr(head, "later", ())):
            for layer in one.layers:
                quantise_layer(layer)
    own = [one for one in outputs if not _is_of(host, getattr(*one).weight)]
    for part, name in own:
        _quantise(part, name)
    for one in getattr(head, "later", ()):
        one.lm_head = head.lm_head
    return "layers and output in fp8" if own else "layers in fp8"


def _quantise(part: Any, name: str) -> None:
    linear = getattr(part, name)
    put(part, name, quantise_weight(linear.weight.data), linear.bias)


def _is_of(host: Host, weight: Tensor) -> bool:
    """Whether an output matrix is the target's, or its first rows. By its numbers: ranks that
    share a target have copies, and are to do the same as one process."""
    return torch.equal(weight, host.output[: len(weight)])
