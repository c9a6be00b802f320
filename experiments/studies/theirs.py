"""transformers' own generation, as a session beside ours."""

import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from specdec.lab.prompts import Asked
from specdec.lab.session import WARM_UP_TOKENS, Decoded, wait
from specdec.lab.workshop import Way
from specdec.models.load import zoo_path
from specdec.models.placement import Placement
from specdec.models.standin import named_shape, standin

PROMPT_LOOKUP_TOKENS = 10


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
        return Decoded(seconds=seconds, outputs=[output], passes=[self._passes])

    def notes(self) -> dict[str, Any]:
        return {}

    def _count(self, *_: Any) -> None:
        self._passes += 1


def load_plain(path: str, placement: Placement) -> Any:
    """The transformers model of a zoo or stand-in name, with its own attention (SDPA)."""
    dtype, device = placement.dtype, placement.device
    if path.startswith("standin:"):
        shape, zoo = named_shape(path.removeprefix("standin:"))
        model = standin(zoo_path(zoo), shape, device=device, dtype=dtype)
    else:
        where = zoo_path(path.removeprefix("zoo:")) if path.startswith("zoo:") else Path(path)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype).to(device).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def theirs(
    target: str, drafts: Mapping[str, str], temperature: float, placement: Placement
) -> dict[str, Way]:
    """What transformers offers, by name: plain generation, with each draft (paths by name) and
    with prompt lookup. Models are loaded once, when the first of it is measured."""
    load = cache(partial(load_plain, placement=placement))

    def make(assistant: str | None = None, **extra: Any) -> Theirs:
        if assistant is not None:
            extra["assistant_model"] = load(assistant)
        return Theirs(load(target), temperature=temperature, **extra)

    extras: dict[str, dict[str, Any]] = {"generate": {}}
    extras |= {f"assisted, {name}": {"assistant": path} for name, path in drafts.items()}
    extras["prompt lookup"] = {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
    settings = [target, placement.dtype, temperature]
    return {
        name: Way(settings=[*settings, extra], make=partial(make, **extra))
        for name, extra in extras.items()
    }
