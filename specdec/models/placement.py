"""Placement: where models compute, in which type and with which kernels. And how much memory there
is."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from specdec.kernels.choose import AUTO, Kernels
from specdec.ranks import here

CPU = torch.device("cpu")
TYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model lies and how it computes; a target and its draft share one.

    Args:
        device: of weights and caches.
        dtype: of weights and hidden states.
        kernels: which implementation computes; auto is replaced by what it stands for there.

    Raises:
        ValueError: `kernels` cannot run there.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    kernels: Kernels = AUTO

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", self.kernels.settled(self.device, self.dtype))

    @classmethod
    def named(cls, *, device: str = "auto", dtype: str = "auto", kernels: Kernels = AUTO) -> Self:
        """From settings: auto is CUDA where there is some, and bfloat16 there, float32 on a CPU.

        Raises:
            ValueError: no such device here, not a floating type of models, or kernels that cannot
                run there.
        """
        where = choose_device(device)
        return cls(device=where, dtype=choose_dtype(dtype, where), kernels=kernels)


def choose_device(name: str) -> torch.device:
    """auto is CUDA where there is some. A GPU chosen by number becomes the current one: Triton
    launches its kernels there.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise ValueError(f"device={name}: must be auto, cpu or cuda, as in cuda:1")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        others = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu"
        raise ValueError(f"device={name}: not available here; use {others}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: not a floating type of models.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in TYPES:
        raise ValueError(f"dtype={name}: must be auto, {', '.join(TYPES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take; on a CPU without /proc, all there are. The least of all
    ranks, which ask together: what follows from it is the same on each."""
    if device.type != "cuda":
        known = Path("/proc/meminfo")
        found = re.search(r"MemAvailable: +(\d+) kB", known.read_text() if known.exists() else "")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return here().least(int(found[1]) * 1024 if found else total)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return here().least(torch.cuda.mem_get_info(device)[0] + kept)
