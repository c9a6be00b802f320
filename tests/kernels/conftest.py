"""Small pieces, so that a test sees several; products in an order that does not look at rows."""

from typing import Any

import numpy as np
import pytest
import triton
from triton.runtime import interpreter

from specdec.kernels.gpu import race, scan, softmax


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of even a small vocabulary."""
    monkeypatch.setattr(scan, "SCAN_BYTES", 128)
    monkeypatch.setattr(race, "RACE_CHUNK", 32)
    monkeypatch.setattr(softmax, "SUPPORT_BLOCK", 4)


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are added up column after column, as by tensor cores.

    It would ask numpy, whose library rounds a row of a product by where in the tile it stands.
    """

    def create_dot(builder: Any, a: Any, b: Any, total: Any, *how: Any) -> Any:
        left, right = a.data.astype(np.float32), b.data.astype(np.float32)
        found = total.data.copy()
        for column in range(left.shape[1]):
            found += left[:, column, None] * right[column]
        return interpreter.TensorHandle(found, total.dtype.scalar)

    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
