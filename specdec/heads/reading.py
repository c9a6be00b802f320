"""From config.json and the shapes of tensors to the configuration of a recurrent head."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, Qwen3Config

from specdec.heads.files import CONFIG, HeadFiles, object_in
from specdec.heads.layouts import Layout
from specdec.heads.recurrent import Eagle3Config
from specdec.heads.rope import rope_parameters
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap

if TYPE_CHECKING:
    from specdec.heads.formats import Host


def eagle3_config(
    files: HeadFiles,
    layout: Layout,
    host: "Host",
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
) -> Eagle3Config:
    """Of a head of EAGLE-3.

    Raises:
        ValueError: fields that are missing, or contradict tensors or target.
    """
    config, layout_files = files.config, layout.files
    layer = object_in(config, "transformer_layer_config", files.name) or config
    shapes = {ours: files.shapes[theirs] for ours, theirs in layout_files.items()}
    decoder = decoder_config(layer, shapes, files.name, layout=layout, rope_theta=rope_theta)
    state_size = int(config.get("target_hidden_size") or decoder.hidden_size)
    if state_size != host.state_size:
        raise ValueError(
            f"{files.name}: reads states of {state_size} numbers, and those of {host.name} have "
            f"{host.state_size}: this head belongs to another target"
        )
    where = settled_taps(files, layout, host, taps)
    rows = shapes.get("lm_head.weight", (host.vocab_size,))[0]
    pairs = sum(
        shapes.get(f"layers.{index}.self_attn.q_proj.weight", (0, 0))[1] == 2 * decoder.hidden_size
        for index in range(decoder.num_hidden_layers)
    )
    fallback = layout.wrapped  # readers of `speculators` files take a missing field for true
    return Eagle3Config(
        layer=decoder,
        taps=where,
        state_size=state_size,
        target_vocab=shapes.get("embed_tokens.weight", tuple(host.embedding.shape))[0],
        vocab_size=int(config.get("draft_vocab_size") or rows),
        output_bias="layers.0.self_attn.o_proj.bias" in shapes,
        norm_before_residual=bool(config.get("norm_before_residual", fallback)),
        norm_before_fc="input_norm.weight" in shapes,
        fc_norm="fc_norm.0.weight" in shapes,
        norm_output=bool(config.get("norm_output", False)),
        fc="fc.weight" in shapes,
        fc_bias="fc.bias" in shapes,
        pairs=pairs,
    )


def decoder_config(
    layer: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    *,
    layout: Layout,
    rope_theta: float | None,
) -> Any:
    """Of its layers, as transformers has it. The size of a head is taken from q_proj: config.json
    may not say it, or say it wrong.

    Raises:
        ValueError: a size that config.json does not state.
    """
    for field in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if not isinstance(layer.get(field), int) or layer[field] < 1:
            raise BrokenFilesError(f"{name}: {CONFIG} states no {field}; take the head's own")
    heads = layer["num_attention_heads"]
    rows = shapes.get("layers.0.self_attn.q_proj.weight", (0,))[0]
    normed = "layers.0.self_attn.q_norm.weight" in shapes
    layers = [key.split(".")[1] for key in shapes if key.startswith("layers.")]
    made = (Qwen3Config if normed else LlamaConfig)(
        hidden_size=layer["hidden_size"],
        intermediate_size=layer["intermediate_size"],
        num_hidden_layers=1 + max(map(int, layers)),
        num_attention_heads=heads,
        num_key_value_heads=layer.get("num_key_value_heads") or heads,
        head_dim=rows // heads or layer.get("head_dim"),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        max_position_embeddings=layer.get("max_position_embeddings", 2048),
        rope_parameters=rope_parameters(layer, name, wrapped=layout.wrapped, theta=rope_theta),
        attention_bias="layers.0.self_attn.q_proj.bias" in shapes,
        hidden_act=layer.get("hidden_act", "silu"),
    )
    made._attn_implementation = "eager"
    return made


def settled_taps(
    files: HeadFiles, layout: Layout, host: "Host", taps: Sequence[Tap] | None
) -> tuple[Tap, ...]:
    """Which states it reads, as counted here, by the setting, its files or its layout's default.

    Raises:
        ValueError: states that the target does not have, or one twice that no file names twice.
    """
    n, stated = host.layers, files.config.get("eagle_aux_hidden_state_layer_ids")
    found: tuple[Tap, ...] = tuple(taps or stated or (2, n // 2, n - 3))
    beyond = [tap for tap in found if tap != "normal" and not 0 <= int(tap) <= n]
    if beyond:
        raise ValueError(
            f"{files.name}: reads the state after layer {beyond[0]}, and {host.name} has {n} "
            f"layers: this head belongs to another target"
        )
    if len(set(found)) < len(found) and (taps or not stated):
        raise ValueError(
            f"{files.name}: would read states {' '.join(map(str, found))} of the {n} layers of "
            f"{host.name}, one of them twice; say which ones by drafter.taps"
        )
    return found
