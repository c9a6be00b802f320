"""What a comparison of runs amounts to, as the table, CSV, JSON and the report show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A ratio of sums over conversations, with the ends of its 95 % interval; those are None of
    fewer than six conversations, whose range `least` and `most` tell instead."""

    value: float
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two methods on the conversations that both have: the ratio of the first to the second.

    Args:
        quantity: accepted_length or tokens_per_second.
        p: two-sided, of the log ratio being 0; None without an interval.
        p_holm: the same, corrected for all differences of that quantity in its group (Holm 1979).
        equivalent: whether both are within 2 % of each other (two one-sided tests at 5 %).
        by_conversation: the ratio of each, by name.
    """

    first: str
    second: str
    quantity: str
    ratio: Estimate
    p: float | None = None
    p_holm: float | None = None
    equivalent: bool = False
    by_conversation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A method on the conversations of one category."""

    conversations: int
    accepted_length: Estimate
    speedup: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method of a group.

    Args:
        name: what distinguishes it in its group.
        mark: REPLAYED, of what was not decoded; LOSSY, SYNTHETIC or FAILED (its check), of what is
            no lossless method.
        labels: drafter, tree, children, acceptance, and words that differ.
        folders: its runs, one for each seed.
        accepted_length: pooled; `per_request` averages requests, None of replayed methods.
        unrepetitive: accepted length without texts that repeat themselves; `repetitive` is the
            share of texts that do.
        tokens_per_second, speedup, anatomy (ms of a step by verb), energy (joules for a token),
            idle_watts: None where times cannot be used, or were not measured.
        repeats: largest relative difference of tokens per second between runs of equal seed; None
            if each is there once.
        tokens_per_pass: of the target over the whole batch.
        nodes_per_step: drafted nodes verified, for each sequence.
        predicted_speedup: what `cost_aware` promised, if it chose the tree.
        by_category: in the order of the categories.
        lossless: verdict and reason of each run.
        expected_speed: tokens per second of a replayed method by a cost table; None without.
    """

    name: str
    mark: str
    labels: Mapping[str, str]
    folders: list[str]
    seeds: list[int]
    conversations: int
    tokens: int
    batch_size: int
    accepted_length: Estimate
    per_request: Estimate | None
    unrepetitive: Estimate | None
    repetitive: float
    tokens_per_second: float | None
    speedup: Estimate | None
    tokens_per_pass: float
    nodes_per_step: float
    acceptance_by_depth: list[float]
    anatomy: Mapping[str, float] | None
    energy: float | None
    idle_watts: float | None
    predicted_speedup: float | None
    by_category: Mapping[str, Share]
    lossless: list[Mapping[str, Any]]
    repeats: float | None = None
    expected_speed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A tree of one step, from trees.jsonl (`record.trees`).

    Args:
        method: the entry it belongs to.
        prompt, step: whose, and which.
        tokens: texts of the nodes, root first.
        parents: -1 of the root.
        draft, target: probabilities of each node's token after its parent; None where unknown.
        path: accepted nodes, root first.
        next_token: text of the target's own token after them.
    """

    method: str
    prompt: str
    step: int
    tokens: list[str]
    parents: list[int]
    draft: list[float | None]
    target: list[float | None]
    path: list[int]
    next_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Methods that did the same work: target, prompts, sampling, cache, kernels, batch, limits.

    Args:
        workload: what that is, by setting.
        times: how they were measured ("in turns", "one process each, anchor within 1.2 %"), or why
            they are not compared ("runs on different GPUs").
        entries: the best first; lossless ones before those that are not.
        differences: between the best and each other one of the same mark, of each quantity.
        chosen: by drafter, settings chosen on one half of the conversations and their figures on
            the other; empty if no drafter has several.
        verdict: three sentences.
        notes: what to know before one believes them.
    """

    name: str
    workload: Mapping[str, Any]
    times: str
    entries: list[Entry]
    differences: list[Difference]
    chosen: list[Entry]
    verdict: list[str]
    trees: list[Tree] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All of it.

    Args:
        differing: settings that differ between runs, by name, with the value of each folder.
        left_out: folders that could not be used, and jobs that were refused or failed; and why.
        environment: versions, hardware and git of the runs, by folder, equal ones once.
        commands: that reproduce the runs.
    """

    groups: list[Group]
    differing: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]
    environment: Mapping[str, Mapping[str, Any]]
    commands: list[str]
