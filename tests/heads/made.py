"""Small random heads, written as their authors publish them, for a small random target."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.heads.oracle import Facts

D, MIDDLE, NAMED, EPS = 32, 40, 48, 1e-5
HEADS = (4, 2)


class Random:
    """Tensors large enough for a mistake to show."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=self.generator)

    def norm(self, size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=self.generator)

    def layer(self, name: str, inputs: int, *, head_dim: int, bias: bool = False) -> Any:
        """Attention and MLP, without norms of the input."""
        queries, keys = HEADS
        made = {}
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            made[f"self_attn.{part}_proj.weight"] = self.matrix(rows * head_dim, inputs)
            if bias:
                made[f"self_attn.{part}_proj.bias"] = 5 * self.matrix(rows * head_dim)
        made["self_attn.o_proj.weight"] = self.matrix(D, queries * head_dim)
        made["post_attention_layernorm.weight"] = self.norm(D)
        made["mlp.gate_proj.weight"] = self.matrix(MIDDLE, D)
        made["mlp.up_proj.weight"] = self.matrix(MIDDLE, D)
        made["mlp.down_proj.weight"] = self.matrix(D, MIDDLE)
        return {f"{name}.{key}": value for key, value in made.items()}

    def ids(self, count: int, vocabulary: int) -> Tensor:
        return torch.randperm(vocabulary, generator=self.generator)[:count].sort().values


def layer_config(**others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
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


def eagle3(
    folder: Path,
    target: Any,
    *,
    layout: str = "safeailab",
    flags: frozenset[str] = frozenset(),
    named: int | None = NAMED,
    head_dim: int = 8,
    file: str | None = None,
    rope: tuple[dict[str, Any], dict[str, Any]] = ({}, {"theta": 10_000.0}),
    **config: Any,
) -> Facts:
    """A head of EAGLE-3.

    Args:
        rope: as config.json says it, and as the oracle has it.
        named: tokens it can name; None for all.
    """
    random, vocabulary = Random(), target.config.vocab_size
    n, states = target.config.num_hidden_layers, target.config.hidden_size
    taps = (2, n // 2, n - 3)
    name = "midlayer" if layout in ("safeailab", "specforge") else "layers.0"
    tensors = random.layer(name, 2 * D, head_dim=head_dim)
    for norm in ("hidden_norm", "input_layernorm"):
        tensors[f"{name}.{norm}.weight"] = random.norm(D)
    if "fc_norm" in flags:
        tensors |= {f"fc_norm.{i}.weight": random.norm(states) for i in range(3)}
    if "norm_before_fc" in flags:
        tensors["input_norm.weight"] = random.norm(3 * states)
    tensors["fc.weight"] = random.matrix(D, 3 * states)
    tensors["norm.weight"] = random.norm(D)
    tensors["lm_head.weight"] = 3 * random.matrix(named or vocabulary, D)
    ids = torch.arange(vocabulary)
    if named is not None:
        ids = random.ids(named, vocabulary)
        tensors["d2t"] = ids - torch.arange(named)
        tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True)
    embedding = target.get_input_embeddings().weight.detach()
    own = layer_config(vocab_size=vocabulary, **rope[0])
    said: dict[str, Any] = own | {"draft_vocab_size": named or vocabulary}
    if layout == "speculators":
        tensors["embed_tokens.weight"] = embedding
        said = {
            "speculators_model_type": "eagle3",
            "speculators_version": "0.3.0",
            "architectures": ["Eagle3Speculator"],
            "transformer_layer_config": own,
            "draft_vocab_size": named or vocabulary,
            "eagle_aux_hidden_state_layer_ids": list(taps),
            **{f: f in flags for f in ("norm_before_residual", "norm_before_fc", "fc_norm")},
            "norm_output": "norm_output" in flags,
        }
    if file is None:
        file = "pytorch_model.bin" if layout == "safeailab" else "model.safetensors"
    write(folder, said | config, tensors, file)
    return Facts(
        tensors=doubled(tensors),
        layers=(name,),
        embedding=embedding.double(),
        output=tensors["lm_head.weight"].double(),
        heads=HEADS,
        eps=EPS,
        taps=taps,
        ids=ids,
        rope=rope[1],
        flags=flags,
    )
