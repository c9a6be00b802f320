"""Rotary angles of heads: a head's own, never the target's."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.models.weights import BrokenFilesError

DEFAULT_THETA = 10_000.0
THETA_IGNORED = ("linear", "dynamic")  # by the code that raw files were trained with
PLAIN = ("mrope", "dynamic")


def rope_parameters(
    layer: Mapping[str, Any], name: str, *, wrapped: bool, theta: float | None
) -> dict[str, Any]:
    """As transformers has them, from the old spelling (rope_theta, rope_scaling) or the new.

    Raw files follow the code they were trained with (SafeAILab/EAGLE `cnets.py`, SpecForge
    `llama3_eagle.py`): without rope_theta it is 10,000, and with linear or dynamic scaling too,
    whatever config.json says.

    Two types become the plain one. mrope gives a token of text three positions that are the same.
    dynamic changes nothing within the positions that a head was trained on; beyond them it turns
    all angles with each token, and keys that are cached already would have others.

    Args:
        layer: config.json, or the part of it that is about the layers.
        wrapped: whether `speculators` wrote it, which runs transformers.
        theta: instead of the head's own.

    Raises:
        ValueError: a scaling that transformers does not know, or fields that are none.
    """
    parts = (layer.get("rope_parameters"), layer.get("rope_scaling"))
    for part in parts:
        if part is not None and not isinstance(part, dict):
            raise BrokenFilesError(
                f"{name}: config.json has a rope_scaling that is no object; take the head's own"
            )
    new, old = (dict(part or {}) for part in parts)
    found = new or old
    kind = found.pop("type", None)
    kind = found.setdefault("rope_type", kind or "default")
    if kind not in ("default", *PLAIN, *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"{name}: config.json asks for rope_scaling of type {kind!r}, which is not known; "
            f"take another head, or correct it: {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    own = found.get("rope_theta", layer.get("rope_theta"))
    if not new and not wrapped and kind in THETA_IGNORED:
        own = None
    base = float(theta or own or DEFAULT_THETA)
    if kind in PLAIN:
        return {"rope_type": "default", "rope_theta": base}
    return {**found, "rope_theta": base}
