"""Shared by all tests: one thread per process, so that parallel test processes do not wait for
each other."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Published data and models that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return SHARED
