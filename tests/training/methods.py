"""Every method with the smallest settings, and what its trainee sees."""

from typing import Any

import torch

from specdec.models.paged import PagedLM
from specdec.training.batches import Batch, Seen
from specdec.training.measure import look
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.dspark import DSpark
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.early_exit import EarlyExit
from specdec.training.methods.medusa import Medusa
from specdec.training.methods.mtp import MTP
from specdec.training.methods.peagle import PEagle
from specdec.training.methods.small_llama import SmallLlama
from specdec.training.teacher import Teacher, plain
from tests.training.small import VOCAB, surroundings

SLOTS = 8
METHODS: dict[str, Any] = {
    "eagle": lambda **rates: Eagle(steps=3, **rates),
    "eagle1": lambda **rates: Eagle(loss="eagle1", steps=1, **rates),
    "medusa": lambda **rates: Medusa(heads=3, blocks=2, tied=False, **rates),
    "dflash": lambda **rates: DFlash(block=4, layers=1, anchors=3, **rates),
    "dspark": lambda **rates: DSpark(
        block=3, layers=1, anchors=3, rank=4, confidence=False, **rates
    ),
    "mtp": lambda **rates: MTP(**rates),
    "peagle": lambda **rates: PEagle(steps=3, layers=1, anchors=3, **rates),
    "small_llama": lambda **rates: SmallLlama(**rates),
    "early_exit": lambda **rates: EarlyExit(exit_layer=1, weight=1.0, **rates),
}
HEADS = ("dflash", "dspark", "eagle", "medusa", "mtp", "peagle")


def made(name: str, lm: PagedLM, **rates: Any) -> Any:
    method = METHODS[name](**rates)
    method.check(lm)
    return method, method.make(surroundings(lm))


def seen_of(lm: PagedLM, trainee: Any, rows: int = 1) -> Seen:
    torch.manual_seed(1)
    tokens = torch.stack([torch.randperm(VOCAB)[: SLOTS + 2] for _ in range(rows)])
    batch = Batch(tokens=tokens, mask=torch.ones(rows, SLOTS, dtype=torch.bool))
    with plain(lm.model) as model:
        return look(None if trainee.is_target else Teacher(model, trainee.taps), batch)
