"""An experiment without a model, whose every token follows from the tokens before it, so that
whole runs take milliseconds."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from transformers import BatchEncoding, GenerationConfig

from specdec.cache import KVShape
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.flight import Step
from specdec.kernels.choose import Kernels
from specdec.lab.experiment import Experiment
from specdec.lab.identity import Identity
from specdec.lab.method import Method
from specdec.lab.progress import Live
from specdec.lab.prompts import Prompt
from specdec.lab.records import RecordSettings
from specdec.lab.runs import RunFolder
from specdec.lab.tracking import NoTracker
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree_records import TreeRecord
from specdec.verifier.greedy import Greedy

SETTINGS = {"seed": 3, "baseline": True}
TREES = 2  # of each text
NOTHING_MORE = RecordSettings()
RESOLVED = {"dtype": "float32"}
IDENTITY = Identity(settings=SETTINGS, contents={"prompts": "0123"})
TEXTS = [("one",), ("two", "and more"), ("three é",), ("four",), ("five", "6", "seven")]


class Tokenizer:
    """Letters; one of them takes two bytes."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return BatchEncoding({"input_ids": [ord(letter) for letter in text]})

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(map(chr, tokens))


class Decoder:
    """Two at a time, one to three tokens in a step."""

    stop_tokens = ()
    graphs = SimpleNamespace(counts={}, obstacle=None)

    def __init__(self, target: Any, capacity: Any) -> None:
        self.capacity, self.verifier = capacity, target
        self.waiting: deque[Request] = deque()

    def submit(self, request: Request, *, first: bool = False) -> None:
        (self.waiting.appendleft if first else self.waiting.append)(request)

    def run(self, on_step: Callable[[Step], None]) -> Iterator[Decoding]:
        live: list[Decoding] = []
        while self.waiting or live:
            while self.waiting and len(live) < 2:
                request = self.waiting.popleft()
                live.append(Decoding(request, row=0, tokens=list(request.prompt_ids)))
            counts = [self.step(sequence) for sequence in live]
            names = ("nodes", "depths", "accepted")
            lists = {name: [count - 1 for count in counts] for name in names}
            requests = [sequence.request.id for sequence in live]
            trees = [self.tree(sequence) for sequence in live if sequence.steps <= TREES]
            seconds = {"verify": 0.5}
            on_step(Step(requests=requests, tokens=counts, seconds=seconds, trees=trees, **lists))
            for sequence in [one for one in live if one.finish_reason]:
                live.remove(sequence)
                yield sequence

    def step(self, sequence: Decoding) -> int:
        left = sequence.request.max_new_tokens - len(sequence.output_ids)
        seen = hashlib.sha256(repr((sequence.request.id, sequence.tokens)).encode()).digest()
        new = [0xE9 if byte < 60 else 97 + byte % 26 for byte in seen[: 1 + seen[9] % 3]][:left]
        sequence.tokens += new
        sequence.steps += 1
        sequence.accepted_lengths.append(len(new))
        sequence.finish_reason = "length" if len(new) == left else None
        return len(new)

    def tree(self, sequence: Decoding) -> TreeRecord:
        """A root, and what came after it."""
        return TreeRecord(
            request=sequence.request.id,
            step=sequence.steps - 1,
            tokens=[sequence.tokens[-sequence.accepted_lengths[-1] - 1]],
            parents=[-1],
            draft=[None],
            target=[None],
            path=[0],
            next_token=sequence.tokens[-1],
        )


class Session:
    def __init__(self, method: Method, target: Any, capacity: Any, **how: Any) -> None:
        self.decoder = Decoder(target, capacity)

    def warm_up(self, tokens: list[int], new: int) -> None:
        pass

    def notes(self) -> dict[str, Any]:
        return {}


class Scripted(Experiment):
    def check(self, *_: Any, interrupted: bool) -> dict[str, Any]:
        return {}


def experiment(record: RecordSettings = NOTHING_MORE) -> Experiment:
    target: Any = SimpleNamespace(
        tokenizer=Tokenizer(),
        model=SimpleNamespace(generation_config=GenerationConfig()),
        vocab_size=256,
        check_tokens=lambda *_: None,
        max_context=200,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kv_shape=KVShape(layers=1, kv_heads=1, key_dim=1, value_dim=1),
        kernels=Kernels(impl="reference"),
        quantised=None,
    )
    method = Method(
        drafter=NoDrafter(),
        drafter_name="none",
        tree=Chain(budget=0),
        tree_name="chain",
        rule=Greedy(),
        sampling=SamplingParams(temperature=0.0, seed=0),
        verifier=lambda target: target,
    )
    prompts = [
        Prompt(index=i, id=str(i), category=None, turns=turns, conversation=False, messages=())
        for i, turns in enumerate(TEXTS)
    ]
    return Scripted(
        target=target,
        method=method,
        baseline=method,
        prompts=prompts,
        max_new_tokens=7,
        batch_size=2,
        record=record,
    )


def decode(
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    record: RecordSettings = NOTHING_MORE,
) -> dict[str, Any]:
    """A run in a folder; its summary."""
    texts = {i: len(turns) for i, turns in enumerate(TEXTS)}
    with RunFolder(out, config=SETTINGS, resume=resume, identity=IDENTITY, texts=texts) as folder:
        if folder.summary is not None:
            return folder.summary
        folder.identify(RESOLVED)
        live = Live(console or Console(quiet=True))
        summary: dict[str, Any] = experiment(record).run(folder, NoTracker(), live)
    return summary
