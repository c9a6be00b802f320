"""Witness: the logits of a text by transformers' own pass. It shares no attention, mask, cache or
shortcut with what decoded the text, so that a fault of those cannot hide in both."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from specdec.kernels.reference.cache import as_stored
from specdec.models.hook import ATTENTION
from specdec.models.paged import PagedLM
from specdec.processors import NO_PROCESSORS, Processors

Record = Mapping[str, Any]
Drafts = Callable[[Record], Iterator[Tensor]]
"""What a draft says of the tokens of an output, [n, V] logits, `CHUNK` tokens at a time; nothing
if it is not known of this text."""
CHUNK = 64  # tokens whose logits are looked at together
PROMPT_CHUNK = 512  # tokens of a prompt that are read together
BOUND = 4.0  # units in the last place of the larger of two logits
NUDGE = 2.0**-14  # relative; a few in a thousand numbers of a quantised cache become the next one


class Seen(NamedTuple):
    """Tokens of an output in a row, and what each was chosen by.

    Attributes:
        drawn: [n] int64.
        scores: [n, V] float64, processed logits, of which sampling parameters make the law.
        draft: [n, V] float64 logits of a draft model; None if there is none.
    """

    drawn: Tensor
    scores: Tensor
    draft: Tensor | None = None


class Witness:
    """Reads texts that a target is said to have decoded.

    Args:
        target: the model.
        kv_dtype: of the cache it decoded over, as in `PagedKVCache`, whose rounding of keys and
            values is shared.
        processors: of its logits.
        drafts: what drafted, of the same vocabulary; only where bets are placed depends on it.
    """

    def __init__(
        self,
        target: PagedLM,
        kv_dtype: torch.dtype | None = None,
        processors: Processors = NO_PROCESSORS,
        drafts: Drafts | None = None,
    ) -> None:
        self.drafts = drafts
        self.target, self.kv_dtype, self.processors = target, kv_dtype, processors
        self._read: list[int] = []  # a text to measure rounding with

    def follow(self, text: Record) -> Iterator[Seen]:
        """The tokens of an output, in order, `CHUNK` at a time."""
        prompt, output = text["prompt_ids"], text["output_ids"]
        self._read = self._read or [*prompt, *output]
        start = 0
        drafts = iter(()) if self.drafts is None else self.drafts(text)
        for logits in own_logits(self.target, prompt, output, kv_dtype=self.kv_dtype):
            drawn = torch.tensor(output[start : start + len(logits)], device=logits.device)
            scores = self.processors.of_text(logits.double(), prompt, output, start)
            start += len(drawn)
            yield Seen(drawn, scores, next(drafts, None))

    @cached_property
    def units(self) -> float:
        """By how much rounding may part two logits at most that another pass has in the opposite
        order, in units in the last place.

        Let u be that unit of the larger of two logits. A pass rounds a logit by at most u / 2; let
        rounding in the layers before move it by no more than that again, so that it is within u of
        what exact arithmetic gives, and two passes are within 2 u of each other. Say one pass puts
        token a first and another b. In a third, logits are within 2 u of those of either, and the
        gap between a and b within 4 u: so it exceeds 4 u in neither direction. `BOUND` is this 4.

        What is assumed about the layers is measured: where `noise` of a text exceeds 1, the bound
        is 4 times that, twice what its own reasoning gives, for what is measured is the largest
        of few.
        """
        return max(BOUND, 4.0 * noise(self.target, self._read, kv_dtype=self.kv_dtype))

    def bound(self, scores: Tensor, drawn: Tensor) -> Tensor:
        """[n] the same in logits, for tokens [n] and what is the most probable in [n, V]."""
        own = scores.gather(1, drawn[:, None])[:, 0]
        top = scores.amax(-1)
        sizes = torch.maximum(top.abs(), own.where(own.isfinite(), top).abs())
        units = [unit(size, self.target.dtype) for size in sizes.tolist()]
        return self.units * torch.tensor(units, device=scores.device, dtype=scores.dtype)


def drafts_of(draft: PagedLM | None, target: PagedLM) -> Drafts | None:
    """By passes of a model that drafted, on texts that it can read; None if its vocabulary is not
    the target's."""
    if draft is None or draft.vocab_size != target.vocab_size:
        return None
    return partial(_read_by, draft, target.device)


