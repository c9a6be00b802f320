"""Figures against records made by hand."""

import pytest

from specdec.lab.metrics import Side, acceptance_by_depth, speedup_interval, summarise
from specdec.lab.statistics import product
from tests.lab.made import generation, step


def test_pooled_and_per_request_lengths_differ_as_defined():
    generations = [generation(0, [5] * 8, 2), generation(1, [5] * 2, 2)]
    steps = [step([0, 1], [3, 3], [3, 0], [4, 1]), step([0, 1], [3, 1], [3, 0], [4, 1])]
    summary = summarise(generations, steps)
    assert summary["mean_accepted_length"] == {"pooled": 10 / 4, "per_request": (4 + 1) / 2}
    assert summary["tokens_per_target_pass"] == 5
    assert summary["seconds"] == 2
    assert summary["tokens_per_second"] == 5
    assert summary["decode_tokens_per_second"] == 10 / 1.5
    assert summary["drafted_per_step"] == 3
    assert summary["finish_reasons"] == {"length": 2}


def test_a_text_of_one_step_counts_and_one_of_none_does_not():
    generations = [generation(0, [5] * 4, 1), generation(1, [5] * 2, 2), generation(2, [], 0)]
    summary = summarise(generations, [step([0, 1], [3, 3], [3, 0], [4, 1])])
    assert summary["mean_accepted_length"] == {"pooled": 6 / 3, "per_request": (4 + 1) / 2}


def test_acceptance_by_depth_counts_trees_that_reached_it():
    steps = [
        step([0, 1], [3, 1], [2, 1], [3, 2]),
        step([0], [2], [0], [1]),
        step([0], [0], [0], [1]),
    ]
    assert acceptance_by_depth(steps) == [2 / 3, 1 / 2, 0.0]


def test_an_empty_run_has_figures_too():
    summary = summarise([], [])
    assert summary["tokens_per_second"] == 0
    assert summary["mean_accepted_length"] == {"pooled": 0, "per_request": 0}


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
