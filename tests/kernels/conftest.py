"""Small pieces, so that a test sees several."""

import pytest

from specdec.kernels.gpu import race, scan, softmax


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of even a small vocabulary."""
    monkeypatch.setattr(scan, "SCAN_BYTES", 128)
    monkeypatch.setattr(race, "RACE_CHUNK", 32)
    monkeypatch.setattr(softmax, "SUPPORT_BLOCK", 4)
