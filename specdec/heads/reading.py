"""From config.json and the shapes of tensors to the configuration of a recurrent head."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.heads.files import CONFIG, HeadFiles, object_in
from specdec.heads.host import Host
from specdec.heads.layouts import EAGLE3_KINDS, Layout
from specdec.heads.parallel import ParallelConfig
from specdec.heads.recurrent import Eagle3Config, EagleConfig
from specdec.heads.rope import rope_parameters
from specdec.heads.taps import settled_taps
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap
from specdec.reasons import first_line

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")


def eagle3_config(
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
) -> Eagle3Config:
    """Of a head of EAGLE-3.

    Raises:
        ValueError: fields that are missing, or contradict tensors or target.
    """
    config, shapes = files.config, layout.shapes(files.shapes)
    decoder = decoder_config(layout, shapes, files.name, rope_theta=rope_theta)
    where = settled_taps(files, layout, host, taps)
    width, fc = decoder.hidden_size, where != ("normal",) or "fc.weight" in shapes
    if config_of_states(config, files.name).get("use_aux_hidden_state") is False:
        fc = False  # the files may hold one that is of no use
    columns = shapes.get("fc.weight", (0, 0))[1] if fc else len(where) * width
    stated = int(config.get("target_hidden_size") or 0)
    check_states(files, host, stated, columns, len(where))
    pairs = sum(
        shapes.get(f"layers.{index}.self_attn.q_proj.weight", (0, 0))[1] == 2 * width
        for index in range(decoder.num_hidden_layers)
    )
    return Eagle3Config(
        **common(files, layout, host, decoder),
        taps=where,
        norm_before_residual=bool(config.get("norm_before_residual", layout.wrapped)),
        norm_before_fc=bool(config.get("norm_before_fc", "input_norm.weight" in shapes)),
        fc_norm=bool(config.get("fc_norm", "fc_norm.0.weight" in shapes)),
        # SpecForge trained something else by that name until its pull request 879.
        norm_output=bool(config.get("norm_output", False)),
        fc=fc,
        fc_bias="fc.bias" in shapes,
        pairs=max(pairs, 1),
        windows=_windows(layout, decoder, files.name),
    )


def parallel_config(
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
) -> ParallelConfig:
    """Of a head of P-EAGLE.

    Raises:
        ValueError: as for `eagle3_config`, or no mask token.
    """
    config = eagle3_config(files, layout, host, taps=taps, rope_theta=rope_theta)
    said = dict(files.config)
    said.setdefault("mask_token_id", said.get("ptd_token_id"))  # its first name
    common = {field.name: getattr(config, field.name) for field in fields(config)}
    return ParallelConfig(**common, mask=mask_token(said, config.target_vocab, files.name))


def mask_token(said: Mapping[str, Any], rows: int, name: str) -> int:
    """The token that stands where none is known yet, of an embedding of so many rows."""
    mask = said.get("mask_token_id")
    if type(mask) is not int:
        raise BrokenFilesError(
            f"{name}: {CONFIG} has mask_token_id={mask}, and blocks are filled with that token; "
            f"take the head's own {CONFIG}"
        )
    if not 0 <= mask < rows:
        raise ValueError(
            f"{name}: fills blocks with token {mask}, and the embedding has {rows} rows: this "
            f"head belongs to another target"
        )
    return mask


def unstated(files: HeadFiles, layout: Layout) -> list[str]:
    """What the start of a run should say of flags that no file states. Readers of `speculators`
    files take norm_before_residual for true then (vLLM `speculators/algos.py`)."""
    missing = layout.kind in EAGLE3_KINDS and "norm_before_residual" not in files.config
    remark = "which states no norm_before_residual: taken for true"
    return [remark] if missing and layout.wrapped else []


def eagle_config(
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
) -> EagleConfig:
    """Of a head of EAGLE-1, EAGLE-2 or HASS.

    Raises:
        ValueError: as for `eagle3_config`.
    """
    config, shapes = files.config, layout.shapes(files.shapes)
    decoder = decoder_config(layout, shapes, files.name, rope_theta=rope_theta)
    check_states(files, host, decoder.hidden_size, decoder.hidden_size, 1)
    where = settled_taps(files, layout, host, taps)
    if len(where) != 1:
        raise ValueError(f"{files.name}: a head of EAGLE-1 reads one state; give drafter.taps one")
    if layout.wrapped:
        bias = bool(config.get("fusion_bias", False))
    else:  # without the field, its authors' code expects one
        bias = bool(layout.layer.get("bias", config.get("eagle_fc_bias", layout.layer is config)))
    norms = "hidden_states_layernorm.weight" in shapes
    return EagleConfig(
        **common(files, layout, host, decoder),
        taps=where,
        bias=bias,
        norms=norms,
        embedding_norm=not norms and "embedding_layernorm.weight" in shapes,
        input_norm="layers.0.input_layernorm.weight" in shapes,
        output_norm="norm.weight" in shapes,
        windows=_windows(layout, decoder, files.name),
    )


def decoder_config(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], name: str, *, rope_theta: float | None
) -> Any:
    """Of its layers, as transformers has it. The size of an attention head is taken from q_proj:
    config.json may not say it, or say another.

    Raises:
        ValueError: a size that config.json does not state, or layers of another kind.
    """
    layer = layout.layer
    for field in SIZES:
        if type(layer.get(field)) is not int or layer[field] < 1:
            raise BrokenFilesError(
                f"{name}: {CONFIG} has {field}={layer.get(field)}, which must be a number of at "
                f"least 1; take the head's own {CONFIG}"
            )
    _check_kind(layer, name, sliding=layout.kind != "mtp")
    heads = layer["num_attention_heads"]
    rows = shapes.get("layers.0.self_attn.q_proj.weight", (0,))[0]
    if rows % (2 * heads):
        raise BrokenFilesError(
            f"{name}: q_proj has {rows} rows, which {heads} heads of an even size cannot share; "
            f"{CONFIG} and weights are of two heads: download both again"
        )
    there = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.")}
    try:
        made = (Qwen3Config if "layers.0.self_attn.q_norm.weight" in shapes else LlamaConfig)(
            hidden_size=layer["hidden_size"],
            intermediate_size=layer["intermediate_size"],
            num_hidden_layers=layer.get("num_hidden_layers") or len(there),
            num_attention_heads=heads,
            num_key_value_heads=layer.get("num_key_value_heads") or heads,
            head_dim=rows // heads or 2,
            rms_norm_eps=float(layer.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(layer.get("max_position_embeddings") or 2048),
            rope_parameters=rope_parameters(
                layer, name, wrapped=layout.by_transformers, theta=rope_theta
            ),
            attention_bias="layers.0.self_attn.q_proj.bias" in shapes,
        )
        LlamaRotaryEmbedding(made)
    except BrokenFilesError:
        raise
    except Exception as error:  # of any class: config.json can hold anything
        raise BrokenFilesError(
            f"{name}: {CONFIG} describes no decoder layer ({first_line(error)}); take the head's "
            f"own"
        ) from None
    return made


def _windows(layout: Layout, decoder: Any, name: str) -> tuple[int | None, ...]:
    """Of each layer of a recurrent head; () if none has one, whatever its fields say besides."""
    if layout.layer.get("use_sliding_window") is not True:
        return ()
    found = windows_of(layout.layer, decoder.num_hidden_layers, name)
    return found if any(found) else ()


def windows_of(
    layer: Mapping[str, Any], layers: int, name: str, *, least: int = 1
) -> tuple[int | None, ...]:
    """Tokens that attention reaches back over in each layer, None for all, by the fields of Qwen3.

    Raises:
        ValueError: other kinds of attention, or a window that does not hold `least` tokens.
    """
    names = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    stated = {name: layer[name] for name in names if name in layer}
    try:
        known: Any = Qwen3Config(num_hidden_layers=layers, **stated)
        sliding = [{"sliding_attention": 1, "full_attention": 0}[x] for x in known.layer_types]
        window: int | None = known.sliding_window
    except Exception as error:  # of any class: config.json can hold anything
        raise BrokenFilesError(
            f"{name}: layer_types, sliding_window and max_window_layers of {CONFIG} do not say of "
            f"{layers} layers whether attention is full or sliding ({first_line(error)}); take "
            f"the head's own {CONFIG}"
        ) from None
    if any(sliding) and (type(window) is not int or window < least):
        held = "a token" if least == 1 else f"a block of {least}"
        raise ValueError(
            f"{name}: {CONFIG} has sliding_window={window}, and a window must hold {held}; take "
            f"another head"
        )
    return tuple(window if one else None for one in sliding)


def _check_kind(layer: Mapping[str, Any], name: str, *, sliding: bool) -> None:
    """Refuse what decoder layers here do not do, with or without sliding windows."""
    wrong = {
        "hidden_act": layer.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": layer.get("partial_rotary_factor", 1) != 1,
        "use_sliding_window": layer.get("use_sliding_window", False) is True and not sliding,
        "mlp_bias": layer.get("mlp_bias", False) is True,
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{name}: {CONFIG} asks for {field}={layer[field]}, which layers of heads do not "
                f"have here; take another head"
            )


def config_of_states(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The fields that say which states are read: eagle_config (NVIDIA, SpecForge), or all."""
    return {**config, **object_in(config, "eagle_config", name)}


