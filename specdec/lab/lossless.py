"""Losslessness of outputs: at temperature 0 against the baseline's, token for token, each
divergence explained; above it against the target's distributions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdec.models.paged import PagedLM
from specdec.processors import NO_PROCESSORS, Processors
from specdec.sampling import SEEDS, SamplingParams, probabilities

Record = Mapping[str, Any]
BOUND = 4.0  # units in the last place of the larger logit
CHUNK = 64  # tokens whose logits are looked at together


def compare(
    generations: Sequence[Record],
    baseline: Sequence[Record],
    target: PagedLM,
    *,
    kv_dtype: torch.dtype | None = None,
    processors: Processors = NO_PROCESSORS,
) -> dict[str, Any]:
    """Compare outputs of the same prompts, and see whether rounding explains where they part.

    The bound: u is a unit in the last place of the larger of two logits. A pass rounds a logit by
    at most u / 2; let rounding in the layers before move it by no more than that again, so that it
    is within u of what exact arithmetic gives, and two passes are within 2 u of each other. Say
    one pass puts token a first and another b. In a third, the one made here, logits are within 2 u
    of those of either, and the gap between a and b within 4 u: so it exceeds 4 u in neither
    direction. `BOUND` is this 4.

    What is assumed about the layers is not certain, but can be measured: where `noise` exceeds 2
    the bound is no proof, and the gaps themselves have to be looked at. In float32 a logit is the
    sum of thousands of terms whose errors are as large as its own; there nothing should diverge
    at all.

    Args:
        kv_dtype: of the cache both were decoded over, as in `PagedKVCache`.
        processors: of the target's logits, of which all that is said here holds once processed.

    Returns:
        checked, how many outputs were compared. A turn whose conversation has diverged before it
        is left out: the two sides were asked different things. identical, how many of them are
        the same, token for token. divergences, one for each of the others: prompt, sample, turn,
        position of the first token that differs, token and baseline_token there, logit_gap
        (baseline_token less token), top2_gap (the most probable token less the next), bound, and
        whether the gap is explained by it. Where an output has ended its token is None, and so
        are gaps and bound.
    """
    reference = {_turn(record): record for record in baseline}
    checked = identical = 0
    divergences = []
    for generation in generations:
        other = reference.get(_turn(generation))
        if other is None or other["prompt_ids"] != generation["prompt_ids"]:
            continue
        checked += 1
        if generation["output_ids"] == other["output_ids"]:
            identical += 1
        else:
            see = partial(next_logits, target, kv_dtype=kv_dtype, processors=processors)
            divergences.append(_divergence(generation, other["output_ids"], target, see))
    return {"checked": checked, "identical": identical, "divergences": divergences}


def _turn(generation: Record) -> tuple[str, int, int]:
    return generation["prompt"], generation["sample"], generation["turn"]


def _divergence(
    generation: Record, theirs: Sequence[int], target: PagedLM, see: Callable[..., Tensor]
) -> dict[str, Any]:
    """Where an output parts from another, and why, by the logits that `see` finds."""
    mine = generation["output_ids"]
    position = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    token, other = (ids[position] if position < len(ids) else None for ids in (mine, theirs))
    gap = top2_gap = bound = None
    if token is not None and other is not None:
        logits = see(generation["prompt_ids"], mine[:position])
        gap = float(logits[other] - logits[token])
        first, second = logits.topk(2).values.tolist()
        top2_gap = first - second
        bound = BOUND * unit(float(logits[[token, other]].abs().max()), target.dtype)
    return {
        **{name: generation[name] for name in ("prompt", "sample", "turn")},
        "position": position,
        "token": token,
        "baseline_token": other,
        "logit_gap": gap,
        "top2_gap": top2_gap,
        "bound": bound,
        "explained": gap is not None and bound is not None and abs(gap) <= bound,
    }


def unit(logit: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of a type at this size."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(abs(logit), 1e-9))))


@torch.inference_mode()
def noise(target: PagedLM, tokens: Sequence[int], count: int = 32) -> float:
    """How far passes of different shapes lie apart: the largest difference of a logit among the
    two most probable tokens after each of the last `count`, in units in the last place of the
    larger; once all in one pass, once each in its own."""
    count = min(count, len(tokens) - 1)
    cache = target.new_cache(
        rows=2, pages=2 * -(-len(tokens) // 16), page_size=16, max_tokens=len(tokens)
    )
    for row in (0, 1):
        cache.open(row, tokens=len(tokens))
    head, tail = list(tokens[:-count]), list(tokens[-count:])
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


def follow(
    generations: Sequence[Record],
    target: PagedLM,
    sampling: SamplingParams,
    *,
    kv_dtype: torch.dtype | None = None,
    processors: Processors = NO_PROCESSORS,
) -> dict[str, Any]:
    """Test whether the outputs are draws from the target's distributions, temperature above 0.

    With the tokens of a vocabulary in the order of their probability, the mass before a drawn
    token plus a uniform share of its own is uniform in [0, 1], and independent of all that came
    before (Rosenblatt 1952; the share makes up for the jumps of a discrete law). So those numbers,
    of all tokens of all outputs, are tested for uniformity (Kolmogorov-Smirnov). A rule that
    prefers likely tokens, or unlikely ones, makes them pile up.

    Returns:
        tokens: how many were looked at.
        impossible: tokens of probability 0, which a filter forbids; rounding at the edge of
            `top_p` may cause some.
        p_value: how often as uneven numbers would come up by chance, if all is well; None without
            tokens.
    """
    places, impossible = [], 0
    for generation in generations:
        output = generation["output_ids"]
        if not output:
            continue
        generator = np.random.default_rng([sampling.seed % SEEDS, generation["request"]])
        start = 0
        for logits in _logits_of(target, generation["prompt_ids"], output, kv_dtype, processors):
            drawn = torch.tensor(output[start : start + len(logits)], device=logits.device)[
                :, None
            ]
            start += len(drawn)
            law = probabilities(logits.double(), sampling)  # [n, V]
            own = law.gather(1, drawn)
            first = law > own
            first |= (law == own) & (torch.arange(law.shape[1], device=law.device) < drawn)
            before, share = (law * first).sum(1).cpu().numpy(), own[:, 0].cpu().numpy()
            places.append(before + generator.random(len(drawn)) * share)
            impossible += int((own == 0).sum())
    found = np.concatenate(places) if places else np.empty(0)
    p_value = float(stats.kstest(found, "uniform").pvalue) if len(found) else None
    return {"tokens": len(found), "impossible": impossible, "p_value": p_value}


def next_logits(
    target: PagedLM,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    kv_dtype: torch.dtype | None = None,
    processors: Processors = NO_PROCESSORS,
) -> Tensor:
    """[V] logits after prompt and output, computed in one go over a fresh cache, and processed."""
    (logits,) = next(_logits_of(target, [*prompt, *output], [0], kv_dtype, NO_PROCESSORS))
    return processors.of_text(logits[None], prompt, output, len(output))[0].float()


@torch.inference_mode()
def _logits_of(
    target: PagedLM,
    prompt: Sequence[int],
    output: Sequence[int],
    kv_dtype: torch.dtype | None,
    processors: Processors,
) -> Iterator[Tensor]:
    """[n, V] processed logits that the output tokens were chosen by, `CHUNK` at a time."""
    before = [*prompt, *output[:-1]]
    cache = target.new_cache(
        rows=1,
        pages=-(-len(before) // 16),
        page_size=16,
        max_tokens=len(before),
        kv_dtype=kv_dtype,
    )
    cache.open(0, tokens=len(before))
    committed = 0
    for first in range(len(prompt) - 1, len(before), CHUNK):
        target.prefill(cache, [0], [before[committed:first]])
        committed = first
        part = torch.tensor([before[first : first + CHUNK]], device=target.device)
        offsets = torch.arange(part.shape[1], device=target.device)[None]
        logits = target.forward(cache, [0], part, offsets)
        assert logits is not None
        yield processors.of_text(logits[0], prompt, output, first - len(prompt) + 1)
