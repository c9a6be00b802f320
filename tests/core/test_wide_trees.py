"""Trees of 128 to 256 nodes through the whole loop: at temperature 0 they change no token, whoever
drafts them and whatever shapes them; above it every rule ends what it began."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.experiments.tools import contract
from specdec.experiments.tools.contract import (
    TARGET,
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
    "threshold": (f"{PAIR} tree=threshold tree.threshold=0.003 tree.depth=3 tree.budget=256", 30),
    "optimal": (f"{PAIR} tree=optimal tree.budget=256", 100),
    "chain": (f"{PAIR} tree=chain tree.budget=64", 20),
    "early exit": (f"drafter=early_exit {DYNAMIC} tree.budget=255", 256),
    "eagle3": (f"drafter=eagle3 drafter.path=zoo:eagle3 {DYNAMIC} tree.budget=255", 256),
    "token recycling": (f"drafter=token_recycling {DYNAMIC} tree.budget=255", 64),
    "union": (
        f"drafter=compose drafter.mode=union {DYNAMIC} tree.budget=255",
        129,
    ),
    "cascade": (f"drafter=compose drafter.mode=cascade {DYNAMIC} tree.budget=256", 129),
}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Fewer tokens, for each step is one of hundreds of nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "NEW", 10)
        yield


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


@pytest.mark.some(1)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_wide_trees_change_no_greedy_output(
    models: Models, plain: list[list[int]], plan: str, rows: int
) -> None:
    words, nodes = PLANS[plan]
    run = decoded(words, models, rows)
    assert run.outputs == plain
    assert nodes <= largest(run) <= MOST_NODES + 1


RULES = {
    "recursive_rejection": "sample",
    "target_only": "top_k",
    "traversal": "sample",
    "hsd": "sample",
    "k_seq": "sample_with_replacement",
    "multi_path": "sample_with_replacement",
    "typical acceptance.allow_lossy=true": "top_k",
    "relaxed acceptance.allow_lossy=true": "top_k",
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_seed_gives_one_text_with_wide_trees_whatever_the_batch(
    models: Models, rule: str
) -> None:
    words = f"{PAIR} {DYNAMIC} tree.budget=200 sampling=sample seed=7"
    words = f"{words} acceptance={rule} tree.children={RULES[rule]}"
    alone, together = (decoded(words, models, rows) for rows in (1, 3))
    assert alone.outputs == together.outputs
    assert largest(alone) > 128


def table(folder: Path) -> str:
    """Costs at which a wide tree pays: nodes are all but free."""
    nodes, widths = [1, 16, 64, 128, 192, 256], [1, 8, 64]
    about: dict[str, Any] = {
        "verify": {
            "batch": [1, 4],
            "nodes": nodes,
            "context": [64],
            "seconds": [[[1.0 + n * 1e-7] for n in nodes]] * 2,
        },
        "draft": {
            "batch": [1, 4],
            "width": widths,
            "context": 64,
            "seconds": [[1e-3] * len(widths)] * 2,
        },
    }
    path = folder / "costs.json"
    path.write_text(json.dumps(about))
    return str(path)


@pytest.mark.some(1)
@pytest.mark.parametrize("rows", [1, 3])
def test_cost_aware_takes_a_wide_tree_where_it_pays(
    models: Models, plain: list[list[int]], tmp_path: Path, rows: int
) -> None:
    """And none beyond what was measured, with the root."""
    words = (
        f"{PAIR} tree=cost_aware tree.costs={table(tmp_path)} tree.budget=256 tree.depth=6 "
        f"batch_size={rows}"
    )
    method = method_for(words.split())
    assert 64 < method.tree.budget <= 255
    run = decode(ready(method, models), models, rows=rows)
    assert run.outputs == plain
    assert largest(run) == method.tree.budget + 1
    assert models.load(TARGET).vocab_size > MOST_NODES
