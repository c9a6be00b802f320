"""Shared by the tests of benchmarks and figures."""

from dataclasses import asdict
from typing import Any

import pytest

from specdec.experiments.bench import attention as kernel_attention
from tests.experiments.benched import ScriptedClock, small_case


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The record of a shape of which everything runs here, as the benchmark writes them."""
    case = small_case(context=64, nodes=5, copies=1)
    record: dict[str, Any] = {**asdict(case.shape), "methods": {}}
    columns = kernel_attention.beside_peers(case, record["methods"])
    ceilings = {"read": 4e12, "compute": 8e14}
    kernel_attention.fill(record, case, columns, ScriptedClock(), ceilings)
    return record