def check_states(files: HeadFiles, host: Host, stated: int, columns: int, count: int) -> None:
    """Of `count` states of `stated` numbers each, if that is stated, `columns` are read."""
    size = stated or max(columns // count, 1)
    others, rest = divmod(columns, host.state_size)
    if stated in (0, host.state_size) and columns and not rest and others != count:
        raise ValueError(
            f"{files.name}: fc.weight joins {others} states of {host.state_size} numbers, and "
            f"{count} are named; say which by drafter.taps"
        )
    if size != host.state_size and columns:
        raise ValueError(
            f"{files.name}: reads states of {size} numbers, and those of {host.name} have "
            f"{host.state_size}: this head belongs to another target"
        )


def common(
    files: HeadFiles, layout: Layout, host: Host, decoder: Any, rows: int | None = None
) -> dict[str, Any]:
    """What every `HeadConfig` has but its taps and windows.

    Args:
        rows: of its embedding; None: the target's own, or as many as the target has tokens.
    """
    shapes = layout.shapes(files.shapes)
    own = host.vocab_size if "embed_tokens.weight" in shapes else len(host.embedding)
    return {
        "layer": decoder,
        "state_size": host.state_size,
        "target_vocab": own if rows is None else rows,
        "vocab_size": _named(files, layout, host, shapes),
        "output_bias": "layers.0.self_attn.o_proj.bias" in shapes,
    }


def _named(
    files: HeadFiles, layout: Layout, host: Host, shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """How many tokens it can name.

    Raises:
        ValueError: the target has another vocabulary.
    """
    vocabulary = layout.layer.get("vocab_size")
    if vocabulary is not None and vocabulary != host.vocab_size:
        raise ValueError(
            f"{files.name}: is made for a vocabulary of {vocabulary}, and {host.name} has "
            f"{host.vocab_size} tokens: this head belongs to another target"
        )
    said = files.config.get("draft_vocab_size") if layout.kind != "eagle" else None
    if "token_map" in shapes:
        said = shapes["token_map"][0]
    return int(said or shapes.get("lm_head.weight", (host.vocab_size,))[0])
