"""Figures against records made by hand."""

from dataclasses import replace

import pytest

from specdec.flight import Step
from specdec.lab.metrics import (
    Side,
    acceptance_by_depth,
    by_repeat,
    figures,
    groups_of,
    pooled,
    speedup_interval,
    summarise,
    summary,
)
from specdec.lab.records import step_record
from specdec.lab.statistics import product
from tests.lab.made import generation, step


def test_pooled_and_per_request_lengths_differ_as_defined():
    generations = [generation(0, [5] * 8, 2), generation(1, [5] * 2, 2)]
    steps = [step([0, 1], [3, 3], [3, 0], [4, 1]), step([0, 1], [3, 1], [3, 0], [4, 1])]
    found = summarise(generations, steps)
    assert found["mean_accepted_length"] == {"pooled": 10 / 4, "per_request": (4 + 1) / 2}
    assert found["tokens_per_target_pass"] == 5
    assert found["seconds"] == 2
    assert found["tokens_per_second"] == 5
    assert found["decode_tokens_per_second"] == 10 / 1.5
    assert found["drafted_per_step"] == 3
    assert found["finish_reasons"] == {"length": 2}


def test_a_text_of_one_step_counts_and_one_of_none_does_not():
    generations = [generation(0, [5] * 4, 1), generation(1, [5] * 2, 2), generation(2, [], 0)]
    found = summarise(generations, [step([0, 1], [3, 3], [3, 0], [4, 1])])
    assert found["mean_accepted_length"] == {"pooled": 6 / 3, "per_request": (4 + 1) / 2}


def test_acceptance_by_depth_counts_trees_that_reached_it():
    steps = [
        step([0, 1], [3, 1], [2, 1], [3, 2]),
        step([0], [2], [0], [1]),
        step([0], [0], [0], [1]),
    ]
    assert acceptance_by_depth(steps) == [2 / 3, 1 / 2, 0.0]


def test_an_empty_run_has_figures_too():
    found = summarise([], [])
    assert found["tokens_per_second"] == 0
    assert found["mean_accepted_length"] == {"pooled": 0, "per_request": 0}


def test_sources_are_summed_where_trees_have_several():
    steps = [
        {**step([0, 1], [2, 1], [1, 0], [2, 1]), "sources": [{"a": (2, 1), "b": (1, 0)}, {}]},
        {**step([0], [1], [1], [2]), "sources": [{"b": [3, 2]}]},  # as read from a file
        step([1], [0], [0], [1]),
    ]
    expected = {"a": {"drafted": 2, "accepted": 1}, "b": {"drafted": 4, "accepted": 2}}
    assert summarise([], steps)["sources"] == expected
    assert "sources" not in summarise([], steps[2:])
    assert "sources" not in summarise([], [{**steps[2], "sources": [{}]}])


def test_a_speedup_has_an_interval_over_prompts():
    """Steps of two prompts count half for each. Three pairs of prompts, 4 tokens in 2 s and 1
    token in 1 s here, 2 tokens in 2 s each there."""
    mine: Side = ([], [])
    theirs: Side = ([], [])
    for a in (0, 2, 4):
        for i, n in ((a, 4), (a + 1, 1)):
            mine[0].append({**generation(i, [5] * n, 1), "request": i})
            theirs[0].append({**generation(i, [5] * 2, 1), "request": i})
        mine[1].extend([step([a, a + 1], [0, 0], [0, 0], [1, 1])] * 2)
        mine[1].append(step([a], [0], [0], [3]))
        theirs[1].extend([step([a, a + 1], [0, 0], [0, 0], [1, 1])] * 4)
    found = product([[4, 1] * 3, [2, 2] * 3], [[2, 1] * 3, [2, 2] * 3])
    assert speedup_interval(mine, theirs) == pytest.approx(found.ends)
    assert speedup_interval(tuple(side[:5] for side in mine), theirs) is None  # five prompts
    assert speedup_interval(mine, ([], [])) is None
    idle = [mine[1], [one for one in theirs[1] if one["requests"] != [0, 1]]]
    assert speedup_interval((mine[0], idle[0]), (theirs[0], idle[1])) is None  # no time of two


def test_prompts_of_one_side_alone_count_for_no_interval():
    def side(prompts: list[int], seconds: int) -> Side:
        return (
            [{**generation(i, [5] * (i + 1), 1), "request": i} for i in prompts],
            [step([i], [0], [0], [i + 1]) for i in prompts for _ in range(seconds)],
        )

    both = list(range(6))
    expected = speedup_interval(side(both, 1), side(both, 2))
    assert expected is not None
    assert speedup_interval(side(both, 1), side([*both, 7], 2)) == expected
    assert speedup_interval(side([*both, 8], 1), side(both, 2)) == expected


