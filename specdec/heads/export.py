"""Writing heads in published layouts: recurrent ones and MTP layers as `speculators` does,
Medusa's and DFlash's as their authors' code."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.heads.block import MASK_ROW, BlockHead
from specdec.heads.block_files import MASK_FILE
from specdec.heads.files import CONFIG
from specdec.heads.layered import HeadConfig, LayeredHead
from specdec.heads.medusa import MedusaHeads
from specdec.heads.parallel import ParallelConfig, ParallelHead
from specdec.heads.recurrent import Eagle3Head, EagleConfig, EagleHead, MTPConfig, MTPHead
from specdec.heads.spark import SparkConfig
from specdec.models.weights import WEIGHTS

MEDUSA_WEIGHTS = "medusa_lm_head.safetensors"
VERSION = "0.3.0"  # of speculators, whose layout it is
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
NAMES: dict[type[LayeredHead], tuple[str, str]] = {  # of kinds, and of architectures
    ParallelHead: ("peagle", "PEagleSpeculator"),
    Eagle3Head: ("eagle3", "Eagle3Speculator"),
    EagleHead: ("eagle", "EagleSpeculator"),
    MTPHead: ("mtp", "MTPDraftModel"),
}
MTP_NAMES = {  # of parts of an MTP layer, by their names here; others are of the decoder layer
    "embedding_layernorm": "token_layernorm",
    "hidden_states_layernorm": "hidden_layernorm",
    "fc": "input_proj",
    "norm": "final_layernorm",
}
DTYPE = torch.bfloat16  # of what is written
DRAFTED = 5  # tokens that other engines draft if they are not told


def save_head(
    head: LayeredHead,
    folder: Path,
    *,
    target_name: str,
    architecture: str | None = None,
    tied: bool = False,
    dtype: torch.dtype = DTYPE,
) -> None:
    """Write a head: config.json and model.safetensors, without the embedding, which is the
    target's.

    Args:
        folder: made if there is none; what it holds of a head is replaced.
        target_name: path of the model that it drafts for.
        architecture: of that model, the name of its class in transformers.
        tied: the output head is the target's as well, and is left out.
        dtype: of the weights.

    Raises:
        ValueError: the folder cannot be written to.
    """
    config = _config(head, target_name, dtype)
    verifier = config["speculators_config"]["verifier"]
    verifier["architectures"] = [architecture] if architecture else []
    if tied:  # as others read it: the target's output head
        config["draft_vocab_size"] = None
    _write(folder, WEIGHTS, _tensors(head, dtype, tied), config)


def save_medusa(heads: MedusaHeads, folder: Path, *, target_name: str) -> None:
    """Write Medusa heads: config.json and medusa_lm_head.safetensors. What is tied to the target's
    output head has none there, as in version 2 of its code.

    Raises:
        ValueError: the folder cannot be written to.
    """
    config, tensors = heads.config, dict[str, Tensor]()
    for head, blocks in enumerate(heads.blocks):
        for index in range(config.blocks):
            block = blocks[0 if config.shared else index]
            for name, parameter in block.named_parameters():
                tensors[f"{head}.{index}.linear.{name}"] = parameter.detach().to("cpu", DTYPE)
        if not config.tied:
            own = heads.lm_heads[head].weight
            tensors[f"{head}.{config.blocks}.weight"] = own.detach().to("cpu", DTYPE)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    stated = {
        "medusa_num_heads": config.heads,
        "medusa_num_layers": config.blocks,
        "base_model_name_or_path": target_name,
        "hidden_size": config.state_size,
        "vocab_size": config.vocab_size,
        **({"version": "2"} if config.tied else {}),
    }
    _write(folder, MEDUSA_WEIGHTS, tensors, stated)


def save_block(head: BlockHead, folder: Path, *, target_name: str, target_layers: int) -> None:
    """Write a DFlash head that is not causal: config.json and model.safetensors as z-lab has them,
    of DSpark as SpecForge, without embedding and output head, which are the target's, and a file
    with the mask's row.

    Args:
        target_layers: of the target; the state after the last is named by its norm.

    Raises:
        ValueError: the folder cannot be written to.
    """
    config, lent = head.config, ("embed_tokens.", "lm_head.", MASK_ROW)
    tensors = _own(head, lent, DTYPE)
    outputs = [target_layers - 1 if tap == "normal" else tap - 1 for tap in config.taps]
    stated = {
        **_layer_of(head),
        "architectures": ["DFlashDraftModel"],
        "block_size": config.block,
        "num_target_layers": target_layers,
        "base_model_name_or_path": target_name,
        "is_causal": False,
        "dflash_config": {"mask_token_id": config.mask, "target_layer_ids": outputs},
        "dtype": str(DTYPE).removeprefix("torch."),
        **(_of_spark(config) if isinstance(config, SparkConfig) else {}),
    }
    _write(folder, WEIGHTS, tensors, stated)
    if head.mask_embedding is not None:
        row = head.mask_embedding.detach().to("cpu", DTYPE)
        temporary = folder / f"{MASK_FILE}.tmp"
        torch.save({"mask_token_id": config.mask, "embedding": row}, temporary)
        temporary.replace(folder / MASK_FILE)


def _of_spark(config: SparkConfig) -> dict[str, Any]:
    """What config.json says of DSpark besides, by names of DeepSpec."""
    return {
        "architectures": ["DSparkDraftModel"],
        "markov_rank": config.rank,
        "markov_head_type": config.markov,
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_markov,
    }


def _layer_of(head: LayeredHead) -> dict[str, Any]:
    """Its decoder layers, as config.json has them."""
    layer = {
        key: value
        for key, value in head.config.layer.to_dict().items()
        if key not in ("transformers_version", "architectures", "_name_or_path")
    }
    windows = head.config.windows
    if windows:  # by the fields of Qwen3, whatever the layers are
        layer["layer_types"] = [f"{'sliding' if one else 'full'}_attention" for one in windows]
        layer["sliding_window"] = max((one for one in windows if one), default=None)
        layer["use_sliding_window"] = any(windows)
    return {**layer, "vocab_size": head.config.target_vocab}


def _write(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(folder / name)
        temporary = folder / f"{CONFIG}.tmp"
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        temporary.replace(folder / CONFIG)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written, {error.strerror or error}") from error


def _own(head: LayeredHead, lent: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Its parameters by name, but for those that are lent."""
    return {
        name: parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in head.named_parameters()
        if not name.startswith(lent)
    }


