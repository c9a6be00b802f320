"""On a GPU: what torch compiles is what it computes otherwise, for every method."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.training.batches import Batch
from specdec.training.measure import look
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.dspark import DSpark
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.methods.early_exit import EarlyExit
from specdec.training.methods.medusa import Medusa
from specdec.training.methods.mtp import MTP
from specdec.training.methods.peagle import PEagle
from specdec.training.methods.small_llama import SmallLlama
from specdec.training.teacher import Teacher, plain
from specdec.training.trainee import Surroundings

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
METHODS: dict[str, Any] = {
    "eagle3": lambda: Eagle3(steps=3, draft_vocab=4096),
    "eagle": lambda: Eagle(loss="eagle1", steps=2),
    "medusa": lambda: Medusa(heads=2),
    "dflash": lambda: DFlash(),
    "dspark": lambda: DSpark(),
    "mtp": lambda: MTP(),
    "peagle": lambda: PEagle(),
    "small_llama": lambda: SmallLlama(loss="lk"),
    "early_exit": lambda: EarlyExit(),
}


@pytest.fixture(scope="module")
def lm() -> PagedLM:
    device = torch.device("cuda")
    return load_model("zoo:target", Placement(device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", METHODS)
def test_compiled_is_what_it_is_otherwise(name: str, lm: PagedLM) -> None:
    torch._dynamo.reset()  # which compiles a function for a few kinds of arguments alone
    torch.manual_seed(0)
    tokens = torch.randint(lm.vocab_size, (4, 66), device=lm.device)
    mask = torch.rand(4, 64, device=lm.device) > 0.2
    counts = torch.arange(lm.vocab_size)
    plainly = Surroundings(target=lm, counts=counts, chunk=128, compiled=False, seed=0)
    found = []
    for surroundings in (plainly, replace(plainly, compiled=True)):
        method = METHODS[name]()
        method.check(lm)
        trainee = method.make(surroundings)
        with plain(lm.model) as model, torch.autocast("cuda", torch.bfloat16):
            teacher = None if trainee.is_target else Teacher(model, trainee.taps)
            lesson = trainee.lesson(look(teacher, Batch(tokens=tokens, mask=mask)))
        lesson.loss.backward()
        trained = [p for p in trainee.module.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        found.append((lesson.loss.item(), torch.cat([p.grad.flatten() for p in trained])))
    (loss, gradient), (other, compiled) = found
    assert other == pytest.approx(loss, rel=0.01)
    # Both round to bfloat16, in other places.
    assert torch.cosine_similarity(gradient, compiled, dim=0) > 0.99