def _read_by(draft: PagedLM, device: torch.device, text: Record) -> Iterator[Tensor]:
    prompt, output = text["prompt_ids"], text["output_ids"]
    if len(prompt) + len(output) <= draft.max_context:
        for logits in own_logits(draft, prompt, output):
            yield logits.to(device).double()


@torch.inference_mode()
def own_logits(
    target: PagedLM,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    kv_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    nudged: bool = False,
) -> Iterator[Tensor]:
    """[n, V] logits that the tokens of an output are chosen by, `chunk` at a time; `kv_dtype` and
    `nudged` as of `RoundedCache`."""
    if not output:
        return
    before, start = [*prompt, *output[:-1]], len(prompt) - 1
    known = inspect.signature(target.model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # as transformers called it before
    cache = RoundedCache(kv_dtype, nudged, config=target.model.config)
    places = [*range(0, start, PROMPT_CHUNK), *range(start, len(before), chunk), len(before)]
    for first, end in pairwise(places):
        inputs = {
            "input_ids": torch.tensor([before[first:end]], device=target.device),
            "position_ids": torch.arange(first, end, device=target.device)[None],
            name: cache,
            "use_cache": True,
        }
        target.model.set_attn_implementation("eager")
        try:
            if first < start:
                target.model.base_model(**inputs)
                continue
            logits = target.model(**inputs).logits[0]
        finally:
            target.model.set_attn_implementation(ATTENTION)
        yield logits


class RoundedCache(transformers.DynamicCache):
    """Transformers' own cache, of keys and values rounded as quantised pages round them.

    Args:
        kv_dtype: of such pages; None rounds nothing.
        nudged: numbers are a little larger and smaller in turns before they are rounded: by as
            little as their type knows, or `NUDGE` in a finer one.
    """

    def __init__(self, kv_dtype: torch.dtype | None, nudged: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._kv_dtype, self._nudged = kv_dtype, nudged

    def update(self, key: Tensor, value: Tensor, *where: Any, **options: Any) -> Any:
        if self._kv_dtype is not None:
            key, value = (as_stored(self._nudge(x), self._kv_dtype) for x in (key, value))
        return super().update(key, value, *where, **options)

    def _nudge(self, x: Tensor) -> Tensor:
        if not self._nudged:
            return x
        turns = 1 - 2 * (torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) % 2)
        return x + x * turns * max(NUDGE, torch.finfo(x.dtype).eps)


def noise(
    target: PagedLM,
    tokens: Sequence[int],
    count: int = 32,
    *,
    kv_dtype: torch.dtype | None = None,
) -> float:
    """How far passes of different shapes lie apart: the largest difference of a logit among the
    two most probable tokens after each of the last `count`, in units in the last place of the
    larger; once all in one pass, once each in its own.

    A quantised cache makes much of little: a number close to the middle between two that it can
    hold becomes either. In float32 few are so close that passes differ, and a text may have none
    while the next one has. So for such a cache a third pass has keys and values nudged.
    """
    count = min(count, len(tokens) - 1)
    head, tail = tokens[:-count], [*tokens[-count:], 0]
    ways = [(len(tail), False), (1, False)] + [(len(tail), True)] * (kv_dtype is not None)
    together, *others = (
        torch.cat([*own_logits(target, head, tail, kv_dtype=kv_dtype, chunk=n, nudged=by)]).float()
        for n, by in ways
    )
    best = together.topk(2)
    apart = torch.stack([other.gather(1, best.indices) for other in others])
    distance = (best.values - apart).abs().amax((0, 2))
    sizes = [unit(size, target.dtype) for size in best.values.abs().amax(1).tolist()]
    return float((distance / torch.tensor(sizes, device=distance.device)).max())


def precision(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number, of float32 at least: a model in float64 has its norms
    and softmaxes in that, and so is evidence recorded."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def unit(logit: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of a type at this size, as `precision` has it."""
    return float(precision(dtype) * 2.0 ** math.floor(math.log2(max(abs(logit), 1e-9))))
