"""What trackers show, against the figures of the summary and sums written out."""

import random

import pytest

from specdec.flight import Step
from specdec.lab.curves import Curves, flat
from specdec.lab.metrics import summarise
from specdec.lab.records import step_record


def steps(count: int, seed: int = 0) -> list[Step]:
    """Of two sequences, as plain as steps come; the rule kept at most what was drafted."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        nodes = [draw.randint(1, 5) for _ in range(2)]
        accepted = [draw.randint(0, n) for n in nodes]
        found.append(
            Step(
                requests=[0, 1000],
                nodes=nodes,
                depths=nodes,
                accepted=accepted,
                tokens=[one + 1 for one in accepted],
                seconds={"draft": draw.random(), "verify": draw.random()},
            )
        )
    return found


def generations(run: list[Step]) -> list[dict]:
    return [
        {
            "prompt": prompt,
            "tokens": sum(step.tokens[prompt] for step in run),
            "steps": len(run),
            "drafted": sum(step.nodes[prompt] for step in run),
            "finish_reason": "length",
            "output_ids": list(range(sum(step.tokens[prompt] for step in run))),
        }
        for prompt in range(2)
    ]


def points_of(run: list[Step], every: int, known: int = 0) -> list[dict[str, float]]:
    curves = Curves(every)
    curves.known = known
    found = [curves.add(step) for step in run] + [curves.rest()]
    return [point for point in found if point is not None]


def test_the_last_point_is_the_summary():
    run = steps(23)
    last = points_of(run, every=10)[-1]
    summary = summarise(generations(run), [step_record(step) for step in run])
    assert last["steps"] == summary["steps"] == 23
    assert last["tokens"] == summary["tokens"]
    assert last["so_far/accepted_length"] == summary["mean_accepted_length"]["pooled"]
    assert last["so_far/tokens_per_second"] == pytest.approx(summary["tokens_per_second"])


def test_points_are_means_of_their_steps_and_rates_of_all_so_far():
    run = steps(23)
    points = points_of(run, every=10)
    assert [point["steps"] for point in points] == [10, 20, 23]
    second = run[10:20]
    assert points[1]["step/batch"] == 2
    assert points[1]["step/nodes"] == sum(sum(step.nodes) for step in second) / 20
    milliseconds = 1e3 * sum(step.seconds["draft"] for step in second) / 10
    assert points[1]["time/draft_ms"] == pytest.approx(milliseconds)
    drafted, accepted = (
        sum(sum(getattr(step, name)) for step in run[:20]) for name in ("nodes", "accepted")
    )
    assert points[1]["so_far/acceptance_rate"] == accepted / drafted


def test_what_is_known_is_not_told_again_but_counted():
    run = steps(23)
    assert points_of(run, every=10, known=10) == points_of(run, every=10)[1:]
    assert not points_of(run, every=10, known=23)


def test_a_step_that_ran_for_nobody_has_no_length():
    nobody = Step(
        requests=[], nodes=[], depths=[], accepted=[], tokens=[], seconds={"verify": 0.5}
    )
    (point,) = points_of([nobody], every=1)
    assert point == {
        "steps": 1,
        "tokens": 0,
        "step/batch": 0.0,
        "time/verify_ms": 500.0,
        "so_far/tokens_per_second": 0.0,
    }


def test_rates_are_numbers_of_their_own():
    run = steps(5)
    curves = Curves(10)
    for step in run:
        curves.add(step)
    summary = summarise(generations(run), [step_record(step) for step in run])
    figures = curves.figures(summary)
    by_depth = summary["acceptance_by_depth"]
    assert [figures[f"acceptance/depth_{d + 1}"] for d in range(len(by_depth))] == by_depth
    assert figures["acceptance/length"] == summary["mean_accepted_length"]["pooled"]
    nodes = sum(sum(step.nodes) for step in run)
    assert figures["acceptance/rate"] == sum(sum(step.accepted) for step in run) / nodes
    assert figures["time/verify"] == summary["time"]["verify"]
    assert "acceptance_by_depth" not in figures


def test_plain_decoding_has_no_rate():
    plain = Step(requests=[0], nodes=[0], depths=[0], accepted=[0], tokens=[1], seconds={})
    curves = Curves(1)
    assert "so_far/acceptance_rate" not in (curves.add(plain) or {})
    summary = {"mean_accepted_length": {"pooled": 1.0}, "acceptance_by_depth": []}
    assert "acceptance/rate" not in curves.figures(summary)


def test_names_are_joined_by_slashes():
    nested = {"a": {"b": {"c": 1}, "d": [2]}, "e": None}
    assert flat(nested, joint="/") == {"a/b/c": 1, "a/d": [2], "e": None}
