"""From records of generations and steps to the figures of a run, and from entries of methods to
those of a study. Pure functions of what the files hold.

Token counts end with the first stop token. Accepted lengths include the target's own token, so 1.0
is plain decoding. "Pooled" divides all tokens by all steps of all sequences; "per request"
averages each request's own mean, so that a long answer counts no more than a short one.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from specdec.lab.repetition import degenerate
from specdec.lab.statistics import product, ratio

Record = Mapping[str, Any]
Side = tuple[Sequence[Record], Sequence[Record]]  # generations and steps
Runs = Mapping[str, Mapping[str, list[float]]]  # by job: seconds of short and long runs
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


def repetitive(generations: Sequence[Record]) -> dict[str, Any]:
    """How many texts are degenerate (`specdec.lab.repetition`), and the mean accepted length
    without them; None if none are left."""
    bad = [degenerate(g) for g in generations]
    others = [
        g for g, left_out in zip(generations, bad, strict=True) if g["steps"] and not left_out
    ]
    return {
        "texts": sum(bad),
        "accepted_length_without": accepted_length(others) if others else None,
    }


def acceptance_by_depth(steps: Iterable[Record]) -> list[float]:
    """Of the trees that reached depth d + 1, the share whose accepted path did too."""
    pairs = (zip(step["depths"], step["accepted"], strict=True) for step in steps)
    return by_depth(Counter(pair for row in pairs for pair in row))


def by_depth(counts: Mapping[tuple[int, int], int]) -> list[float]:
    """As `acceptance_by_depth`, of how often a tree of that depth had a path of that length
    accepted."""
    deepest = max((depth for depth, _ in counts), default=0)
    reached, accepted = [0] * deepest, [0] * deepest
    for (depth, length), count in counts.items():
        for d in range(depth):
            reached[d] += count
            accepted[d] += count * (d < length)
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
        repetitive (texts, and the accepted length without them), acceptance_by_depth,
        drafted_per_step (nodes for each sequence and step), tokens_per_target_pass, time (seconds
        by verb), finish_reasons; sources, if trees have several.
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
        "repetitive": repetitive(generations),
        "acceptance_by_depth": acceptance_by_depth(steps),
        "drafted_per_step": _rate(_total(generations, "drafted"), _total(generations, "steps")),
        "tokens_per_target_pass": _rate(tokens, len(steps)),
        "time": time,
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **({"sources": sources} if sources else {}),
    }


def speedup_interval(mine: Side, theirs: Side) -> list[float] | None:
    """95 % interval of tokens per second of one side of a run over those of another.

    By the jackknife over the prompts that both have finished, all samples and turns of one
    together. A step's time belongs in equal parts to the sequences it ran.

    Args:
        mine, theirs: generations and steps of each.

    Returns:
        [low, high]; None of fewer than six prompts.
    """
    tokens, seconds = zip(*(_by_prompt(*side) for side in (mine, theirs)), strict=True)
    both = sorted(tokens[0].keys() & tokens[1].keys())
    columns = [[of[name] for name in both] for of in (*tokens, *seconds)]
    if not both or not all(min(column) > 0 for column in columns):
        return None
    ends = product(columns[::3], columns[1:3]).ends
    return None if ends is None else list(ends)


def _by_prompt(
    generations: Iterable[Record], steps: Iterable[Record]
) -> tuple[Counter[int], dict[int, float]]:
    """Tokens and seconds of each prompt."""
    tokens: Counter[int] = Counter()
    seconds: defaultdict[int, float] = defaultdict(float)
    prompts = {}
    for generation in generations:
        prompts[generation["request"]] = generation["prompt"]
        tokens[generation["prompt"]] += generation["tokens"]
    for step in steps:
        total, requests = sum(step["seconds"].values()), step["requests"]
        for request in requests:
            if request in prompts:
                seconds[prompts[request]] += total / len(requests)
    return tokens, seconds


def pooled(entry: Record, names: Iterable[str] | None = None) -> dict[str, float]:
    """Tokens per step and per second of a method, over some prompts or all."""
    prompts = entry["prompts"]
    own = [prompts[name] for name in (prompts if names is None else names)]
    tokens, steps, seconds = (_total(own, key) for key in ("tokens", "steps", "seconds"))
    return {"accepted_length": tokens / steps, "tokens_per_second": tokens / seconds}


def summary(entry: Record, plain: Record, names: Sequence[str]) -> dict[str, float]:
    """Accepted length, tokens per second and speedup of a method over some prompts."""
    mine, theirs = (
        sum(one["prompts"][name]["seconds"] for name in names) for one in (entry, plain)
    )
    return {**pooled(entry, names), "speedup": theirs / mine}


def groups_of(result: Record) -> dict[str, list[str]]:
    """Prompts of a study by set, Spec-Bench's by category."""
    groups: dict[str, list[str]] = {}
    for name, prompts in result["sets"].items():
        for prompt in prompts:
            group = prompt.partition("/")[0] if name == "spec_bench" else name
            groups.setdefault(group, []).append(prompt)
    return groups


