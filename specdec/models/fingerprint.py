"""Which model it is, and on which machine it runs: what measured tables are true of."""

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.models.quantised import Fp8Linear

if TYPE_CHECKING:
    from specdec.models.paged import PagedLM

SAMPLE = 64  # values of a weight that are looked at


def fingerprint(lm: "PagedLM") -> str:
    """What tells one model from another, wherever it lies and in whatever type: a hash of names,
    shapes and some values of its weights, as bfloat16, or as they are in float8."""
    digest = hashlib.sha256(type(lm.model).__name__.encode())
    for name, weight in sorted(lm.model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if type(weight.data) is Tensor:  # not of quantised ones
            flat = weight.data.view(-1) if weight.data.is_contiguous() else weight.data.flatten()
            some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().bfloat16()
            digest.update(some.view(torch.int16).cpu().numpy().tobytes())
    for name, module in sorted(lm.model.named_modules()):
        if isinstance(module, Fp8Linear):
            digest.update(f"{name} fp8 {tuple(module.weight.shape)}".encode())
            flat = module.values.view(torch.uint8).flatten()
            some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
            digest.update(some.cpu().numpy().tobytes())
            digest.update(module.scale.flatten()[:SAMPLE].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
