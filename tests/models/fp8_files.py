"""Checkpoints in float8 as other programs write them, made here by arithmetic in float64; and what
transformers computes with the weights they stand for."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.tiny import save

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128
WEIGHTS = "model.safetensors"
POWERS = 2.0 ** torch.arange(-30, 30)
# Of blocks 128 x 128 that fill no matrix evenly, but where projections are joined.
BLOCKED: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
}


def group(strategy: str, **weights: Any) -> dict[str, Any]:
    """Of compressed-tensors: weights and dynamic activations in float8."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    blocks = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    found = {"weights": {**kind, **blocks, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {**found, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }


FINEGRAINED = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
STORED: dict[str, tuple[dict[str, Any], str, str]] = {  # config, kind of scales, their name
    "channel": (group("channel"), "row", "weight_scale"),
    "tensor": (group("tensor"), "whole", "weight_scale"),
    "block": (group("block"), "block", "weight_scale"),
    "finegrained": (FINEGRAINED, "block", "weight_scale_inv"),
}


def quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values in float8, scales as they are stored, the weight they stand for in float64)."""
    rows, columns = weight.shape
    size = {"row": (1, columns), "whole": (rows, columns), "block": (BLOCK, BLOCK)}[kind]
    scales = torch.empty(-(-rows // size[0]), -(-columns // size[1]), dtype=torch.float32)
    values, meant = torch.empty(rows, columns, dtype=E4M3), weight.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rest = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            scales[i, j] = weight[rest].abs().max() / LARGEST
            values[rest] = (weight[rest].double() / scales[i, j].double()).float().to(E4M3)
            meant[rest] = values[rest].double() * scales[i, j].double()
    return values, scales[0, 0].reshape(1) if kind == "whole" else scales, meant


def write(model: Any, folder: Path, stored: str, *, head: bool = False) -> Any:
    """A folder of the model in float8, and the model of the weights that this stands for.

    Args:
        head: the output head is quantised as well.
    """
    config, kind, name = STORED[stored]
    save(model, folder)
    meant = copy.deepcopy(model)
    tensors = load_file(folder / WEIGHTS)
    for key, parameter in meant.named_parameters():
        if key.endswith("_proj.weight") or (head and key == "lm_head.weight"):
            values, scales, of = quantised(parameter.data, kind)
            parameter.data = of.to(parameter.dtype)
            tensors[key], tensors[f"{key.removesuffix('weight')}{name}"] = values, scales
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    configure(folder, quantization_config=config)
    return meant


def configure(folder: Path, **settings: Any) -> None:
    """Put these into the configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rounded(weight: Tensor) -> Tensor:
    """A weight as float8 with a power of two for each row has it, by a search: the smallest one
    that leaves the row within 448."""
    largest = weight.abs().amax(1, keepdim=True).double()
    scale = torch.where(largest <= 448 * POWERS.double(), POWERS.double(), torch.inf).amin(1)
    scale = torch.where(largest[:, 0] > 0, scale, 1.0)[:, None]
    return (weight.double() / scale).float().to(torch.float8_e4m3fn).double().mul(scale).float()


def peak_of(make: Any) -> tuple[int, Any]:
    """Most bytes that torch had allocated meanwhile, and what was made."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        made = make()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = most = 0
    for _, change in memory:
        total += change
        most = max(most, total)
    return most, made
