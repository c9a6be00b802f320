"""Which implementation of the kernels computes. Both offer the same functions.

`reference` is plain torch and runs anywhere; `gpu` is Triton. What a name computes is defined by
`reference`.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

import torch

TYPES = (torch.float32, torch.bfloat16, torch.float16)
GENERATIONS = (9, 10)  # compute capability: H100, H200; B200


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Which implementation to use, and how it divides its work.

    Args:
        impl: auto is triton on an NVIDIA GPU of one of the `GENERATIONS` and reference elsewhere;
            a choice made by name never falls back.
        exact: the bits of a token's hidden states, keys, values and logits are a function of its
            own prefix alone, whatever batch or tree it stands in.
        shared_prefix: read full pages that neighbouring rows of a batch share once for all of
            them. Of no concern to the reference, like what follows.
        graphs: capture steps in CUDA graphs.

    """

    impl: Literal["auto", "triton", "reference"] = "auto"
    exact: bool = False
    shared_prefix: bool = False
    graphs: bool = True

    def settled(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Kernels":
        """The same settings, with what auto stands for on a device and for models of a type.

        Raises:
            ValueError: the chosen implementation cannot run there.
        """
        obstacle = _obstacle(device, dtype)
        if self.impl == "triton" and obstacle is not None:
            raise ValueError(f"kernels.impl=triton: {obstacle}; use kernels=auto")
        able = device.type == "cuda" and obstacle is None
        if self.exact and (self.impl == "reference" or (self.impl == "auto" and not able)):
            reason = (
                "" if self.impl == "reference" or obstacle is None else f" (Triton {obstacle})"
            )
            raise ValueError(
                "kernels.exact=true: products of plain torch round by the number of rows, and "
                f"kernels=reference would compute here{reason}; use kernels=triton on a GPU, or "
                "kernels.exact=false"
            )
        if self.impl == "auto":
            return replace(self, impl="triton" if able else "reference")
        return self

    def on(self, device: torch.device) -> ModuleType:
        """The module that has the functions.

        Raises:
            ValueError: the chosen implementation cannot run on this device.
        """
        name = {"triton": "gpu", "reference": "reference"}[self.settled(device).impl]
        if self.exact:
            name = "exact"
        return importlib.import_module(f"specdec.kernels.{name}")


AUTO = Kernels()


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot compute there; None: it can."""
    if dtype not in TYPES:
        return f"has no kernels for {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":  # computes anywhere, slowly
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on an NVIDIA GPU, and device={device} is none"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in GENERATIONS:
        return f"runs on an H100, H200 or B200, not on compute capability {major}.{minor}"
    return None
