"""Losslessness of outputs: at temperature 0 against the baseline's, token for token, each
divergence explained; above it against the target's distributions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdec.models.paged import PagedLM
from specdec.sampling import SamplingParams, probabilities

Record = Mapping[str, Any]
CHUNK = 64  # tokens whose logits are looked at together


def compare(
    generations: Sequence[Record],
    baseline: Sequence[Record],
    target: PagedLM,
    *,
    kv_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Compare outputs of the same prompts.

    Args:
        kv_dtype: of the cache both were decoded over, as in `PagedKVCache`.

    Returns:
        checked: outputs compared. A turn whose conversation has diverged before it is left out:
            the two
        sides were asked different things.
        identical: how many are the same, token for token.
        divergences: of the others, prompt, turn, position of the first differing token, the two
            tokens
        (None where an output ended), and the gap between the target's logits of them.
    """
    reference = {(g["prompt"], g["turn"]): g for g in baseline}
    checked = identical = 0
    divergences = []
    for generation in generations:
        other = reference.get((generation["prompt"], generation["turn"]))
        if other is None or other["prompt_ids"] != generation["prompt_ids"]:
            continue
        checked += 1
        mine, theirs = generation["output_ids"], other["output_ids"]
        if mine == theirs:
            identical += 1
            continue
        position = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
            min(len(mine), len(theirs)),
        )
        tokens = [ids[position] if position < len(ids) else None for ids in (mine, theirs)]
        gap = None
        if None not in tokens:
            tokens_before = [*generation["prompt_ids"], *mine[:position]]
            logits = next_logits(target, tokens_before, kv_dtype=kv_dtype)
            gap = float(logits[tokens[1]] - logits[tokens[0]])
        divergences.append(
            {
                "prompt": generation["prompt"],
                "turn": generation["turn"],
                "position": position,
                "token": tokens[0],
                "baseline_token": tokens[1],
                "logit_gap": gap,
            }
        )
    return {"checked": checked, "identical": identical, "divergences": divergences}


def follow(
    generations: Sequence[Record],
    target: PagedLM,
    sampling: SamplingParams,
    *,
    kv_dtype: torch.dtype | None = None,
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
        generator = np.random.default_rng([sampling.seed, generation["request"]])
        start = 0
        for logits in _logits_of(target, generation["prompt_ids"], output, kv_dtype):
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
    target: PagedLM, tokens: Sequence[int], *, kv_dtype: torch.dtype | None = None
) -> Tensor:
    """[V] logits after the tokens, computed in one go over a fresh cache."""
    return next(_logits_of(target, tokens, [0], kv_dtype))[0].float()


@torch.inference_mode()
def _logits_of(
    target: PagedLM, prompt: Sequence[int], output: Sequence[int], kv_dtype: torch.dtype | None
) -> Iterator[Tensor]:
    """[n, V] logits that the output tokens were chosen by, `CHUNK` at a time."""
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
        yield logits[0]
