"""Rates of acceptance for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.rates import AcceptanceRates


def rates_of(*rows: Sequence[float]) -> AcceptanceRates:
    return AcceptanceRates(values=[list(row) for row in rows])


def random_rates(seed: int, *, descending: bool = False) -> AcceptanceRates:
    """Up to 3 depths and 4 ranks, some of them never accepted; siblings in any order, or else
    such that none is likelier than an elder one."""
    generator = np.random.default_rng(seed)
    depths, ranks = generator.integers(1, 4), generator.integers(1, 5)
    values = generator.dirichlet(np.ones(ranks + 1), size=depths)[:, :-1]
    values[generator.random(values.shape) < 0.25] = 0.0
    return AcceptanceRates(values=-np.sort(-values) if descending else values)


def cases_file(folder: Path, *cases: dict[str, Any]) -> str:
    path = folder / "rates.json"
    path.write_text(json.dumps({"cases": cases, "more": 1}))
    return str(path)


def case(children: str, temperature: float, first: float, **more: Any) -> dict[str, Any]:
    return {"children": children, "temperature": temperature, "rates": [[first, 0.1]], **more}
