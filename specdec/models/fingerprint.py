"""Which model it is, and on which machine it runs: what measured tables are true of."""

import hashlib
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.models.quantised import Fp8Linear
from specdec.models.shards import cut_along, local, numbers_of, shape_of
from specdec.ranks import here

if TYPE_CHECKING:
    from specdec.models.paged import PagedLM

SAMPLE = 64  # values of a weight that are looked at


def fingerprint(lm: "PagedLM") -> str:
    """What tells one model from another, wherever it lies, in whatever type and shared by whom: a
    hash of names, shapes and some values of its weights, as bfloat16, or as they are in float8.
    Ranks ask together."""
    model = lm.model
    digest = hashlib.sha256(type(model).__name__.encode())
    tied = model.config.tie_word_embeddings and model.get_output_embeddings().weight
    for name, weight in sorted(model.named_parameters()):
        layer, dim = model.get_submodule(name.rpartition(".")[0]), cut_along(weight)
        if weight is tied and dim is not None:  # the embedding, which ranks have a second time
            continue
        if isinstance(layer, Fp8Linear) and layer.dim == 0:  # whose bias this is
            dim = 0
        part = local(weight.data)
        digest.update(f"{name} {tuple(shape_of(part, dim, here()))}".encode())
        if type(part) is Tensor:  # not of quantised ones
            digest.update(_bytes(_sample(part, dim).float().bfloat16().view(torch.int16)))
    for name, module in sorted(model.named_modules()):
        if isinstance(module, Fp8Linear):
            part = module.values.view(torch.uint8)
            digest.update(f"{name} fp8 {tuple(shape_of(part, module.dim, here()))}".encode())
            digest.update(_bytes(_sample(part, module.dim)))
            dim = module.dim if module.weight.blocked or module.dim == 0 else None
            digest.update(_bytes(_sample(module.scale, dim, first=True)))
    return digest.hexdigest()[:16]


def _sample(part: Tensor, dim: int | None, *, first: bool = False) -> Tensor:
    """Of the numbers of a weight, of which ranks may have parts along a dimension, the `first`, or
    some from all over it."""
    shape = shape_of(part, dim, here())
    count = math.prod(shape)
    places = torch.arange(0, count, 1 if first else max(1, count // SAMPLE))[:SAMPLE]
    return numbers_of(part, dim, shape, places, here())


def _bytes(some: Tensor) -> bytes:
    return some.cpu().numpy().tobytes()


def hardware_of(device: torch.device) -> dict[str, Any]:
    """device, cpu and threads; on a GPU gpu and gpus as well."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpus"] = torch.cuda.device_count()
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
