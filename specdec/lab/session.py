"""Session: a method that is ready to decode, asked and timed from outside."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from specdec.flight import Step
from specdec.lab.method import Method
from specdec.lab.prompts import Asked
from specdec.models.paged import PagedLM
from specdec.request import Capacity, Request

WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What decoding a batch once has yielded.

    Args:
        seconds: by the clock, the device's work included.
        outputs: new tokens of each prompt.
        passes: of the target, for each prompt.
        steps: of our own decoder.
    """

    seconds: float
    outputs: list[list[int]]
    passes: list[int]
    steps: list[Step] = field(default_factory=list)

    @property
    def verbs(self) -> dict[str, float]:
        """Seconds of each verb, of our own decoder."""
        total: Counter[str] = Counter()
        for step in self.steps:
            total.update(step.seconds)
        return dict(total)


class Session(Protocol):
    """A method that is ready to decode: our own, or another program's."""

    def warm_up(self, tokens: list[int]) -> None:
        """So that no prompt pays for what happens once."""

    def decode(self, batch: Sequence[Asked], new: int) -> Decoded:
        """Up to `new` tokens for each prompt of a batch."""

    def notes(self) -> dict[str, Any]:
        """What to know of it afterwards."""


class OurSession:
    """A decoder of a method that is loaded.

    Args:
        capacity: of its caches; what a batch has more than rows waits for its turn.
        how: what else `Method.decoder` takes; without, outputs are of equal length.
    """

    def __init__(self, method: Method, target: PagedLM, capacity: Capacity, **how: Any) -> None:
        self.method, self.device = method, target.device
        self.decoder = method.decoder(target, capacity, **how)

    def warm_up(self, tokens: Sequence[int], new: int = WARM_UP_TOKENS) -> None:
        self.decoder.warm_up(tokens, new)

    def decode(self, batch: Sequence[Asked], new: int) -> Decoded:
        requests = [
            Request(id=a.id, prompt_ids=a.tokens, max_new_tokens=new, category=a.category)
            for a in batch
        ]
        steps: list[Step] = []
        wait(self.device)
        begun = time.perf_counter()
        done = {s.request.id: s for s in self.decoder.run(requests, on_step=steps.append)}
        wait(self.device)
        return Decoded(
            seconds=time.perf_counter() - begun,
            outputs=[done[a.id].output_ids for a in batch],
            passes=[done[a.id].steps for a in batch],
            steps=steps,
        )

    def notes(self) -> dict[str, Any]:
        graphs, chosen = self.decoder.graphs, dict(self.method.notes)
        return {
            "graphs": {"counts": graphs.counts, "obstacle": graphs.obstacle},
            **({"chosen_by": chosen} if chosen else {}),
        }


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
