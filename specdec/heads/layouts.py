"""Layouts: what a head is, told by its tensors first and by config.json second, and the names its
tensors have here, which are those of `speculators`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from specdec.models.weights import BrokenFilesError

Kind = Literal["eagle3", "eagle", "medusa"]
Shapes = Mapping[str, tuple[int, ...]]

REFUSED = {  # tensors that only heads of these kinds have
    "MTP layers": r"(model\.)?(mtp|mtp_layers)\.|.*\.eh_proj\.weight",
    "a P-EAGLE head": r"(model\.)?mask_hidden",
    "a DFlash 2 head": r"candidate_selector\.",
    "a DSpark head": r"markov_head\.",
    "a Domino head": r"prefix_gru\.",
    "a DFlash head": r"hidden_norm\.weight",
    "a Hydra head": r"hydra_mlp\.|hydra_lm_head\.",
    "an MLP speculator": r"(speculator\.)?emb\.0\.weight",
    "a ReDrafter head": r"rnn_w\.weight",
}
IGNORED = r"t2d|verifier_.*|(.*\.)?rotary_emb\.inv_freq"  # known, and of no use here
READ = "EAGLE-1, EAGLE-2, EAGLE-3, HASS and Medusa are read"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was found.

    Args:
        kind: which class of head.
        label: what it is called at the start of a run.
        wrapped: whether config.json is that of `speculators`.
        names: of the tensors that count, here, by their names in the file.
    """

    kind: Kind
    label: str
    wrapped: bool
    names: Mapping[str, str]

    @property
    def files(self) -> dict[str, str]:
        """Names in the file, by those here."""
        return {ours: theirs for theirs, ours in self.names.items()}


def recognise(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    """Tell what a file holds.

    Raises:
        ValueError: a head that is not read, or none.
    """
    stated = config.get("speculators_model_type")
    for what, pattern in REFUSED.items():
        if any(re.match(pattern, key) for key in shapes):
            raise ValueError(f"{name}: holds {what}, which is not read; {READ}")
    plain = {key: key.removeprefix("model.") for key in shapes if not re.fullmatch(IGNORED, key)}
    bare = set(plain.values())
    if any(key.startswith("midlayer.") for key in bare) or "layers.0.hidden_norm.weight" in bare:
        label = "EAGLE-3, " + ("speculators" if stated else "SafeAILab")
        names = {key: _eagle3(key_here) for key, key_here in plain.items()}
        return Layout(kind="eagle3", label=label, wrapped=bool(stated), names=names)
    raise BrokenFilesError(
        f"{name}: its tensors are of no head that is known, as {next(iter(shapes), 'none')}; "
        f"{READ}"
    )


def _eagle3(key: str) -> str:
    return re.sub(r"^midlayer\.", "layers.0.", key)
