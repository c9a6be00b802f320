"""Who drafts in a composition, by what each part has found."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from specdec.drafters.bandit import Bandit
from specdec.drafters.choosers import LENGTHS, TRUSTED_HALF, Cascade, Pulls, Union
from specdec.request import Decoding, Request


def sequence(number: int = 0) -> Decoding:
    request = Request(id=number, prompt_ids=[1], max_new_tokens=9, category=f"kind {number}")
    return Decoding(request, number, [1])


class Matches:
    """How long the match of each part is, and who was asked for it."""

    def __init__(self, lengths: Sequence[float]) -> None:
        self.lengths = lengths
        self.asked: list[int] = []

    def __call__(self, number: int) -> float:
        self.asked.append(number)
        return self.lengths[number]


def test_in_a_union_all_count_and_short_matches_less() -> None:
    weights = [0.5, 0.25, 2.0, 3.0, 4.0]
    match = Matches([0, 1, TRUSTED_HALF, 1000, math.inf])
    chosen = Union(weights).choose(sequence(), match)
    assert match.asked == [*range(5)]
    assert chosen == pytest.approx({0: 0.0, 1: 0.25 / 9, 2: 1.0, 3: 3 * 1000 / 1008, 4: 4.0})


@pytest.mark.parametrize(
    ("lengths", "chosen", "asked"),
    [
        ([4, 9, math.inf], 0, 1),
        ([3, 4, math.inf], 1, 2),
        ([3, 0, math.inf], 2, 3),
        ([3, 2, 1], 2, 3),  # the last one, whatever it has found
    ],
)
def test_a_cascade_asks_one_after_the_other(lengths: list[float], chosen: int, asked: int) -> None:
    match = Matches(lengths)
    assert Cascade(3, 4).choose(sequence(), match) == {chosen: 1.0}
    assert match.asked == [*range(asked)]


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ([2, 9, math.inf], 9),
        ([9, 2, 0], 9),
        ([0, 1, 0], 1),
        ([math.inf, 0, 0], 0),
        ([math.inf] * 3, 0),
    ],
)
def test_a_bandit_chooses_among_those_who_found_something(
    monkeypatch: pytest.MonkeyPatch, lengths: list[float], longest: int
) -> None:
    """In the class of the longest match of a text; a model has none."""
    offered: list[Any] = []

    def last(self: Bandit, arms: list[tuple[int, int]]) -> int:
        offered.extend(arms)
        return len(arms) - 1

    monkeypatch.setattr(Bandit, "choose", last)
    kind = sum(longest >= begin for begin in LENGTHS)
    found = [number for number, length in enumerate(lengths) if length]
    assert Pulls(3, None, "never").choose(sequence(), Matches(lengths)) == {found[-1]: 1.0}
    assert offered == [(number, kind) for number in found]


def test_where_nobody_has_found_anything_the_last_part_is_chosen_and_nothing_learnt() -> None:
    chooser, one = Pulls(3, [1.0, 1.0, 1.0], "never"), sequence()
    chooser.begin([])  # no step before the first
    assert chooser.choose(one, Matches([0, 0, 0])) == {2: 1.0}
    chooser.chosen(True)
    one.steps, one.accepted_lengths = 1, [1]
    chooser.begin([one])
    assert not chooser._bandits.of(one).arms


def test_a_pull_is_learnt_once_with_the_tokens_of_its_own_step() -> None:
    chooser, one = Pulls(2, [5.0, 7.0], "never"), sequence()
    one.steps, one.accepted_lengths = 2, [9, 4]
    (part,) = chooser.choose(one, Matches([3, 3]))
    chooser.chosen(True)
    one.steps, one.accepted_lengths = 3, [9, 4, 2]
    for _ in range(2):
        chooser.begin([one])
    arm = chooser._bandits.of(one).arms[part, 2]
    assert (arm.steps, arm.tokens, arm.cost) == (1.0, 2.0, [5.0, 7.0][part])


@pytest.mark.parametrize("how", ["forgotten", "over"])
def test_what_was_pulled_before_is_no_longer_learnt(how: str) -> None:
    """After all was forgotten, or once the sequence has ended."""
    chooser, one = Pulls(2, [5.0, 7.0], "never"), sequence()
    chooser.choose(one, Matches([3, 3]))
    chooser.chosen(True)
    one.steps, one.accepted_lengths = 1, [4]
    if how == "forgotten":
        chooser.forget()
    else:
        one.finish_reason = "length"
    chooser.begin([one])
    assert not any(arm.steps for arm in chooser._bandits.of(one).arms.values())


@pytest.mark.parametrize(
    ("reset", "known"),
    [("prompt", [False, True]), ("category", [True, True]), ("never", [True, True])],
)
def test_a_bandit_forgets_a_prompt_with_its_end(reset: Any, known: list[bool]) -> None:
    chooser, both = Pulls(2, [1.0, 1.0], reset), [sequence(0), sequence(1)]
    for one in both:
        chooser.choose(one, Matches([3, 0]))
    chooser.finish(both[0])
    assert [bool(chooser._bandits.of(one).arms) for one in both] == known
    chooser.forget()
    assert not any(chooser._bandits.of(one).arms for one in both)


@pytest.mark.parametrize("costs", [None, [1.0, 2.0]])
@pytest.mark.parametrize(
    ("alone", "joined", "stepped", "learns"),
    [
        (True, False, True, True),
        (True, True, True, False),
        (False, False, True, False),
        (True, False, False, False),
    ],
    ids=["a plain step", "a prompt was read", "another part drafted too", "no step"],
)
def test_a_bandit_learns_from_times_that_are_of_one_part_alone(
    monkeypatch: pytest.MonkeyPatch,
    costs: list[float] | None,
    alone: bool,
    joined: bool,
    stepped: bool,
    learns: bool,
) -> None:
    """If costs are given the time is of no matter."""
    learnt: list[Any] = []
    monkeypatch.setattr(Bandit, "learn", lambda self, *what: learnt.append(what))
    chooser, one, other = Pulls(2, costs, "never"), sequence(), sequence()
    chooser.begin([one])
    (part,) = chooser.choose(one, lambda number: 3.0)
    chooser.chosen(alone)
    if stepped:
        one.steps, one.accepted_lengths = 1, [3]
    chooser.begin([one, other] if joined else [one])
    assert bool(learnt) == (stepped if costs else learns)
    for (pulled, _), tokens, cost in learnt:
        assert (pulled, tokens) == (part, 3)
        assert cost == costs[part] if costs else 0 < cost < 10
