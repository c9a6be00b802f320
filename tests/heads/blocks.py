"""Small random block heads, written as their authors publish them, for a small random target."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.heads.made import (
    EPS,
    FLAGS,
    HEADS,
    PLAIN,
    D,
    Random,
    doubled,
    layer_config,
    mapped,
    wrapper,
    write,
)
from tests.heads.oracle import Facts

RANK = 6  # of DSpark's correction, and of DFlash 2's selector
TAPS, CHANNELS = 3, 8  # of DFlash 2's convolutions, and of a group of theirs


def selector(
    random: Random, tensors: dict[str, Tensor], layers: Iterable[str], vocabulary: int
) -> dict[str, Any]:
    """Add what DFlash 2 has besides, by the names of its files; what config.json says of it."""
    for name in (f"{layer}.{part}_conv" for layer in layers for part in ("attention", "mlp")):
        tensors[f"{name}.base_kernel"] = 3 * random.matrix(2, TAPS, D)
        rows = 2 * TAPS * D // CHANNELS
        tensors[f"{name}.kernel_projection.weight"] = random.matrix(rows, D)
    name = "candidate_selector"
    tensors[f"{name}.predecessor_codebook"] = 6 * random.matrix(vocabulary, RANK)
    tensors[f"{name}.successor_codebook"] = 6 * random.matrix(vocabulary, RANK)
    tensors[f"{name}.hidden_projection.weight"] = random.matrix(RANK, D)
    return {"conv_kernel_size": TAPS, "conv_group_size": CHANNELS, "selector_rank": RANK}


def dflash(
    folder: Path,
    target: Any,
    *,
    layout: str = "z-lab",
    layers: int = 2,
    slots: int = 6,
    mask: int = 5,
    taps: tuple[Any, ...] | None = None,
    sliding: Iterable[int] = (),
    window: int = 7,
    bias: str = "",
    named: int | None = None,
    own_mask: str = "",
    markov: str = "",
    confidence: str = "",
    choices: int = 0,
    head_dim: int = 8,
    prefix: str = "",
    rope: tuple[dict[str, Any], dict[str, Any]] = PLAIN,
    config: Mapping[str, Any] | None = None,
    inner: Mapping[str, Any] | None = None,
) -> Facts:
    """A DFlash head.

    Args:
        taps: the states it reads; None for those of its layout.
        sliding: layers with a window.
        named: tokens it can name, of speculators; None for all.
        own_mask: "tensor" or "dict", what the file of the mask's embedding holds.
        markov: kind of the correction of DSpark.
        confidence: "slot" or "both", what a head of it reads.
        choices: tokens that the selector of DFlash 2 scores; 0: it is none.
        config, inner: more of config.json, and of its dflash_config.
    """
    random, n = Random(), target.config.num_hidden_layers
    vocabulary = target.config.vocab_size
    where = taps or ((0, 3, n - 2, "normal") if layout == "deepspec" else (2, 4, n - 2))
    tensors: dict[str, Tensor] = {}
    names = tuple(f"layers.{index}" for index in range(layers))
    norms = ("input_layernorm",)
    for name in names:
        tensors |= random.layer(name, D, head_dim=head_dim, bias=bias, normed=True, norms=norms)
    tensors["fc.weight"] = random.matrix(D, len(where) * target.config.hidden_size)
    tensors["hidden_norm.weight"] = random.norm(D)
    tensors["norm.weight"] = random.norm(D)
    embedding = target.get_input_embeddings().weight.detach()
    output = target.get_output_embeddings().weight.detach()
    ids = torch.arange(vocabulary)
    if target.config.hidden_size != D:  # then it must have its own
        embedding, output = random.matrix(vocabulary, D), 3 * random.matrix(vocabulary, D)
    if layout in ("deepspec", "speculators"):
        tensors["embed_tokens.weight"] = embedding
        if named is not None:
            ids = random.ids(named, vocabulary)
            tensors |= mapped(named, ids, vocabulary)
            output = 3 * random.matrix(named, D)
        tensors["lm_head.weight"] = output
    heads: dict[str, Any] = {}
    if markov:
        heads = {"markov_rank": RANK, "markov_head_type": markov}
        tensors["markov_head.markov_w1.weight"] = 6 * random.matrix(vocabulary, RANK)
        tensors["markov_head.markov_w2.weight"] = 6 * random.matrix(len(output), RANK)
        more = {
            "gated": ("gate_proj", D + RANK, RANK),
            "rnn": ("joint_proj", D + 2 * RANK, 3 * RANK),
        }
        if markov in more:
            name, inputs, outs = more[markov]
            tensors[f"markov_head.{name}.weight"] = random.matrix(outs, inputs)
            tensors[f"markov_head.{name}.bias"] = 3 * random.matrix(outs)
    if confidence:
        heads["enable_confidence_head"] = True
        inputs = D + (RANK if confidence == "both" else 0)
        tensors["confidence_head.proj.weight"] = random.matrix(1, inputs)
        tensors["confidence_head.proj.bias"] = random.matrix(1)
    if choices:
        heads = selector(random, tensors, names, vocabulary) | {"selector_top_k": choices}
    types = ["sliding_attention" if i in set(sliding) else "full_attention" for i in range(layers)]
    layer = layer_config(target, model_type="qwen3", num_hidden_layers=layers, **rope[0])
    layer |= {"layer_types": types, "attention_bias": bool(bias)}
    if sliding:
        layer |= {"use_sliding_window": True, "sliding_window": window}
    outputs = [n - 1 if tap == "normal" else tap - 1 for tap in where]
    own = {"target_layer_ids": outputs, "mask_token_id": mask, **(inner or {})}
    whole: dict[str, Any]
    if layout == "speculators":
        kind = "dspark" if markov else "dflash2" if choices else "dflash"
        whole = wrapper(layer, where, ()) | {"speculators_model_type": kind} | heads
        whole = {key: value for key, value in whole.items() if key not in FLAGS}
        whole |= {
            "mask_token_id": mask,
            "block_size": slots,
            "draft_vocab_size": named or vocabulary,
        }
    elif layout == "deepspec":
        whole = layer | own | {"block_size": slots, "markov_rank": 0, "num_anchors": 4} | heads
        whole["architectures"] = ["Qwen3DSparkModel"]
    else:
        name = "DFlash2DraftModel" if choices else "DFlashDraftModel"
        whole = layer | {"architectures": [name], "block_size": slots}
        whole["dflash_config"] = own
        own |= heads | ({"projector_type": "dspark"} if markov else {})
    if layout == "jetspec":
        own["causal_head"] = True
    write(
        folder,
        whole | dict(config or {}),
        {prefix + key: value for key, value in tensors.items()},
        "model.safetensors",
    )
    row = embedding[mask]
    if own_mask:
        row = random.matrix(D)
        held = {"mask_token_id": mask, "embedding": row} if own_mask == "dict" else row[None]
        torch.save(held, folder / "mask_embedding.pt")
    causal = [layout == "jetspec" or i in set(sliding) for i in range(layers)]
    return Facts(
        tensors=doubled(tensors),
        layers=names,
        embedding=embedding.double(),
        output=output.double(),
        heads=HEADS,
        eps=EPS,
        taps=where,
        ids=ids,
        rope=rope[1],
        flags=frozenset({"shifted"} if layout == "deepspec" or markov else ()),
        block={
            "slots": slots,
            "choices": choices,
            "mask": row.double(),
            "causal": causal,
            "windows": [window if i in set(sliding) else None for i in range(layers)],
        },
    )
