"""Which states of the target a head reads. The authors count them in several ways, and one off
does not crash: it costs accepted tokens (sglang#25454)."""

from collections.abc import Sequence
from typing import Any

from specdec.heads.files import CONFIG, HeadFiles, object_in
from specdec.heads.host import Host
from specdec.heads.layouts import BLOCK_KINDS, EAGLE3_KINDS, Layout
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap

LISTED = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")


def usual_taps(layers: int) -> tuple[int, int, int]:
    """What EAGLE-3 reads of a target of so many layers (Li et al. 2025), if nothing else is said;
    of a small one a state twice."""
    return 2, layers // 2, layers - 3


def usual_block_taps(layers: int, own: int) -> tuple[Tap, ...]:
    """What a DFlash head of so many layers of its own reads, if nothing else is said: outputs of
    layers, spread from the second to the last but two (z-lab/dflash, earlier code)."""
    if own == 1:
        return (layers // 2 + 1,)
    return tuple(2 + round(index * (layers - 4) / (own - 1)) for index in range(own))


def settled_taps(
    files: HeadFiles, layout: Layout, host: Host, taps: Sequence[Tap] | None
) -> tuple[Tap, ...]:
    """By the setting, else by the files, else those of the layout.

    Raises:
        ValueError: states that the target does not have, or one twice that no file names twice.
    """
    n, stated = host.layers, _stated(files, layout, host.layers)
    usual: tuple[Tap, ...] = usual_taps(n) if layout.kind in EAGLE3_KINDS else ("normal",)
    if layout.kind in BLOCK_KINDS:
        usual = usual_block_taps(n, int(layout.layer.get("num_hidden_layers") or 1))
    found = tuple(taps) if taps else stated or usual
    for tap in found:
        if tap != "normal" and (type(tap) is not int or not 0 <= tap <= n):
            raise ValueError(
                f"{files.name}: reads state {tap!r}, and those of {host.name} are 0 to {n} and "
                f"normal; say others by drafter.taps, or take its own target"
            )
    if len(set(found)) < len(found) and found != stated:
        raise ValueError(
            f"{files.name}: would read states {list(found)}, one of them twice, as {host.name} "
            f"has {n} layers; say which ones by drafter.taps"
        )
    return found


def _stated(files: HeadFiles, layout: Layout, layers: int) -> tuple[Tap, ...]:
    """What config.json says, counted as here; empty if it says nothing."""
    states = {**files.config, **object_in(files.config, "eagle_config", files.name)}
    listed = next((found for key in LISTED if (found := _listed(states, key, files.name))), ())
    if layout.wrapped:
        return listed
    if layout.kind in BLOCK_KINDS:  # outputs of layers; of the last, transformers shows the norm's
        said = {**files.config, **object_in(files.config, "dflash_config", files.name)}
        own = _listed(said, "target_layer_ids", files.name)
        return tuple("normal" if tap == layers - 1 else _next(tap) for tap in own)
    if layout.kind not in EAGLE3_KINDS:
        return ()
    if states.get("use_aux_hidden_state") is False:
        return ("normal",)
    outputs = _listed(states, "target_layer_ids", files.name)  # DeepSpec: outputs of layers
    # Raw files hold outputs of layers, counted from 0, or states; outputs begin with layer 1 by
    # custom, states with 2 (sgl-project/sglang pull request 25454).
    if outputs or listed[:1] == (1,):
        return tuple(map(_next, outputs or listed))
    return listed


def _next(tap: Tap) -> Tap:
    """The output of a layer, counted from 0, as a state."""
    return tap if tap == "normal" else tap + 1


def _listed(config: dict[str, Any], field: str, name: str) -> tuple[Tap, ...]:
    found = config.get(field) or []
    good = isinstance(found, list) and all(type(tap) is int or tap == "normal" for tap in found)
    if not good:
        raise BrokenFilesError(
            f"{name}: {CONFIG} has {field}={found}, which must be a list of layers; take the "
            f"head's own {CONFIG}"
        )
    return tuple(found)
