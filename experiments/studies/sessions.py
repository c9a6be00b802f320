"""Decoding as the experiments see it: prompts in, outputs and seconds out, ours and that of
transformers alike."""

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from specdec.cached_model import CachedModel
from specdec.decode import Decoder, Step
from specdec.drafters.growth import plan
from specdec.drafters.small_llama import SmallLlama
from specdec.lab.prompts import encode, load_prompts
from specdec.models.load import zoo_path
from specdec.models.paged import PagedLM
from specdec.models.standin import named_shape, standin
from specdec.protocols import AcceptanceRule, Drafter, TreePolicy
from specdec.request import Request
from specdec.sampling import SamplingParams
from specdec.verifier.verifier import TreeVerifier

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WARM_UP_TOKENS = 16


class Asked(NamedTuple):
    """A prompt: the number that seeds its randomness, its name and its tokens."""

    id: int
    name: str
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What decoding a batch once has yielded.

    Args:
        seconds: by the clock, the device's work included.
        outputs: new tokens of each prompt.
        passes: of the target, counted for each sequence.
        verbs: seconds of each verb, of our own decoder.
        steps: of our own decoder.
    """

    seconds: float
    outputs: list[list[int]]
    passes: int
    verbs: dict[str, float] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


class Session(Protocol):
    """A method that is ready to decode."""

    def warm_up(self, tokens: list[int]) -> None:
        """So that no prompt pays for what happens once."""

    def decode(self, batch: Sequence[Asked], new: int) -> Decoded:
        """Exactly `new` tokens for each prompt of a batch."""

    def notes(self) -> dict[str, Any]:
        """What to know of it afterwards."""


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """A `Decoder`, set up as on a GPU.

    Args:
        batch: prompts decoded together.
        longest: tokens of a prompt and its output at most.
    """

    def __init__(
        self,
        target: PagedLM,
        drafter: Drafter,
        rule: AcceptanceRule,
        *,
        temperature: float,
        batch: int,
        longest: int,
    ) -> None:
        self.device = target.device
        self.decoder = Decoder(
            verifier=TreeVerifier(target),
            drafter=drafter,
            rule=rule,
            sampling=SamplingParams(temperature=temperature),
            max_context=target.max_context,
            device=target.device,
            kernels=target.kernels,
            batch_size=batch,
            stop_tokens=(),
            max_tokens=longest,
            page_size=128,
        )

    def warm_up(self, tokens: list[int]) -> None:
        self.decoder.warm_up(tokens, WARM_UP_TOKENS)

    def decode(self, batch: Sequence[Asked], new: int) -> Decoded:
        requests = [Request(id=a.id, prompt_ids=a.tokens, max_new_tokens=new) for a in batch]
        steps: list[Step] = []
        wait(self.device)
        begun = time.perf_counter()
        done = {s.request.id: s for s in self.decoder.run(requests, on_step=steps.append)}
        wait(self.device)
        seconds = time.perf_counter() - begun
        verbs: Counter[str] = Counter()
        for step in steps:
            verbs.update(step.seconds)
        return Decoded(
            seconds=seconds,
            outputs=[done[a.id].output_ids for a in batch],
            passes=sum(s.steps for s in done.values()),
            verbs=dict(verbs),
            steps=steps,
        )

    def notes(self) -> dict[str, Any]:
        graphs = self.decoder.graphs
        return {"graphs": {"counts": graphs.counts, "obstacle": graphs.obstacle}}


class Theirs:
    """transformers' `generate`, one prompt at a time.

    Args:
        extra: what makes it more than plain generation, such as `assistant_model`.
    """

    def __init__(self, model: Any, *, temperature: float, **extra: Any) -> None:
        self.model, self.temperature, self.extra = model, temperature, extra
        self._passes = 0

    def warm_up(self, tokens: list[int]) -> None:
        self.decode([Asked(0, "", tokens)], WARM_UP_TOKENS)

    def decode(self, batch: Sequence[Asked], new: int) -> Decoded:
        (asked,) = batch
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": 0,  # transformers keeps 50 tokens otherwise
                "top_p": 1.0,
            }
        config = GenerationConfig(
            max_new_tokens=new, eos_token_id=None, pad_token_id=0, use_cache=True, **sampling
        )
        inputs = torch.tensor([asked.tokens], device=self.model.device)
        mask = torch.ones_like(inputs)
        torch.manual_seed(asked.id)
        self._passes = 0
        hook = self.model.register_forward_pre_hook(self._count)
        wait(self.model.device)
        begun = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                inputs, attention_mask=mask, generation_config=config, **self.extra
            )
        wait(self.model.device)
        seconds = time.perf_counter() - begun
        hook.remove()
        output = out[0, len(asked.tokens) :].tolist()
        return Decoded(seconds=seconds, outputs=[output], passes=self._passes)

    def notes(self) -> dict[str, Any]:
        return {}

    def _count(self, *_: Any) -> None:
        self._passes += 1


def load_plain(path: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model of a zoo or stand-in name, with its own attention (SDPA)."""
    if path.startswith("standin:"):
        shape, zoo = named_shape(path.removeprefix("standin:"))
        model = standin(zoo_path(zoo), shape, device=device, dtype=dtype)
    else:
        where = zoo_path(path.removeprefix("zoo:")) if path.startswith("zoo:") else Path(path)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype).to(device).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def with_tree(drafter: SmallLlama, tree: TreePolicy) -> SmallLlama:
    """The same drafter with another tree and a cache of its own; both share the weights."""
    twin = copy.copy(drafter)
    twin.tree = tree
    twin.levels = plan(tree, None, drafter.candidates)
    twin.model = CachedModel(drafter.lm)
    return twin


def read_prompts(tokenizer: Any, path: str | None, name: str, count: int) -> list[Asked]:
    """The first prompts of a file, or of the built-in set, as raw text: code to be continued, or
    first turns."""
    prompts = load_prompts(path=path, field=None, limit=count)
    return [
        Asked(number, f"{name}/{number}", encode(tokenizer, prompt, chat="never"))
        for number, prompt in enumerate(prompts)
    ]
