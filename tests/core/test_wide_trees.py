"""Trees of 128 to 256 nodes through the whole loop: at temperature 0 they change no token, whoever
drafts them and whatever shapes them."""

import pytest
import torch

from specdec.experiments.tools.contract import (
    Run,
    decode,
    method_for,
    plain_outputs,
    ready,
)
from specdec.models.load import Models
from specdec.models.placement import Placement
from specdec.tree import MOST_NODES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares in float32 on a CPU")

DYNAMIC = "tree=dynamic tree.width=20 tree.depth=6"
PAIR = "drafter=small_llama drafter.path=zoo:draft"
# What drafts, how the trees are shaped, and how many nodes the largest has at least.
PLANS = {
    "dynamic, all there may be": (f"{PAIR} {DYNAMIC} tree.budget=256", 257),
    "dynamic, 128 with the root": (f"{PAIR} {DYNAMIC} tree.budget=127", 128),
    "static": (f"{PAIR} tree=static tree.widths=[6,5,2,2]", 217),
    "one level": (f"{PAIR} tree=static tree.widths=[256]", 257),
    "threshold": (f"{PAIR} tree=threshold tree.threshold=0.003 tree.depth=3 tree.budget=256", 34),
    "optimal": (f"{PAIR} tree=optimal tree.budget=256", 100),
    "early exit": (f"drafter=early_exit {DYNAMIC} tree.budget=255", 256),
    "token recycling": (f"drafter=token_recycling {DYNAMIC} tree.budget=255", 64),
    "cascade": (f"drafter=compose drafter.mode=cascade {DYNAMIC} tree.budget=256", 129),
}


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(Placement())


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    return plain_outputs(models)


def largest(run: Run) -> int:
    return max(int(tree.size.max()) for tree, _ in run.steps)


def decoded(words: str, models: Models, rows: int) -> Run:
    return decode(ready(method_for(words.split()), models), models, rows=rows)


@pytest.mark.some(4)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_wide_trees_change_no_greedy_output(
    models: Models, plain: list[list[int]], plan: str, rows: int
) -> None:
    words, nodes = PLANS[plan]
    run = decoded(words, models, rows)
    assert run.outputs == plain
    assert nodes <= largest(run) <= MOST_NODES + 1
