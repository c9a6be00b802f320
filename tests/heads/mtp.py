"""Small random MTP layers, written as models and `speculators` publish them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.heads import made
from tests.heads.oracle import Facts

QWEN = ("qwen", "speculators, qwen3_5")  # whose layers are gated, and norms multiply by 1 + weight
PARTIAL = {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True}


def mtp(
    folder: Path,
    target: Any,
    *,
    layout: str = "mimo",
    whole: bool = False,
    layers: int = 1,
    theta: float = 50.0,
    config: Mapping[str, Any] | None = None,
) -> Facts:
    """An MTP layer for a target of width `made.D`.

    Args:
        layout: mimo, qwen, or speculators, which has layers of several types.
        whole: among the tensors of the target, without its matrices else.
        layers: each for a depth.
        config: more of config.json.
    """
    random, of_qwen, size = made.Random(), layout in QWEN, 16 if layout in QWEN else 8
    start = {"mimo": "model.mtp_layers", "qwen": "mtp.layers"}.get(layout, "mtp_layers")
    normed, bias = layout not in ("mimo", "speculators, qwen2"), "" if of_qwen else "qkv"
    names, tensors = tuple(f"{start}.{index}" for index in range(layers)), dict[str, Tensor]()
    for name in names:
        tensors |= _layer(random, name, size, bias=bias, normed=normed, gated=of_qwen)
        if layout != "qwen":
            parts = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
            tensors |= _around(random, *(f"{name}.{part}" for part in parts))
    if layout == "qwen":
        norms = (f"mtp.pre_fc_norm_{name}" for name in ("embedding", "hidden"))
        tensors |= _around(random, *norms, "mtp.fc", "mtp.norm")
    effective = made.doubled(tensors)
    if of_qwen:
        tensors = {k: v - 1 if "norm" in k else v for k, v in tensors.items()}
    if whole:
        tensors |= {key: value.clone() for key, value in target.state_dict().items()}
    rope = {"rope_type": "default", "rope_theta": theta, **(PARTIAL if of_qwen else {})}
    layer = made.layer_config(target, rope_parameters=rope, head_dim=size)
    made.write(folder, _config(layout, layer) | dict(config or {}), tensors, "model.safetensors")
    flags = {"gated"} if of_qwen else set()
    return Facts(
        tensors=effective,
        layers=names,
        embedding=target.get_input_embeddings().weight.detach().double(),
        output=target.get_output_embeddings().weight.detach().double(),
        heads=made.HEADS,
        eps=made.EPS,
        taps=("normal",),
        ids=torch.arange(target.config.vocab_size),
        rope={"theta": theta, **({"turned": size // 4} if of_qwen else {})},
        flags=frozenset(flags | ({"hidden first"} if layout == "mimo" else set())),
    )


def _layer(
    random: made.Random, name: str, size: int, *, bias: str, normed: bool, gated: bool
) -> dict[str, Tensor]:
    norms = ("input_layernorm",)
    made_ = random.layer(name, made.D, head_dim=size, bias=bias, normed=normed, norms=norms)
    if gated:
        rows = 2 * made.HEADS[0] * size
        made_[f"{name}.self_attn.q_proj.weight"] = random.matrix(rows, made.D)
    return made_


def _around(
    random: made.Random, of_token: str, of_state: str, fc: str, last: str
) -> dict[str, Tensor]:
    return {
        f"{of_token}.weight": random.norm(made.D),
        f"{of_state}.weight": random.norm(made.D),
        f"{fc}.weight": random.matrix(made.D, 2 * made.D),
        f"{last}.weight": 3 * random.norm(made.D),  # so that some tokens are likely
    }


def _config(layout: str, layer: dict[str, Any]) -> dict[str, Any]:
    if layout == "mimo":
        rope = layer.pop("rope_parameters")  # in the old spelling
        whole = {**layer, "model_type": "mimo", "rope_theta": rope["rope_theta"]}
        return {**whole, "num_hidden_layers": 36, "num_nextn_predict_layers": 1}
    if layout == "qwen":  # a model of images and texts
        text = {**layer, "model_type": "qwen3_5_text", "num_hidden_layers": 24}
        return {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 2}}
    kind = {"speculators": "qwen3", "speculators, qwen2": "qwen2"}.get(layout, "qwen3_5_text")
    wrapper: dict[str, Any] = made.wrapper({**layer, "model_type": kind}, (), ())
    wrapper |= {"speculators_model_type": "mtp", "architectures": ["MTPDraftModel"]}
    return wrapper | {"num_nextn_predict_layers": 1}
