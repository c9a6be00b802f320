"""Which implementation computes: what auto stands for, and what is refused in place of falling
back."""

import pytest
import torch

from specdec.kernels import reference
from specdec.kernels.choose import Kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU the kernels run on, and no interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_auto_is_triton_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Kernels(fixed_splits=3, shared_prefix=True)
    on_gpu = Kernels(impl="triton", fixed_splits=3, shared_prefix=True)
    elsewhere = Kernels(impl="reference", fixed_splits=3, shared_prefix=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert auto.settled(GPU, dtype) == on_gpu
        assert auto.settled(CPU, dtype) == elsewhere
    assert auto.settled(GPU, torch.float64) == elsewhere
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert auto.settled(CPU) == elsewhere


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (12, 0)])
def test_other_generations_of_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Kernels().settled(GPU).impl == "reference"
    with pytest.raises(ValueError, match=r"capability {}\.{}".format(*capability)):
        Kernels(impl="triton").settled(GPU)


def test_other_makers_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert Kernels().settled(GPU).impl == "reference"
    with pytest.raises(ValueError, match="an NVIDIA GPU, and device=cuda:0 is none"):
        Kernels(impl="triton").settled(GPU)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, torch.float32, "runs on an NVIDIA GPU, and device=cpu is none"),
        (GPU, torch.float64, "has no kernels for float64"),
    ],
)
def test_a_name_never_falls_back(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=r"kernels\.impl=triton: .*; use kernels=auto") as error:
        Kernels(impl="triton").settled(device, dtype)
    assert reason in str(error.value)
    assert Kernels(impl="reference").settled(device, dtype).impl == "reference"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Kernels().settled(GPU).impl == "reference"
    with pytest.raises(ValueError, match="the package triton is not installed"):
        Kernels(impl="triton").settled(GPU)


def test_modules() -> None:
    assert Kernels(impl="reference").on(GPU) is reference
    assert Kernels().on(CPU) is reference
    names = {"commit_path", "tree_attention", "tree_structure", "write_tree", "RULES"}
    assert names <= set(dir(reference))


def test_splits_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"kernels\.fixed_splits=0: must be at least 1"):
        Kernels(fixed_splits=0)
