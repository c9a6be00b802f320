"""Greedy outputs against those of plain decoding: which differ, and whether rounding explains it.

**The bound.** u is a unit in the last place of the larger of two logits. A pass rounds a logit by
at most u / 2; let rounding in the layers before move it by no more than that again, so that it
is within u of what exact arithmetic gives, and two passes are within 2 u of each other. Say one
pass puts token a first and another b. In a third, the one of `specdec.lab.lossless`, logits are within
2 u of those of either, and the gap between a and b within 4 u: so it exceeds 4 u in neither
direction. `BOUND` is this 4.

What is assumed about the layers is not certain, so it is measured: `noise` is how far passes of
different shapes over the same tokens lie apart, in u. Where it exceeds 2 the bound is no proof,
and the gaps themselves have to be looked at. In float32 a logit is the sum of thousands of terms
whose errors are as large as its own; there nothing should diverge at all.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from specdec.experiments.studies.sessions import Asked
from specdec.lab.lossless import compare, next_logits
from specdec.models.paged import PagedLM

BOUND = 4.0  # units in the last place of the larger logit


def unit(logit: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of a type at this size."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(abs(logit), 1e-9))))


def agreement(
    batch: Sequence[Asked],
    outputs: Sequence[list[int]],
    plain: Sequence[list[int]],
    target: PagedLM,
) -> dict[str, Any]:
    """checked, identical, and each divergence: as `compare` gives it, with the gap between the
    two most probable tokens, the bound, and whether the gap is within it."""

    def records(outputs: Sequence[list[int]]) -> list[dict[str, Any]]:
        return [
            {"prompt": asked.name, "turn": 0, "prompt_ids": asked.tokens, "output_ids": output}
            for asked, output in zip(batch, outputs, strict=True)
        ]

    found = compare(records(outputs), records(plain), target)
    prompts = {asked.name: asked.tokens for asked in batch}
    by_name = dict(zip(prompts, outputs, strict=True))
    for one in found["divergences"]:
        del one["turn"]
        if one["logit_gap"] is None:
            one["explained"] = False
            continue
        before = [*prompts[one["prompt"]], *by_name[one["prompt"]][: one["position"]]]
        logits = next_logits(target, before)
        larger = logits[[one["token"], one["baseline_token"]]].abs().max()
        first, second = logits.topk(2).values.tolist()
        one["top2_gap"] = first - second
        one["bound"] = BOUND * unit(float(larger), target.dtype)
        one["explained"] = abs(one["logit_gap"]) <= one["bound"]
    return found


@torch.inference_mode()
def noise(target: PagedLM, tokens: list[int], count: int = 32) -> float:
    """How far passes of different shapes lie apart: the largest difference of a logit among the
    two most probable tokens after each of the last `count`, in units in the last place of the
    larger; once all in one pass, once each in its own."""
    count = min(count, len(tokens) - 1)
    cache = target.new_cache(
        rows=2, pages=2 * -(-len(tokens) // 16), page_size=16, max_tokens=len(tokens)
    )
    for row in (0, 1):
        cache.open(row, tokens=len(tokens))
    head, tail = tokens[:-count], tokens[-count:]
    target.prefill(cache, [0, 1], [head, head])
    at_once = target.forward(
        cache,
        [0],
        torch.tensor([tail], device=target.device),
        torch.arange(count, device=target.device)[None],
    )
    assert at_once is not None
    largest = 0.0
    for token, logits in zip(tail, at_once[0].float(), strict=True):
        alone = target.extend(cache, [1], [[token]])[0].float()
        best = logits.topk(2)
        size = unit(float(best.values.abs().max()), target.dtype)
        distance = float((best.values - alone[best.indices]).abs().max())
        largest = max(largest, distance / size)
    return largest