# --- studies: a method and plain decoding over jobs, each timed with few and with all tokens


def runs_of(jobs: dict[str, float], passes: dict[str, list[int]]) -> dict:
    """Each job in so many seconds a token but the first; a run of one token takes 0.1 s, and of
    three times of a run the middle one is right."""
    return {
        "runs": {
            job: {
                "short": [0.1, 0.1, 9.0],
                "long": [0.1, 0.1 + 10 * seconds, 9.0],
                "passes": passes.get(job, []),
            }
            for job, seconds in jobs.items()
        }
    }


def test_figures_of_a_study_are_those_of_all_tokens_but_the_first():
    plain = runs_of({"a/1": 0.02, "a/2": 0.02, "b/1": 0.04, "b/2": 1.0}, {})
    mine = runs_of({"a/1": 0.01, "a/2": 0.02, "b/1": 0.01}, {"a/1": [5, 6], "b/1": [4]})
    mine["verbs"] = {"prefill": 7.0, "draft": 1.0, "verify": 2.0}
    found = figures(mine, plain, {"new_tokens": 11, "batch": 1})
    assert list(found) == ["all", "a", "b"]
    assert found["all"]["ms_per_token"] == pytest.approx({"a/1": 10, "a/2": 20, "b/1": 10})
    assert found["a"]["ms_per_token"] == pytest.approx({"a/1": 10, "a/2": 20})
    assert found["b"]["tokens_per_second"] == pytest.approx(100)
    assert found["all"]["tokens_per_second"] == pytest.approx(30 / 0.4)
    assert found["all"]["speedup"] == pytest.approx(0.8 / 0.4)
    assert found["a"]["accepted_length"] == pytest.approx(2 * 11 / 11)
    assert found["all"]["accepted_length"] == pytest.approx(3 * 11 / 15)
    assert found["all"]["step_tokens_per_second"] == pytest.approx(3 * 11 / 3.0)
    assert "step_tokens_per_second" not in found["a"]
    assert found["all"]["interval"] == pytest.approx([1.0, 4.0])  # too few for another
    assert figures(plain, plain, {"new_tokens": 11, "batch": 1})["b"]["accepted_length"] is None


def test_of_batches_the_repeats_are_the_interval():
    """Over all jobs of a set at a time, as often as all of them were repeated."""
    mine = {
        "runs": {
            "a/1": {"short": [1, 1, 1], "long": [2, 3, 9], "passes": [4]},
            "a/2": {"short": [1, 1], "long": [2, 4], "passes": [4]},
        }
    }
    plain = {
        "runs": {
            "a/1": {"short": [1, 1], "long": [5, 5]},
            "a/2": {"short": [2, 2, 2], "long": [4, 8, 8]},
        }
    }
    assert by_repeat(mine["runs"], plain["runs"], ["a/1", "a/2"]) == [6 / 2, 10 / 5]
    found = figures(mine, plain, {"new_tokens": 6, "batch": 4})["all"]
    assert found["repeats"] == [3.0, 2.0]
    assert found["interval"] == [2.0, 3.0]
    assert found["tokens_per_second"] == pytest.approx(2 * 5 * 4 / (2 + 2))
    assert found["accepted_length"] == 2 * 6 * 4 / 8


def test_prompts_are_grouped_by_set_and_those_of_spec_bench_by_category():
    sets = {"spec_bench": ["qa/1", "math/1", "qa/2"], "code": ["x/1", "y/1"]}
    expected = {"qa": ["qa/1", "qa/2"], "math": ["math/1"], "code": ["x/1", "y/1"]}
    assert groups_of({"sets": sets}) == expected


def test_a_method_over_some_prompts_is_weighed_against_plain_decoding_of_the_same():
    def entry(**seconds: float) -> dict:
        return {
            "prompts": {
                name: {"tokens": 12, "steps": 4, "seconds": s} for name, s in seconds.items()
            }
        }

    mine, plain = entry(a=1.0, b=3.0, c=8.0), entry(a=2.0, b=6.0, c=100.0)
    expected = {"accepted_length": 3.0, "tokens_per_second": 6.0, "speedup": 2.0}
    assert summary(mine, plain, ["a", "b"]) == pytest.approx(expected)
    assert pooled(mine) == {"accepted_length": 3.0, "tokens_per_second": 36 / 12}


def test_sources_are_recorded_if_any_sequence_has_them():
    taken = Step(
        requests=[1, 2], nodes=[1, 0], depths=[1, 0], accepted=[1, 0], tokens=[2, 1], seconds={}
    )
    apart = [{"a": (1, 1)}, {}]
    assert step_record(replace(taken, sources=apart))["sources"] == apart
    assert "sources" not in step_record(replace(taken, sources=[{}, {}]))
    assert "trees" not in step_record(taken)
