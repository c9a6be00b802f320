"""Small random heads, written as their authors publish them, for a small random target."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.models.paged import PagedLM
from specdec.training.trainee import Surroundings, TrainingMethod
from tests.heads.oracle import Facts

D, MIDDLE, NAMED, EPS = 32, 40, 48, 1e-5
HEADS = (4, 2)
PLAIN: tuple[dict[str, Any], dict[str, Any]] = ({}, {"theta": 10_000.0})
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


class Random:
    """Tensors large enough for a mistake to show."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=self.generator)

    def norm(self, size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=self.generator)

    def layer(
        self,
        name: str,
        inputs: int,
        *,
        head_dim: int = 8,
        bias: str = "",
        normed: bool = False,
        norms: Iterable[str] = (),
    ) -> dict[str, Tensor]:
        """A decoder layer whose attention reads so many inputs.

        Args:
            bias: letters of the projections that have one.
            normed: queries and keys.
            norms: of what goes in.
        """
        rows = {"q": HEADS[0] * head_dim, "k": HEADS[1] * head_dim, "v": HEADS[1] * head_dim}
        made = {f"self_attn.{p}_proj.weight": self.matrix(rows[p], inputs) for p in rows}
        made["self_attn.o_proj.weight"] = self.matrix(D, rows["q"])
        for part in bias:
            made[f"self_attn.{part}_proj.bias"] = 5 * self.matrix((rows | {"o": D})[part])
        if normed:
            made |= {f"self_attn.{p}_norm.weight": self.norm(head_dim) for p in "qk"}
        made |= {f"{norm}.weight": self.norm(D) for norm in norms}
        made["post_attention_layernorm.weight"] = self.norm(D)
        for part in ("gate", "up"):
            made[f"mlp.{part}_proj.weight"] = self.matrix(MIDDLE, D)
        made["mlp.down_proj.weight"] = self.matrix(D, MIDDLE)
        return {f"{name}.{key}": value for key, value in made.items()}

    def ids(self, count: int, vocabulary: int) -> Tensor:
        return torch.randperm(vocabulary, generator=self.generator)[:count].sort().values


def layer_config(target: Any, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": target.config.vocab_size,
        "hidden_size": D,
        "intermediate_size": MIDDLE,
        "num_attention_heads": HEADS[0],
        "num_key_value_heads": HEADS[1],
        "num_hidden_layers": 1,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        **others,
    }


def sliding(window: Any, layers: int) -> dict[str, Any]:
    """What config.json says of a window in all layers."""
    if window is None:
        return {}
    kinds = ["sliding_attention"] * layers
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)
    else:
        torch.save(dict(tensors), folder / file)


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in tensors.items()}


def mapped(named: int, ids: Tensor, vocabulary: int) -> dict[str, Tensor]:
    return {
        "d2t": ids - torch.arange(named),
        "t2d": torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True),
    }


