"""The law of the target in kernels, against the definition in float64."""

from typing import Any

import pytest
import torch

from specdec.kernels import gpu, reference
from tests.kernels.cases import BIT, DEVICE, FEW, same, some_logits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_law_of_the_target(dtype: torch.dtype, temperature: float, entropy: bool) -> None:
    logits = some_logits(3, 4, 101, dtype)
    size = torch.tensor([4, 0, 3], dtype=torch.int32, device=DEVICE)
    real = torch.arange(4, device=DEVICE) < size[:, None]
    poisoned = logits.masked_fill(~real[..., None], float("nan"))
    found = gpu.target_law(poisoned, size, temperature=temperature, entropy=entropy)
    options: dict[str, Any] = {"temperature": temperature, "entropy": entropy}
    exact = reference.target_law(logits.double(), size, **options)
    plain = reference.target_law(logits, size, **options)
    assert found.temperature == temperature
    assert (found.entropy is not None) == entropy
    assert torch.equal(found.top[real].double(), exact.top[real])
    for name in ("top", "total", "entropy")[: 2 + entropy]:
        mine, torchs, right = (getattr(law, name) for law in (found, plain, exact))
        assert mine.dtype == torch.float32
        assert mine.isfinite().all(), name
        error, theirs = ((each.double() - right)[real].abs() for each in (mine, torchs))
        bound = 2.0 * theirs.max() + FEW * BIT * right[real].abs().max()
        assert error.max() <= bound, name


@pytest.mark.usefixtures("small_chunks")
def test_the_law_of_strided_logits() -> None:
    logits = some_logits(2, 3, 70, torch.float32)
    size = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    wide = torch.full((3, 2, 79), float("nan"), device=DEVICE)
    wide[..., :70] = logits.transpose(0, 1)
    clean = gpu.target_law(logits, size, temperature=0.8, entropy=True)
    for strided in (wide.transpose(0, 1)[..., :70], logits.mT.contiguous().mT):
        assert same(gpu.target_law(strided, size, temperature=0.8, entropy=True), clean)
