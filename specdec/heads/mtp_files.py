"""From config.json and tensors to an MTP layer.

Sources: XiaomiMiMo/MiMo-7B `modeling_mimo.py`, vLLM `models/mimo_mtp.py` and
`models/qwen3_next_mtp.py`, transformers `models/qwen3_5`, vllm-project/speculators `models/mtp`.
vLLM and SGLang blot out the embedding of a sequence's first pair; MiMo's own code does not, nor
does this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.files import CONFIG, HeadFiles
from specdec.heads.host import Host
from specdec.heads.layouts import Layout
from specdec.heads.placing import linear_of
from specdec.heads.reading import check_states, common, decoder_config
from specdec.heads.recurrent import MTPConfig, MTPHead
from specdec.heads.taps import settled_taps
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap

CENTRED = ("qwen3_next", "qwen3_5_text")  # layers whose norms multiply by 1 + weight
HANDED_ON = {None: True, "normal": True, "hidden": False}  # drafter.feedback: is it normed
QUERY, OUTPUT = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.o_proj.weight"


@dataclass(frozen=True, kw_only=True)
class HowMTP:
    """What is not left to the files.

    Args:
        feedback: which state a layer hands on, of `HANDED_ON`.
        layers: how many are used, from the first; the last of them is used again at all further
            depths. None is all there are.

    Raises:
        ValueError: a setting out of range.
    """

    feedback: str | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.feedback not in HANDED_ON:
            raise ValueError(f"drafter.feedback={self.feedback}: must be normal, hidden or null")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"drafter.layers={self.layers}: must be at least 1, or null")

    def chosen(self, layout: Layout, name: str) -> list[Layout]:
        """That of each layer that is used.

        Raises:
            ValueError: there are fewer.
        """
        every = [layout.files, *layout.later]
        if self.layers is not None and self.layers > len(every):
            raise ValueError(
                f"drafter.layers={self.layers}: {name} holds {len(every)} of MTP; choose at most "
                f"so many"
            )
        return [replace(layout, files=files) for files in every[: self.layers]]


def mtp_config(
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
    how: HowMTP,
) -> MTPConfig:
    """Of an MTP layer. Every published one hands on its normed state, as vLLM and SGLang run it.

    Raises:
        ValueError: fields that are missing, or contradict tensors or target.
    """
    shapes, layer = layout.shapes(files.shapes), {**layout.layer, "num_hidden_layers": 1}
    rows, columns = shapes.get(QUERY, (0, 0))
    gated = rows > 0 and rows == 2 * shapes.get(OUTPUT, (0, 0))[1]
    if gated:
        shapes[QUERY] = rows // 2, columns
    rope = dict(layer.get("rope_parameters") or {})
    share = rope.pop("partial_rotary_factor", layer.pop("partial_rotary_factor", None) or 1)
    for field in ("mrope_section", "mrope_interleaved"):  # three positions, of text the same
        rope.pop(field, None)
    if rope:
        layer["rope_parameters"] = rope
    layout = replace(layout, layer=layer)
    decoder = decoder_config(layout, shapes, files.name, rope_theta=rope_theta)
    check_states(files, host, decoder.hidden_size, decoder.hidden_size, 1)
    where = settled_taps(files, layout, host, taps)
    if len(where) != 1:
        raise ValueError(f"{files.name}: an MTP layer reads one state; give drafter.taps one")
    return MTPConfig(
        **common(files, layout, host, decoder),
        taps=where,
        norm_output=HANDED_ON[how.feedback],
        gated=gated,
        turned=_turned(share, decoder.head_dim, files.name),
    )


def _turned(share: Any, size: int, name: str) -> int | None:
    """How many of the numbers of an attention head rotary positions turn."""
    good = isinstance(share, int | float) and 0 < share <= 1
    if not good or int(size * share) % 2:
        raise BrokenFilesError(
            f"{name}: {CONFIG} has partial_rotary_factor={share}, which must turn an even number "
            f"of the {size} of an attention head; take the head's own {CONFIG}"
        )
    return None if share == 1 else int(size * share)


def handed_on(head: MTPHead) -> list[str]:
    """Flags for the start of a run."""
    config = head.config
    fed = f"hands on {'normed' if config.norm_output else 'unnormed'} states"
    turned = [] if config.turned is None else [f"turns {config.turned} of each head"]
    return [fed, *["gated"] * config.gated, *turned]


@torch.no_grad()
def unfold(head: MTPHead) -> None:
    """Give a head without memory the shapes of its files: the rows of queries and gates are in one
    product there, turn by turn for each attention head."""
    if head.config.gated:
        attention: Any = head.layers[0].self_attn
        query = attention.q_proj
        del attention.gate_proj
        attention.q_proj = nn.Linear(
            query.in_features, 2 * query.out_features, bias=query.bias is not None, device="meta"
        )


@torch.no_grad()
def fold(head: MTPHead, layout: Layout) -> None:
    """Turn a head that was read as its files have it into one that is run as all others are."""
    layer = head.layers[0]
    attention: Any = layer.self_attn
    size = attention.head_dim
    if head.config.gated:
        queries, gates = attention.q_proj.weight.unflatten(0, (-1, 2, size)).unbind(1)
        attention.q_proj = linear_of(queries.flatten(0, 1))
        attention.gate_proj = linear_of(gates.flatten(0, 1))
    if layout.layer.get("model_type") in CENTRED:
        for name, parameter in head.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data = parameter + 1
    if head.config.turned is not None:
        order = _order(size, head.config.turned).to(attention.q_proj.weight.device)
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            part = getattr(attention, name, None)
            for parameter in () if part is None else part.parameters():
                parameter.data = parameter.unflatten(0, (-1, size))[:, order].flatten(0, 1)
    if layout.hidden_first:
        head.fc.weight.data = head.fc.weight.roll(head.width, dims=1)


def _order(size: int, turned: int) -> Tensor:
    """Numbers of an attention head, so that those which rotary positions turn together are half a
    head apart: queries and keys in one order have the products that they had in another."""
    numbers = torch.arange(size)
    first, second = numbers[:turned].chunk(2)
    others = numbers[turned:].chunk(2)
    return torch.cat([first, others[0], second, others[1]])
