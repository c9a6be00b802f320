"""From records of generations and steps to the figures of a run. Pure functions of what the files
hold.

Token counts end with the first stop token. Accepted lengths include the target's own token, so 1.0
is plain decoding. "Pooled" divides all tokens by all steps of all sequences; "per request"
averages each request's own mean, so that a long answer counts no more than a short one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
VERBS = ("prefill", "draft", "verify", "accept", "commit", "other")


def accepted_length(generations: Sequence[Record]) -> dict[str, float]:
    """Mean accepted length, pooled over steps and averaged over requests; 0 if there was no
    step."""
    decoded = [g for g in generations if g["steps"]]
    tokens, steps = _total(decoded, "tokens"), _total(decoded, "steps")
    return {
        "pooled": tokens / steps if steps else 0.0,
        "per_request": _mean([g["tokens"] / g["steps"] for g in decoded]),
    }


def acceptance_by_depth(steps: Iterable[Record]) -> list[float]:
    """Of the trees that reached depth d + 1, the share whose accepted path did too."""
    reached: list[int] = []
    accepted: list[int] = []
    for step in steps:
        for depth, length in zip(step["depths"], step["accepted"], strict=True):
            missing = max(depth, length) - len(reached)
            reached += [0] * missing
            accepted += [0] * missing
            for d in range(depth):
                reached[d] += 1
                accepted[d] += d < length
    return [a / r for a, r in zip(accepted, reached, strict=True)]


def by_source(steps: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Nodes drafted and accepted of each source of trees that have several; {} of others."""
    totals: dict[str, dict[str, int]] = {}
    for step in steps:
        for row in step.get("sources", ()):
            for name, (drafted, accepted) in row.items():
                total = totals.setdefault(name, {"drafted": 0, "accepted": 0})
                total["drafted"] += drafted
                total["accepted"] += accepted
    return totals


def summarise(generations: Sequence[Record], steps: Sequence[Record]) -> dict[str, Any]:
    """The figures of one side of a run.

    Returns:
        prompts, tokens, steps (of the target: one pass over the batch), seconds (all of `time`),
        tokens_per_second, decode_tokens_per_second (prefill left out), mean_accepted_length,
        acceptance_by_depth, drafted_per_step (nodes for each sequence and step),
        tokens_per_target_pass, time (seconds by verb), finish_reasons; sources, if trees have
        several.
    """
    time = {verb: sum(step["seconds"].get(verb, 0.0) for step in steps) for verb in VERBS}
    seconds = sum(time.values())
    tokens = _total(generations, "tokens")
    reasons = [g["finish_reason"] for g in generations]
    sources = by_source(steps)
    return {
        "prompts": len({g["prompt"] for g in generations}),
        "tokens": tokens,
        "steps": len(steps),
        "seconds": seconds,
        "tokens_per_second": _rate(tokens, seconds),
        "decode_tokens_per_second": _rate(tokens, seconds - time["prefill"]),
        "mean_accepted_length": accepted_length(generations),
        "acceptance_by_depth": acceptance_by_depth(steps),
        "drafted_per_step": _rate(_total(generations, "drafted"), _total(generations, "steps")),
        "tokens_per_target_pass": _rate(tokens, len(steps)),
        "time": time,
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **({"sources": sources} if sources else {}),
    }


def _total(records: Iterable[Record], key: str) -> int:
    return sum(record[key] for record in records)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
