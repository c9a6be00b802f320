"""Which implementation computes: what auto stands for, and what is refused in place of falling
back."""

from typing import Literal

import pytest
import torch

from specdec.kernels import exact, gpu, reference
from specdec.kernels.choose import Kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU the kernels run on, and no interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_auto_is_triton_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Kernels(graphs=False, shared_prefix=True)
    on_gpu = Kernels(impl="triton", graphs=False, shared_prefix=True)
    elsewhere = Kernels(impl="reference", graphs=False, shared_prefix=True)
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


# Exact mode


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_exact_kernels(impl: Literal["auto", "triton"]) -> None:
    asked = Kernels(impl=impl, exact=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert asked.settled(GPU, dtype) == Kernels(impl="triton", exact=True)
    assert asked.on(GPU) is exact
    assert Kernels(impl=impl).on(GPU) is gpu


def test_exact_kernels_offer_what_the_others_do() -> None:
    assert set(gpu.__all__) <= set(dir(exact))
    replaced = {name for name in gpu.__all__ if getattr(exact, name) is not getattr(gpu, name)}
    assert replaced == {"tree_attention", "linear", "project", "gated_linear"}


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "reason"),
    [
        ("reference", CPU, torch.float32, "would compute here; use"),
        ("reference", GPU, torch.bfloat16, "would compute here; use"),
        (
            "auto",
            CPU,
            torch.float32,
            "would compute here (Triton runs on an NVIDIA GPU, and device",
        ),
        (
            "auto",
            GPU,
            torch.float64,
            "would compute here (Triton has no kernels for float64); use",
        ),
    ],
)
def test_the_reference_is_not_exact(
    impl: Literal["auto", "reference"], device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    """The message names the setting and its value, what is in the way, and two ways out."""
    with pytest.raises(
        ValueError, match=r"^kernels\.exact=true: products of plain torch"
    ) as error:
        Kernels(impl=impl, exact=True).settled(device, dtype)
    message = str(error.value)
    assert f"kernels=reference {reason}" in message
    assert message.endswith("use kernels=triton on a GPU, or kernels.exact=false")
    assert "\n" not in message


def test_exact_kernels_by_name_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"^kernels\.impl=triton: runs on an NVIDIA GPU"):
        Kernels(impl="triton", exact=True).settled(CPU)


def test_the_interpreter_is_exact_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto does not choose it: it takes minutes where torch takes seconds."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Kernels(impl="triton", exact=True).on(CPU) is exact
    with pytest.raises(ValueError, match=r"kernels=reference would compute here; use"):
        Kernels(exact=True).settled(CPU)