def _tensors(head: LayeredHead, dtype: torch.dtype, tied: bool) -> dict[str, Tensor]:
    lent = ("embed_tokens.", "lm_head.") if tied else ("embed_tokens.",)
    found = _own(head, lent, dtype)
    if isinstance(head, MTPHead):
        found = {_mtp_name(name): tensor for name, tensor in found.items()}
    if head.names is not None:
        names = head.names.cpu()
        found["d2t"] = names - torch.arange(len(names))
        found["t2d"] = torch.zeros(head.config.target_vocab, dtype=torch.bool)
        found["t2d"][names] = True
    return found


def _more(config: HeadConfig) -> dict[str, Any]:
    """What config.json says of one kind alone."""
    if isinstance(config, MTPConfig):
        return {"num_nextn_predict_layers": 1}
    if isinstance(config, ParallelConfig):
        return {"mask_token_id": config.mask}
    return {"fusion_bias": config.bias} if isinstance(config, EagleConfig) else {}


def _mtp_name(name: str) -> str:
    part, _, rest = name.removeprefix("layers.0.").partition(".")
    inside = name.startswith("layers.0.")
    return f"mtp_layers.0.{part if inside else MTP_NAMES[part]}.{rest}"


def _config(head: LayeredHead, target_name: str, dtype: torch.dtype) -> dict[str, Any]:
    config = head.config
    kind, architecture = NAMES[type(head)]
    flags = {name: asdict(config)[name] for name in FLAGS if hasattr(config, name)}
    proposal = {"proposal_type": "greedy", "speculative_tokens": DRAFTED}
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": []},
        },
        "transformer_layer_config": _layer_of(head),
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.state_size,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        **flags,
        **_more(config),
    }
