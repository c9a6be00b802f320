"""A block head by both implementations of the kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.heads.formats import load_head
from specdec.heads.paged_block import PagedBlock
from specdec.kernels.choose import Kernels
from specdec.models.paged import PagedLM
from specdec.request import Capacity
from tests.heads import made
from tests.heads.test_drafts import block_facts
from tests.models.tiny import tiny

LENGTHS = (11, 5)  # of what the target has read; the first takes several pages


def drafted(folder: Path, impl: Any) -> torch.Tensor:
    target = PagedLM(tiny("llama", num_hidden_layers=8), kernels=Kernels(impl=impl))
    head: Any = load_head(str(folder), target, kinds=("dflash",))
    model = PagedBlock(head, target)
    model.prepare(Capacity(rows=2, max_tokens=32, page_size=4))
    random = torch.Generator().manual_seed(0)
    size = len(head.config.taps) * made.D
    rows, states = torch.arange(2), torch.randn(2, max(LENGTHS), size, generator=random)
    for row in range(2):
        model.cache.open(row, tokens=32)
    model.read(rows, states, torch.tensor(LENGTHS))
    return model.logits(model.draft(rows, torch.tensor([7, 8]), 3))


@pytest.mark.some(1)
@pytest.mark.parametrize("case", ["z-lab", "windows", "windows, both ways", "biases", "jetspec"])
def test_kernels_say_what_the_reference_says(case: str, tmp_path: Path) -> None:
    target = PagedLM(tiny("llama", num_hidden_layers=8))
    block_facts(tmp_path, target, case)
    reference, triton = (drafted(tmp_path, impl) for impl in ("reference", "triton"))
    assert (reference - triton).abs().max() < 1e-5 * reference.abs().max()
