"""What a comparison says of runs whose figures are known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.compare.comparing import compare
from specdec.lab.metrics import acceptance_by_depth
from specdec.lab.statistics import holm, product, ratio
from tests.compare.folders import (
    LENGTHS,
    MACHINE,
    SLOWER,
    columns,
    entries,
    job,
    only,
    run,
    texts,
)


def sweep(folder: Path, **both: Any) -> Path:
    """Two drafters, the first the longer and the faster."""
    plain = texts([1.0] * 8, millis=9.0)
    run(folder / "a", texts(LENGTHS), plain=plain, **both)
    run(folder / "b", texts(SLOWER), plain=plain, drafter="pld", **both)
    return folder


def test_figures_are_ratios_over_conversations(tmp_path: Path) -> None:
    group = only(compare([sweep(tmp_path)]))
    mine, theirs = columns(texts(LENGTHS)), columns(texts([1.0] * 8, millis=9.0))
    found = entries(group)["ngram"]
    length = ratio(mine[0], mine[1])
    assert found.accepted_length.value == pytest.approx(length.value)
    assert (found.accepted_length.low, found.accepted_length.high) == pytest.approx(length.ends)
    faster = product([mine[0], theirs[2]], [mine[2], theirs[0]])
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(faster.value)
    assert (found.speedup.low, found.speedup.high) == pytest.approx(faster.ends)
    assert found.tokens_per_second == pytest.approx(sum(mine[0]) / sum(mine[2]))
    assert found.per_request.value == pytest.approx(
        np.mean([t / s for t, s in zip(*mine[:2], strict=True)])
    )
    assert found.anatomy is not None
    assert found.anatomy["verify"] == pytest.approx(8.0)
    assert found.nodes_per_step == 4.0
    assert group.times == "one process each, plain decoding within 0.0%"


def test_acceptance_by_depth_is_that_of_the_steps(tmp_path: Path) -> None:
    generations, steps = texts(LENGTHS)
    for place, one in enumerate(steps):
        one["depths"] = [max(one["accepted"][0], place % 5)]
    run(tmp_path / "a", (generations, steps))
    (found,) = only(compare([tmp_path / "a"])).entries
    assert found.acceptance_by_depth == pytest.approx(acceptance_by_depth(steps))
    assert len(found.acceptance_by_depth) == 4


def test_what_summaries_alone_know_is_told(tmp_path: Path) -> None:
    for seed, joules, shape in ((0, 10.0, "shape"), (1, 40.0, "tree.shape")):
        energy = {"joules": joules, "joules_per_token": joules / 100, "idle_watts": 60.0}
        promised = {shape: "5 nodes; 1.75 times plain decoding expected"}
        both = {"energy": energy, "chosen_by": promised}
        run(tmp_path / str(seed), texts(LENGTHS), seed=seed, **both)
    (found,) = only(compare([tmp_path])).entries
    assert (found.energy, found.idle_watts) == (50.0 / 200, 60.0)
    assert found.predicted_speedup == 1.75
    run(tmp_path / "1", texts(LENGTHS), seed=1, energy={"reason": "no GPU"})
    (found,) = only(compare([tmp_path])).entries
    assert (found.energy, found.predicted_speedup) == (None, 1.75)


def test_methods_are_compared_pair_by_pair(tmp_path: Path) -> None:
    third = [1.2, 1.5, 2.0, 1.5, 1.5, 2.0, 2.4, 1.5]
    folder = sweep(tmp_path)
    run(folder / "c", texts(third), plain=texts([1.0] * 8, millis=9.0), drafter="rest")
    found = [d for d in only(compare([folder])).differences if d.quantity == "accepted_length"]
    best, expected = columns(texts(LENGTHS)), []
    for other in (SLOWER, third):
        side = columns(texts(other))
        expected.append(product([best[0], side[1]], [best[1], side[0]]))
    assert [(d.first, d.second) for d in found] == [("ngram", "pld"), ("ngram", "rest")]
    assert [d.ratio.value for d in found] == pytest.approx([one.value for one in expected])
    assert [d.p for d in found] == pytest.approx([one.p for one in expected])
    assert [d.p_holm for d in found] == pytest.approx(holm([one.p for one in expected]))
    assert list(found[0].by_conversation.values()) == pytest.approx(list(expected[0].singles))


def test_few_conversations_have_a_range_and_no_chance(tmp_path: Path) -> None:
    run(tmp_path / "a", texts(LENGTHS[:5]))
    run(tmp_path / "b", texts(SLOWER[:5]), drafter="pld")
    group = only(compare([tmp_path]))
    found = entries(group)["ngram"].accepted_length
    assert found.low is None
    assert found.least is not None
    assert found.most is not None
    assert found.least < found.value < found.most
    assert all(d.p is None for d in group.differences)
    assert "5 conversations are too few for intervals" in group.verdict[2]


# What may be compared


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target.path", "zoo:draft"),
        ("sampling.temperature", 1.0),
        ("max_new_tokens", 24),
        ("batch_size", 4),
        ("prompts.samples", 2),
        ("stop_strings", ["x"]),
    ],
)
def test_other_work_is_another_group_or_refused(tmp_path: Path, setting: str, value: Any) -> None:
    run(tmp_path / "a", texts(LENGTHS))
    run(tmp_path / "b", texts(LENGTHS), drafter="pld", settings={setting: value})
    assert [len(group.entries) for group in compare([tmp_path]).groups] == [1, 1]
    with pytest.raises(ValueError, match=rf"differ in {setting} \("):
        compare([tmp_path / "a", tmp_path / "b"])


def test_other_contents_under_a_setting_are_other_work(tmp_path: Path) -> None:
    for name, mark in (("a", "f00d"), ("b", "beef")):
        folder = run(tmp_path / name, texts(LENGTHS), drafter=name)
        (folder / "config.yaml").write_text("target: {path: models/mine}")
        identity = json.loads((folder / "identity.json").read_text())
        identity["parts"]["contents"]["target.path"] = mark
        del identity["parts"]["settings"]["target.path"]
        (folder / "identity.json").write_text(json.dumps(identity))
    said = r"contents of target\.path \(models/mine #f00d and models/mine #beef\)"
    with pytest.raises(ValueError, match=said):
        compare([tmp_path / "a", tmp_path / "b"])
    targets = {group.workload["target"] for group in compare([tmp_path]).groups}
    assert targets == {"models/mine"}


def test_other_prompts_are_another_group_or_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", texts(LENGTHS))
    run(tmp_path / "b", texts(LENGTHS, first=50), drafter="pld")
    assert len(compare([tmp_path]).groups) == 2
    with pytest.raises(ValueError, match="have no prompt in common"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_synthetic_runs_stand_apart_or_are_refused(tmp_path: Path) -> None:
    sweep(tmp_path)
    run(tmp_path / "c", texts([4.0] * 8), drafter="synthetic", synthetic=True)
    group = only(compare([tmp_path]))
    assert [one.mark for one in group.entries] == ["", "", "SYNTHETIC"]
    assert {d.first for d in group.differences} == {"ngram"}
    assert "synthetic" not in group.verdict[0]
    with pytest.raises(ValueError, match="c: its acceptance is synthetic"):
        compare([tmp_path / name for name in "abc"])


@pytest.mark.parametrize(
    ("mark", "summary"),
    [("LOSSY", {"lossy": True}), ("FAILED", {"lossless": {"verdict": "failed", "reason": ""}})],
)
def test_what_is_not_lossless_wins_nothing(
    tmp_path: Path, mark: str, summary: dict[str, Any]
) -> None:
    sweep(tmp_path)
    run(tmp_path / "c", texts([6.0] * 8), drafter="rest", **summary)
    group = only(compare([tmp_path]))
    assert [(one.name, one.mark) for one in group.entries][-1] == ("rest", mark)
    assert not any("rest" in (d.first, d.second) for d in group.differences)
    assert "rest stand" in group.verdict[2]


def test_an_interrupted_run_is_compared_on_what_it_has(tmp_path: Path) -> None:
    sweep(tmp_path)
    generations, steps = texts(SLOWER, turns=2)
    half = [one for one in generations if one["prompt"] < 6 or not one["turn"]]
    run(tmp_path / "c", (half, steps), drafter="rest")
    for name, lengths in (("a", LENGTHS), ("b", SLOWER)):
        drafter = "ngram" if name == "a" else "pld"
        run(tmp_path / name, texts(lengths, turns=2), drafter=drafter)
    group = only(compare([tmp_path]))
    assert {one.conversations for one in group.entries} == {6}
    assert "6 of 8 conversations are compared" in group.notes[0]


def test_a_run_with_nothing_in_common_is_left_out(tmp_path: Path) -> None:
    for name, drafter in (("a", "ngram"), ("b", "pld")):
        run(tmp_path / name, texts(LENGTHS, turns=2), drafter=drafter)
    generations, steps = texts(LENGTHS, turns=2)
    first = [one for one in generations if not one["turn"]]
    run(tmp_path / "c", (first, steps), drafter="rest")
    comparison = compare([tmp_path])
    assert list(entries(only(comparison))) == ["ngram", "pld"]
    assert comparison.left_out == {"c": "no conversation that the others have is finished"}


def test_seeds_of_a_method_are_joined(tmp_path: Path) -> None:
    run(tmp_path / "a", texts(LENGTHS), seed=0)
    run(tmp_path / "b", texts(SLOWER), seed=1)
    (found,) = only(compare([tmp_path])).entries
    assert (found.seeds, found.folders, found.conversations) == ([0, 1], ["a", "b"], 8)
    sums = [columns(texts(lengths)) for lengths in (LENGTHS, SLOWER)]
    both = [np.add(one, other) for one, other in zip(*sums, strict=True)]
    expected = ratio(both[0], both[1])
    assert found.accepted_length.value == pytest.approx(expected.value)
    assert (found.accepted_length.low, found.accepted_length.high) == pytest.approx(expected.ends)


def test_repeats_show_an_unstable_clock(tmp_path: Path) -> None:
    for name, millis in (("a", 10.0), ("b", 25.0)):
        run(tmp_path / name, texts(LENGTHS, millis=millis), plain=texts([1.0] * 8))
    group = only(compare([tmp_path]))
    assert group.entries[0].repeats == pytest.approx(1.5)
    assert any(note.startswith("unstable clock: repeats of ngram") for note in group.notes)


# Names


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([{"drafter": "ngram"}, {"drafter": "pld"}], ["ngram", "pld"]),
        ([{"budget": 4}, {"budget": 8}], ["ngram tree.budget=4", "ngram tree.budget=8"]),
        (
            [{"tree": "chain", "budget": 4}, {"tree": "dynamic", "budget": 8}],
            ["ngram chain", "ngram dynamic"],
        ),
        (
            [{"settings": {"drafter.depth": 2}}, {"settings": {"drafter.depth": None}}],
            ["ngram drafter.depth=2", "ngram drafter.depth=null"],
        ),
        (
            [
                {"acceptance": "greedy"},
                {"acceptance": "block", "settings": {"acceptance._target_": "block"}},
            ],
            ["ngram block", "ngram greedy"],
        ),
        (
            [
                {"children": "sample", "settings": {"tree.children": "sample"}},
                {"children": "top_k", "settings": {"tree.children": "top_k"}},
            ],
            ["ngram sample", "ngram top_k"],
        ),
        (
            [
                {"children": "sample", "settings": {"tree.children": "sample"}},
                {"children": "sample", "settings": {"tree.children": "auto"}},
            ],
            ["ngram tree.children=auto", "ngram tree.children=sample"],
        ),
    ],
)
def test_methods_are_named_by_what_differs(
    tmp_path: Path, runs: list[dict[str, Any]], names: list[str]
) -> None:
    for place, one in enumerate(runs):
        run(tmp_path / str(place), texts(LENGTHS), **one)
    assert sorted(one.name for one in only(compare([tmp_path])).entries) == names


def test_methods_of_other_code_have_other_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, texts(LENGTHS), code=name)
    comparison = compare([tmp_path])
    names = {one.name.partition("#")[::2] for one in only(comparison).entries}
    assert len(names) == 2
    assert {name for name, _ in names} == {"ngram "}
    assert comparison.differing["code"] == {"a": "a", "b": "b"}


# Times


def test_times_of_other_machines_are_not_used(tmp_path: Path) -> None:
    sweep(tmp_path)
    other = {**MACHINE, "hardware": {"gpu": "a GPU", "cpu": "a CPU"}}
    run(tmp_path / "c", texts([1.2] * 8), plain=texts([1.0] * 8), drafter="rest", **other)
    group = only(compare([tmp_path]))
    assert group.times.startswith("lengths only: runs on different machines or versions (")
    assert "a GPU" in group.times
    assert all(one.speedup is None and one.tokens_per_second is None for one in group.entries)
    assert {d.quantity for d in group.differences} == {"accepted_length"}


def test_speeds_are_not_compared_if_the_machine_was_not_the_same(tmp_path: Path) -> None:
    sweep(tmp_path)
    run(tmp_path / "c", texts([1.2] * 8), plain=texts([1.0] * 8, millis=9.9), drafter="rest")
    group = only(compare([tmp_path]))
    assert group.times == "speeds are not compared: plain decoding of these runs differs by 10%"
    assert {d.quantity for d in group.differences} == {"accepted_length"}
    assert entries(group)["rest"].speedup is not None  # over its own
    assert "who is faster is not known" in group.verdict[2]


def test_times_of_jobs_that_met_others_are_not_used(tmp_path: Path) -> None:
    sweep(tmp_path)
    run(tmp_path / "c", texts([5.0] * 8), plain=texts([1.0] * 8, millis=9.0), drafter="rest")
    job(tmp_path, 0, "drafter=rest", "finished", folder="c", shared=True)
    group = only(compare([tmp_path]))
    found = entries(group)["rest"]
    assert (found.tokens_per_second, found.speedup, found.anatomy) == (None, None, None)
    assert "not of runs that shared their device: c" in group.times
    assert [d.second for d in group.differences if d.quantity == "tokens_per_second"] == ["pld"]
    assert "ngram is the fastest" in group.verdict[0]
    assert "rest has the longest accepted length" in group.verdict[0]


def test_a_failed_anchor_leaves_the_speedup_over_its_own(tmp_path: Path) -> None:
    sweep(tmp_path)
    off = {"used": False, "reason": "the pace has changed meanwhile"}
    run(tmp_path / "c", texts([5.0] * 8), plain=texts([1.0] * 8), drafter="rest", anchor=off)
    group = only(compare([tmp_path]))
    found = entries(group)["rest"]
    assert found.tokens_per_second is None
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(12 / 3)
    assert "kept another pace: c" in group.times


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"in_turns": True}, "in turns"),
        (
            {"anchor": {"used": True, "seconds": [1.0, 1.01], "reference": [1.0]}},
            "one process each, anchor within 1.0%",
        ),
    ],
)
def test_how_times_were_measured_is_said(
    tmp_path: Path, summary: dict[str, Any], said: str
) -> None:
    plain = run(tmp_path / "baselines" / "x", texts([1.0] * 8))
    for name, lengths in (("a", LENGTHS), ("b", SLOWER)):
        shared = {"baseline_from": f"../baselines/{plain.name}", **summary}
        run(tmp_path / name, texts(lengths), drafter=name, **shared)
    assert only(compare([tmp_path])).times == said


def test_runs_without_an_anchor_are_judged_by_their_own_plain_decoding(tmp_path: Path) -> None:
    plain, off = texts([1.0] * 8, millis=9.0), texts([1.0] * 8, millis=9.18)
    good = {"anchor": {"used": True, "seconds": [1.0], "reference": [1.0]}}
    run(tmp_path / "a", texts(LENGTHS), plain=plain, **good)
    run(tmp_path / "b", texts(SLOWER), plain=off, drafter="pld")
    group = only(compare([tmp_path]))
    assert group.times == "one process each, plain decoding within 2.0%"
    run(tmp_path / "b", texts(SLOWER), plain=off, drafter="pld", **good)
    assert only(compare([tmp_path])).times == "one process each, plain decoding within 2.0%"


# Verdicts


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for budget in range(2, 8):
        side = texts(rng.choice([1.5, 2.0, 3.0], size=40).tolist())
        run(tmp_path / str(budget), side, budget=budget)
    run(tmp_path / "other", texts([2.0] * 40), drafter="pld")
    group = only(compare([tmp_path]))
    assert sorted(one.labels["drafter"] for one in group.chosen) == ["ngram", "pld"]
    (mine,) = (one for one in group.chosen if one.labels["drafter"] == "ngram")
    count = mine.conversations
    assert 10 < count < 30
    # The winner of one half is the best there by what the other half leaves of the whole.
    rest = {}
    for one in group.entries:
        if one.labels["drafter"] == "ngram":
            (found,) = [c for c in group.chosen if c.name == one.name] or [None]
            rest[one.name] = (one, found)
    whole, half = rest[mine.name]
    assert half is mine
    assert whole.tokens - half.tokens == 12 * (40 - count)
    steps = [whole.tokens / whole.accepted_length.value, half.tokens / half.accepted_length.value]
    chosen_on = (whole.tokens - half.tokens) / (steps[0] - steps[1])
    assert math.isfinite(chosen_on)
    assert chosen_on > 1.9  # the best of six, each 2 or so