def layers_of(
    layout: str, random: Random, count: int, *, head_dim: int, bias: str, listed: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Decoder layers as a layout has them: tensors, and the beginnings of their names."""
    first = "midlayer" if layout in ("safeailab", "specforge", "sglang") else "layers.0"
    both, normed = ("hidden_norm", "input_layernorm"), layout == "deepspec"
    made = random.layer(first, 2 * D, head_dim=head_dim, bias=bias, normed=normed, norms=both)
    names = [first]
    for index in range(1, count):
        pair = layout == "deepspec"
        norms = both if pair else ("hidden_norm" if layout == "sglang" else "input_layernorm",)
        apart = layout == "sglang" and not listed
        name = f"additional_layers.{index - 1}" if apart else f"layers.{index}"
        inputs = 2 * D if pair else D
        made |= random.layer(
            name, inputs, head_dim=head_dim, bias=bias, normed=normed, norms=norms
        )
        names.append(name)
    return made, tuple(names)


def eagle3(
    folder: Path,
    target: Any,
    *,
    layout: str = "safeailab",
    flags: Iterable[str] = (),
    named: int | None = NAMED,
    head_dim: int = 8,
    bias: str = "",
    layers: int = 1,
    listed: bool = False,
    taps: tuple[int, ...] | None = None,
    own_embedding: bool = False,
    mask: int | None = None,
    file: str | None = None,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    rope: tuple[dict[str, Any], dict[str, Any]] = PLAIN,
    window: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Facts:
    """A head of EAGLE-3.

    Args:
        named: tokens it can name; None for all.
        listed: SGLang's further layers have the numbers of layers.
        taps: the states it reads; None for those of its layout.
        mask: token of P-EAGLE; None: it is none.
        prefix: before every name of a tensor.
        dtype: of matrices and norms in the file.
        rope: as config.json says it, and as the oracle has it.
        window: of its attention.
        config: more of config.json.
    """
    random, flags = Random(), frozenset(flags)
    vocabulary, states = target.config.vocab_size, target.config.hidden_size
    n = target.config.num_hidden_layers
    where = taps or ((2, 3, 4, 6, n) if layout == "deepspec" else (2, n // 2, n - 3))
    tensors, names = layers_of(layout, random, layers, head_dim=head_dim, bias=bias, listed=listed)
    if "fc_norm" in flags:
        tensors |= {f"fc_norm.{i}.weight": random.norm(states) for i in range(len(where))}
    if "norm_before_fc" in flags:
        tensors["input_norm.weight"] = random.norm(len(where) * states)
    tensors["fc.weight"] = random.matrix(D, len(where) * states)
    tensors["norm.weight"] = random.norm(D)
    tensors["lm_head.weight"] = 3 * random.matrix(named or vocabulary, D)
    ids = torch.arange(vocabulary) if named is None else random.ids(named, vocabulary)
    if named is not None:
        tensors |= mapped(named, ids, vocabulary)
    embedding = target.get_input_embeddings().weight.detach()
    if own_embedding or states != D:
        embedding = random.matrix(vocabulary, D)
    if layout in ("speculators", "deepspec") or own_embedding or states != D:
        tensors["embed_tokens.weight"] = embedding
    if mask is not None:
        tensors["mask_hidden"] = 5 * random.matrix(1, 1, len(where) * states)
    if dtype is not None:
        for key, value in tensors.items():
            tensors[key] = value.to(dtype) if value.is_floating_point() else value
    layer = layer_config(target, num_hidden_layers=layers, **rope[0], **sliding(window, layers))
    said = {
        "safeailab": {},
        "specforge": {"architectures": ["LlamaForCausalLMEagle3"]},
        "sglang": {"architectures": ["LlamaForCausalLMEagle3"]},
        "deepspec": {"model_type": "qwen3", "target_layer_ids": [tap - 1 for tap in where]},
    }.get(layout)
    whole: Mapping[str, Any]
    if said is not None:
        whole = layer | said | dict.fromkeys(flags, True)
    else:
        whole = wrapper(layer, where, flags)
    if mask is not None:
        kind = {"speculators_model_type": "peagle"} if layout == "speculators" else {}
        whole = {**whole, **kind, "mask_token_id": mask}
    whole = {**whole, "draft_vocab_size": named or vocabulary, **(config or {})}
    if file is None:
        file = "pytorch_model.bin" if layout == "safeailab" else "model.safetensors"
    write(folder, whole, {prefix + key: value for key, value in tensors.items()}, file)
    more = {"deepspec": {"pairs"}, "sglang": {"sglang"}}.get(layout, set())
    return Facts(
        tensors=doubled(tensors),
        layers=names,
        embedding=embedding.double(),
        output=tensors["lm_head.weight"].double(),
        heads=HEADS,
        eps=EPS,
        taps=where,
        ids=ids,
        rope=rope[1],
        flags=flags | more,
        block={} if mask is None else {"mask": mask},
        window=window,
    )


def wrapper(layer: Mapping[str, Any], taps: tuple[int, ...], flags: Iterable[str]) -> Any:
    """config.json of `speculators`."""
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": dict(layer),
        "eagle_aux_hidden_state_layer_ids": list(taps),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "some/tiny/", "architectures": ["LlamaForCausalLM"]},
        },
        **{flag: flag in flags for flag in FLAGS},
    }


def eagle(
    folder: Path,
    target: Any,
    *,
    layout: str = "safeailab",
    layers: int = 1,
    bias: str = "",
    fc_bias: bool = True,
    norms: Iterable[str] = (),
    in_use: bool = False,
    file: str | None = None,
    rope: tuple[dict[str, Any], dict[str, Any]] = PLAIN,
    window: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Facts:
    """A head of EAGLE-1.

    Args:
        norms: that EAGLE-1 does not have, by the names of the layout.
        in_use: vLLM's layout says that the norms it keeps are to be used.
    """
    random, norms = Random(), tuple(norms)
    first, fc = ("transformer", "fusion_fc") if layout == "speculators" else ("layers.0", "fc")
    names = [first]
    tensors = random.layer(first, D, bias=bias)
    for index in range(1, layers):
        names.append(f"layers.{index}")
        tensors |= random.layer(names[-1], D, bias=bias, norms=("input_layernorm",))
    tensors[f"{fc}.weight"] = random.matrix(D, 2 * D)
    if fc_bias:
        tensors[f"{fc}.bias"] = 2 * random.matrix(D)
    tensors |= {f"{norm}.weight": random.norm(D) for norm in norms}
    if "pre_lm_head_layernorm" in norms:
        tensors["pre_lm_head_layernorm.weight"] *= 3  # so that some tokens are likely
    layer = layer_config(target, num_hidden_layers=layers, **rope[0], **sliding(window, layers))
    whole: dict[str, Any] = layer if fc_bias else layer | {"bias": False}
    published = tensors
    if layout == "speculators":
        whole = {
            "speculators_model_type": "eagle",
            "transformer_layer_architecture": "LlamaDecoderLayer",
            "transformer_layer_config": layer,
            "fusion_bias": fc_bias,
            "layernorms": bool(norms),
        }
    elif layout == "vllm":  # norms that it keeps, and leaves out
        used = {"skip_prenorm": False, "skip_output_norm": False} if in_use else {}
        whole = {"model_type": "eagle", "model": layer | used, "eagle_fc_bias": fc_bias}
        dead = {f"model.{first}.input_layernorm.weight": random.norm(D)}
        dead["model.norm.weight"] = random.norm(D)
        outer = (fc, "enorm", "hnorm")
        published = dead | {
            key if key.startswith(outer) else f"model.{key}": value
            for key, value in tensors.items()
        }
    else:
        published = tensors | {"embed_tokens.weight": target.get_input_embeddings().weight}
    if file is None:
        file = "pytorch_model.bin" if layout == "safeailab" else "model.safetensors"
    write(folder, whole | dict(config or {}), published, file)
    return Facts(
        tensors=doubled(tensors),
        layers=tuple(names),
        embedding=target.get_input_embeddings().weight.detach().double(),
        output=target.get_output_embeddings().weight.detach().double(),
        heads=HEADS,
        eps=EPS,
        taps=("normal",),
        ids=torch.arange(target.config.vocab_size),
        rope=rope[1],
        window=window,
    )


def medusa(folder: Path, target: Any, *, heads: int = 3, tied: bool = True) -> None:
    """Medusa heads of one block, as its authors' newer code writes them."""
    random, size = Random(), target.config.hidden_size
    tensors = {}
    for head in range(heads):
        tensors[f"{head}.0.linear.weight"] = random.matrix(size, size)
        tensors[f"{head}.0.linear.bias"] = random.matrix(size)
        if not tied:
            tensors[f"{head}.1.weight"] = random.matrix(target.config.vocab_size, size)
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "tiny"}
    write(folder, config, tensors, "medusa_lm_head.safetensors")


def begun(folder: Path, target: PagedLM, method: TrainingMethod) -> None:
    """A head for a target of any size, as training begins with."""
    counts = torch.ones(target.vocab_size)
    around = Surroundings(target=target, counts=counts, chunk=512, compiled=False, seed=0)
    method.make(around).save(folder, target.name)