def decode_seconds(times: Mapping[str, list[float]]) -> float:
    """Of all tokens but the first: median long run minus median short run of a job."""
    return statistics.median(times["long"]) - statistics.median(times["short"])


def figures(method: Mapping[str, Any], plain: Mapping[str, Any], part: Mapping[str, Any]) -> Any:
    """What the runs of a method amount to, for each prompt set and for all.

    Args:
        plain: `none` of the same part.
        part: its batch and new tokens of each prompt.

    Returns:
        By set: ms_per_token (of one sequence, by job), tokens_per_second (all jobs),
        accepted_length (pooled), step_tokens_per_second (of ours: all tokens over the device time
        of all steps, prompts left out), speedup over `none` (all jobs) and its interval: by the
        jackknife over prompts at batch 1 (of fewer than six the least and largest of single
        ones), else the least and largest of the repeats.
    """
    tokens = (part["new_tokens"] - 1) * part["batch"]
    found = {}
    jobs = [job for job in method["runs"] if job in plain["runs"]]
    for name in ["all", *dict.fromkeys(job.partition("/")[0] for job in jobs)]:
        own = [job for job in jobs if name in ("all", job.partition("/")[0])]
        mine, theirs = (
            [decode_seconds(one["runs"][job]) for job in own] for one in (method, plain)
        )
        passes = sum(sum(method["runs"][job]["passes"]) for job in own)
        yielded = sum(
            len(method["runs"][job]["passes"]) * part["new_tokens"] * part["batch"] for job in own
        )
        found[name] = {
            "ms_per_token": {
                job: seconds / (part["new_tokens"] - 1) * 1e3
                for job, seconds in zip(own, mine, strict=True)
            },
            "tokens_per_second": tokens * len(own) / sum(mine),
            "accepted_length": yielded / passes if passes else None,
            "speedup": sum(theirs) / sum(mine),
        }
        steps = sum(s for verb, s in method.get("verbs", {}).items() if verb != "prefill")
        if name == "all" and steps:
            found[name]["step_tokens_per_second"] = yielded / steps
        if part["batch"] == 1:
            found[name]["interval"] = list(ratio(theirs, mine).around[1:])
        else:
            repeats = by_repeat(method["runs"], plain["runs"], own)
            found[name]["interval"] = [min(repeats), max(repeats)]
            found[name]["repeats"] = repeats
    return found


def by_repeat(runs: Runs, plain: Runs, jobs: Iterable[str]) -> list[float]:
    """The speedup of each repeat."""
    totals = []
    for one in (plain, runs):
        by_job = [np.array(one[job]["long"]) - np.array(one[job]["short"]) for job in jobs]
        least = min(map(len, by_job))
        totals.append(np.sum([times[:least] for times in by_job], axis=0))
    return [float(speedup) for speedup in totals[0] / totals[1]]


def _total(records: Iterable[Record], key: str) -> Any:
    return sum(record[key] for record in records)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
