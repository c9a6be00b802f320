"""Layouts: what a head is, told by its tensors first and by config.json second, and the names its
tensors have here, which are those of `speculators` (of Medusa those of `medusa.py`).

Sources: SafeAILab/EAGLE `eagle/model/cnets.py` and `cnets1.py`, sgl-project/SpecForge
`modeling/draft/llama3_eagle.py`, sglang `models/llama_eagle3.py`, deepseek-ai/DeepSpec
`modeling/eagle3`, vllm-project/speculators `models/eagle3`, `peagle` and `eagle.py`, vLLM
`models/eagle.py` and `models/medusa.py`, FasterDecoding/Medusa `medusa_model.py`; those of block
heads in `block_files.py`, of MTP layers in `mtp_files.py`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig

from specdec.heads.files import object_in
from specdec.heads.layered import LAYERS
from specdec.models.weights import MTP_TENSORS, BrokenFilesError
from specdec.reasons import first_line

Kind = Literal["eagle3", "peagle", "eagle", "medusa", "dflash", "dspark", "mtp"]
BLOCK_KINDS = ("dflash", "dspark")
EAGLE3_KINDS = ("eagle3", "peagle")  # of the same tensors
Shapes = Mapping[str, tuple[int, ...]]
READ = "heads of EAGLE 1 to 3, P-EAGLE, HASS, Medusa, DFlash 1 and 2, DSpark and MTP are read"

REFUSED = {  # tensors that only heads of these kinds have, or their speculators_model_type
    "MTP layers as DeepSeek's or GLM's": (r"(.*\.)?eh_proj\.weight", "deepseek_mtp"),
    "an MTP layer with experts": (r"mtp.*\.mlp\.(experts|gate|shared_expert)\b", "moe_mtp"),
    "a Domino head": (r"prefix_gru\.", "domino"),
    "a Hydra head": (r"hydra_mlp\.|hydra_lm_head\.", "hydra"),
    "an MLP speculator": (r"(speculator\.)?emb\.0\.weight", "mlp_speculator"),
    "a ReDrafter head": (r"(drafter\.)?rnn_w\.weight", "redrafter"),
    "a GRIFFIN head": (r"fc\.(fc|mlp)\.", "griffin"),
}
IGNORED = r"t2d|verifier_.*|(.*\.)?rotary_emb\.inv_freq"  # known, and of no use here
WHOLE = r"lm_head\.weight|model\..*"  # the target, in files of Medusa that hold it too
MEDUSA = r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)"
MEDUSA_OF_VLLM = r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)|lm_heads\.(\d+)\.weight"

MTP_LAYERS = {  # types of layers by config.json's model_type, as transformers has them
    **{kind: kind for kind in ("llama", "qwen2", "qwen3", "qwen3_next", "qwen3_5_text")},
    "mimo": "qwen2",
    "qwen3_5": "qwen3_5_text",
}
MTP_NAMES = {  # of the layer of a depth
    r"^(mtp\.pre_fc_norm_embedding|mtp_layers\.{}\.token_layernorm)\.": "embedding_layernorm.",
    r"^(mtp\.pre_fc_norm_hidden|mtp_layers\.{}\.hidden_layernorm)\.": "hidden_states_layernorm.",
    r"^(mtp\.fc|mtp_layers\.{}\.input_proj)\.": "fc.",
    r"^(mtp\.norm|mtp_layers\.{}\.final_layernorm)\.": "norm.",
    r"^(mtp\.layers|mtp_layers)\.{}\.": "layers.0.",
}
MTP_DEPTH = r"(?:mtp\.layers|mtp_layers)\.(\d+)\."
SHARED = r"embed_tokens\.weight|lm_head\.weight|d2t"  # by the layers of all depths


EAGLE_NAMES = {  # in the order they are applied
    r"^model\.": "",  # vLLM's first form has it twice
    r"^transformer\.": "layers.0.",
    r"^fusion_fc\.": "fc.",
    r"^(enorm|embed_layernorm|post_embedding_layernorm)\.": "embedding_layernorm.",
    r"^hnorm\.": "hidden_states_layernorm.",
    r"^(pre_lm_head_layernorm|lm_head_layernorm)\.": "norm.",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was found.

    Args:
        kind: which class of head.
        label: what it is called at the start of a run.
        wrapped: whether config.json is that of `speculators`.
        layer: the part of config.json that is about its decoder layers.
        files: names of its tensors in the files, by their names here.
        shifted: as of `BlockConfig`, if config.json does not say it.
        hidden_first: of an MTP layer, whether it reads the state before the embedding.
        later: `files` of the MTP layers of further depths.
        selects: whether it is DFlash 2.
    """

    kind: Kind
    label: str
    wrapped: bool
    layer: Mapping[str, Any]
    files: Mapping[str, str]
    shifted: bool = False
    hidden_first: bool = False
    later: tuple[Mapping[str, str], ...] = ()
    selects: bool = False

    @property
    def by_transformers(self) -> bool:
        """Whether its angles are those that transformers makes of its config.json."""
        return self.wrapped or self.kind in (*BLOCK_KINDS, "mtp")

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by their names here."""
        return {ours: shapes[theirs] for ours, theirs in self.files.items()}


def recognise(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    """Tell what a file holds.

    Raises:
        ValueError: a head that is not read, or none.
    """
    heads = {key.removeprefix("medusa_head.") for key in shapes if key.startswith("medusa_head.")}
    _refuse({key.removeprefix("model.") for key in shapes} - heads, config, name)
    if heads or any(re.fullmatch(MEDUSA, key) for key in shapes):
        return _medusa(shapes, config, name)
    if any(re.fullmatch(MEDUSA_OF_VLLM, key.removeprefix("medusa_heads.")) for key in shapes):
        return _medusa_of_vllm(shapes, config, name)
    if any(re.match(MTP_TENSORS, key) for key in shapes):
        return _mtp(shapes, config, name)
    bare = {key.removeprefix("model.") for key in shapes}
    if "hidden_norm.weight" in bare:
        return _dflash(shapes, config, name)
    if any(key.startswith("midlayer.") for key in bare) or "layers.0.hidden_norm.weight" in bare:
        return _eagle3(shapes, config, name)
    if bare & {"fc.weight", "fusion_fc.weight"}:
        return _eagle(shapes, config, name)
    whole = any("layers.0.input_layernorm" in key for key in shapes)
    what = "a whole model and no head" if whole else "no head that is known"
    if name.startswith("target.path="):  # looked into for drafter=mtp
        what, mend = "no MTP layers", "give drafter.path the folder or hub id of one"
    else:
        mend = "give it as drafter=small_llama" if whole else READ
    raise BrokenFilesError(f"{name}: holds {what}, as {next(iter(shapes), 'nothing')}; {mend}")


def _refuse(bare: set[str], config: Mapping[str, Any], name: str) -> None:
    stated = config.get("speculators_model_type")
    for what, (pattern, kind) in REFUSED.items():
        if stated == kind or any(re.match(pattern, key) for key in bare):
            raise ValueError(f"{name}: holds {what}, which is not read; {READ}")


def _names(
    shapes: Shapes, name: str, rename: Callable[[str], str], ignored: str = IGNORED
) -> dict[str, str]:
    """Names in the files by names here."""
    found: dict[str, str] = {}
    for key in shapes:
        ours = rename(key)
        if re.fullmatch(ignored, ours):
            continue
        if ours in found:
            raise BrokenFilesError(f"{name}: holds {found[ours]} and {key}, which are one tensor")
        found[ours] = key
    return found


def _eagle3(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    layer = _completed(object_in(config, "transformer_layer_config", name), name)
    wrapped = "speculators_model_type" in config
    files = _names(shapes, name, _eagle3_name)
    extra = {key.split(".")[1] for key in files if re.match(r"layers\.[1-9]", key)}
    of_sglang = False
    for index in extra:  # there the norm of what goes in has the name of the feature's norm
        one, other = f"layers.{index}.input_layernorm.weight", f"layers.{index}.hidden_norm.weight"
        if one not in files and other in files:
            files[one], of_sglang = files.pop(other), True
    bare = {key.removeprefix("model.") for key in shapes}
    parallel = "mask_hidden" in files or config.get("speculators_model_type") == "peagle"
    label = (
        "speculators"
        if wrapped
        else "DeepSpec"
        if config.get("target_layer_ids")
        else "SGLang"
        if of_sglang or any(key.startswith("additional_layers.") for key in bare)
        else "SpecForge"
        if parallel or "LlamaForCausalLMEagle3" in (config.get("architectures") or ())
        else "SafeAILab"
    )
    return Layout(
        kind="peagle" if parallel else "eagle3",
        label=f"{'P-EAGLE' if parallel else 'EAGLE-3'} of {label}",
        wrapped=wrapped,
        layer=layer or config,
        files=files,
    )


def _eagle3_name(key: str) -> str:
    key = re.sub(r"^(midlayer|layers\.0)\.", "layers.0.", key.removeprefix("model."))
    key = re.sub(r"^fc_norms\.", "fc_norm.", key)
    return re.sub(
        r"^additional_layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + 1}.", key
    )


def _eagle(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    wrapped = "speculators_model_type" in config
    nested = object_in(config, "model", name)

    def rename(key: str) -> str:
        key = key.removeprefix("model.")
        for pattern, ours in EAGLE_NAMES.items():
            key = re.sub(pattern, ours, key)
        return key

    ignored = IGNORED
    if nested:  # vLLM keeps norms that it leaves out
        if nested.get("skip_prenorm", True):
            ignored += r"|layers\.0\.input_layernorm\.weight"
        if nested.get("skip_output_norm", True):
            ignored += r"|norm\.weight"
    label = "speculators" if wrapped else "vLLM" if nested else "SafeAILab"
    layer = _completed(object_in(config, "transformer_layer_config", name), name)
    files = _names(shapes, name, rename, ignored)
    return Layout(
        kind="eagle",
        label=f"EAGLE of {label}",
        wrapped=wrapped,
        layer=layer or nested or config,
        files=files,
    )


def _dflash(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    layer = _completed(object_in(config, "transformer_layer_config", name), name)
    wrapped = "speculators_model_type" in config
    of_deepspec = "markov_rank" in config or any(
        "DSpark" in str(one) for one in config.get("architectures") or ()
    )
    own = object_in(config, "dflash_config", name)
    said = {**config, **own}
    spark = config.get("speculators_model_type") == "dspark" or any(
        said.get(field) for field in ("markov_rank", "enable_confidence_head")
    )
    spark |= any(
        key.removeprefix("model.").startswith(("markov_head.", "confidence_head."))
        for key in shapes
    )
    of_specforge = own.get("projector_type") == "dspark" or "DSparkDraftModel" in (
        config.get("architectures") or ()
    )
    label = (
        "speculators"
        if wrapped
        else "SpecForge"
        if of_specforge
        else "DeepSpec"
        if of_deepspec
        else "JetSpec"
        if own.get("causal_head")
        else "z-lab"
    )
    second = config.get("speculators_model_type") == "dflash2" or any(
        key.removeprefix("model.").startswith("candidate_selector.") for key in shapes
    )
    return Layout(
        kind="dspark" if spark else "dflash",
        label=f"{'DSpark' if spark else 'DFlash 2' if second else 'DFlash'} of {label}",
        wrapped=wrapped,
        layer=layer or config,
        files=_names(shapes, name, lambda key: key.removeprefix("model.")),
        shifted=of_deepspec or spark,
        selects=second,
    )


def _mtp(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    """MTP layers, alone or among the tensors of a whole model, which its target has already."""
    wrapped = "speculators_model_type" in config
    own = object_in(config, "transformer_layer_config", name)
    layer = own or object_in(config, "text_config", name) or config
    kind = MTP_LAYERS.get(layer.get("model_type", "qwen2"))
    if kind is None:
        raise ValueError(
            f"{name}: has an MTP layer of type {layer['model_type']!r}; those of "
            f"{', '.join(MTP_LAYERS)} are read"
        )
    mine = [key for key in shapes if re.match(MTP_TENSORS, key)]
    whole = any(re.search(r"\blayers\.\d", key) for key in shapes.keys() - {*mine})
    bare = [key.removeprefix("model.") for key in mine]
    of_qwen = any(key.startswith("mtp.") for key in bare)
    depths = {int(found[1]) for key in bare if (found := re.match(MTP_DEPTH, key))} or {0}
    read = {key: shapes[key] for key in (mine if whole else shapes)}
    first, *later = (_mtp_files(read, name, depth) for depth in sorted(depths))
    label = "speculators" if wrapped else "Qwen3-Next" if of_qwen else "MiMo"
    return Layout(
        kind="mtp",
        label=f"MTP layer of {label}",
        wrapped=wrapped,
        layer=_completed({**layer, "model_type": kind}, name, MTP_LAYERS),
        files=first,
        hidden_first=not wrapped and not of_qwen,
        later=tuple(later),
    )


def _mtp_files(shapes: Shapes, name: str, depth: int) -> dict[str, str]:
    """Of the MTP layer of a depth; what all share has the first."""

    def rename(key: str) -> str:
        key = key.removeprefix("model.")
        for pattern, ours in MTP_NAMES.items():
            key = re.sub(pattern.format(depth), ours, key)
        return key

    ignored = f"{IGNORED}|{MTP_DEPTH}.*" + (f"|{SHARED}" if depth else "")
    return _names(shapes, name, rename, ignored)


def _completed(
    layer: Mapping[str, Any], name: str, kinds: Collection[str] = LAYERS
) -> Mapping[str, Any]:
    """The configuration of decoder layers in `speculators` files, with what it leaves out because
    it is the default of transformers.

    Raises:
        ValueError: layers of a kind that heads do not have here.
    """
    if not layer:
        return layer
    kind = layer.get("model_type", "llama")
    if kind not in kinds:
        raise ValueError(
            f"{name}: has decoder layers of type {kind!r}; those of {', '.join(kinds)} are read"
        )
    others = {key: value for key, value in layer.items() if key != "model_type"}
    try:
        whole: dict[str, Any] = AutoConfig.for_model(kind, **others).to_dict()
    except Exception as error:  # of any class: config.json can hold anything
        raise BrokenFilesError(
            f"{name}: transformer_layer_config of config.json describes no decoder layer "
            f"({first_line(error)}); take the head's own"
        ) from None
    return whole


def _medusa(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    """Medusa's own: {head}.{block}.linear, and {head}.{blocks}.weight for the output matrix."""
    whole = any(key.startswith("medusa_head.") for key in shapes)

    def rename(key: str) -> str:
        bare = key.removeprefix("medusa_head.")
        found = re.fullmatch(MEDUSA, bare)
        if found is None:
            return key
        if found[3] == "weight":
            return f"lm_heads.{found[1]}.weight"
        return f"blocks.{found[1]}.{found[2]}.{found[3].removeprefix('linear.')}"

    files = _names(shapes, name, rename, f"{IGNORED}|{WHOLE}" if whole else IGNORED)
    label = "Medusa, beside its target" if whole else "Medusa"
    return Layout(kind="medusa", label=label, wrapped=False, layer=config, files=files)


def _medusa_of_vllm(shapes: Shapes, config: Mapping[str, Any], name: str) -> Layout:
    def rename(key: str) -> str:
        return re.sub(r"^(blocks\.\d+\.)layers\.", r"\1", key.removeprefix("medusa_heads."))

    files = _names(shapes, name, rename)
    if config.get("original_lm_head") and "lm_heads.0.weight" in files:
        files["lm_head.weight"] = files.pop("lm_heads.0.weight")
        files = {key: value for key, value in files.items() if not key.startswith("lm_heads.")}
    return Layout(kind="medusa", label="Medusa of vLLM", wrapped=False, layer=config, files=files)
