"""What every tree policy owes (`experiments/tools/contract.py`), over every file of
`configs/tree`."""

from functools import partial
from pathlib import Path

import pytest

from specdec.experiments.tools import contract
from specdec.lab.settings import CONFIGS


@pytest.mark.some(2)
@pytest.mark.parametrize("name", sorted(p.stem for p in Path(CONFIGS, "tree").glob("*.yaml")))
def test_it_keeps_its_contract(name: str) -> None:
    contract.check_policy(partial(contract.tree_for, [f"tree={name}"]))
