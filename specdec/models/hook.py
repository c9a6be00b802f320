"""How attention of a transformers model is taken over, without touching its modelling code.

transformers hands an extra keyword of `model(...)` on to the attention function of every layer.
One function is registered here; the keyword carries one `ForwardPass`, which knows the cache and
who sees whom.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.models.forward import ForwardPass

ATTENTION = "specdec_paged"


class UnsupportedError(Exception):
    """Why a model cannot run over the paged cache."""


class NotFiniteError(Exception):
    """A model computes NaN or infinities."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: ForwardPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if paged is None:
        raise UnsupportedError("its layers do not hand keywords on to the attention function")
    if attention_mask is not None:
        raise UnsupportedError("it masks attention by itself")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    paged.write(layer, key, value)
    out = paged.attend(
        layer,
        query,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.contiguous(), None  # some models take a view of it


AttentionInterface.register(ATTENTION, _attention)
