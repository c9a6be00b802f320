"""Losslessness at temperature 0: outputs against the baseline's, token for token, each divergence
explained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specdec.model import PagedLM

Record = Mapping[str, Any]


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


@torch.inference_mode()
def next_logits(
    target: PagedLM, tokens: Sequence[int], *, kv_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[V] logits after the tokens, computed in one go over a fresh cache."""
    cache = target.new_cache(
        rows=1,
        pages=-(-len(tokens) // 16),
        page_size=16,
        max_tokens=len(tokens),
        kv_dtype=kv_dtype,
    )
    cache.open(0, tokens=len(tokens))
    target.prefill(cache, [0], [tokens[:-1]])
    return target.extend(cache, [0], [tokens[-1:]])[0].float()
