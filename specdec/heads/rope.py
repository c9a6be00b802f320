"""Rotary angles of heads: a head's own, never the target's."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DEFAULT_THETA = 10_000.0
THETA_IGNORED = ("linear", "dynamic")  # by the code that raw files were trained with


def rope_parameters(
    layer: Mapping[str, Any], name: str, *, wrapped: bool, theta: float | None
) -> dict[str, Any]:
    """As transformers has them, from the old spelling (rope_theta, rope_scaling) or the new.

    Raw files follow the reference (SafeAILab/EAGLE cnets.py, SpecForge llama3_eagle.py): without
    rope_theta it is 10,000, and with linear or dynamic scaling too, whatever config.json says.

    Args:
        layer: config.json, or the part of it that is about the layers.
        wrapped: whether `speculators` wrote it, which runs transformers.
        theta: instead of the head's own.

    Raises:
        ValueError: a scaling that transformers does not know.
    """
    new = layer.get("rope_parameters") or {}
    old = layer.get("rope_scaling") or {}
    found = dict(new or old)
    kind = found.pop("type", None)
    kind = found.setdefault("rope_type", kind or "default")
    if kind == "mrope":  # its three positions of a text token are one
        kind = found["rope_type"] = "default"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"{name}: config.json asks for rope_scaling of type {kind!r}; there are default, "
            f"{', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    own = found.get("rope_theta", layer.get("rope_theta"))
    if old and not new and not wrapped and kind in THETA_IGNORED:
        own = None
    found["rope_theta"] = float(theta or own or DEFAULT_THETA)
    return found
