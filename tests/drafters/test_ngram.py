"""drafter=ngram, against a search of every earlier place in the text."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.ngram import NGram
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from tests.decoding import prepared
from tests.drafters.scripted import CHILDREN, decoding, paths_of, row_of, step_for


def naive_continuations(
    tokens: list[int],
    levels: int,
    *,
    min_match: int,
    max_match: int,
    matches: int,
    scanned: int,
    factor: float,
) -> list[tuple[list[int], float]]:
    """By looking at every earlier place in the text."""
    found = []
    for end in range(1, len(tokens)):
        lengths = [
            n for n in range(1, min(end, max_match) + 1) if tokens[end - n : end] == tokens[-n:]
        ]
        if max(lengths, default=0) >= min_match:
            found.append((max(lengths), end))
    best = sorted(found[-scanned:], reverse=True)[:matches]
    return [
        (tokens[end : end + min(levels, int(factor * length))], 2.0**length)
        for length, end in best
    ]


streams = st.lists(st.integers(0, 2), min_size=1, max_size=60) | st.builds(
    lambda part, times, tail: part * times + tail,
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.integers(1, 30),
    st.lists(st.integers(0, 3), max_size=4),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=streams,
    min_match=st.integers(1, 3),
    longer=st.integers(0, 5),
    matches=st.integers(1, 9),
    levels=st.integers(1, 5),
    factor=st.sampled_from([1.0, 1.5, 2.0, 9.0]),
)
def test_ngram_finds_the_longest_and_latest_matches(
    tokens: list[int], min_match: int, longer: int, matches: int, levels: int, factor: float
) -> None:
    settings_ = {"min_match": min_match, "max_match": min_match + longer, "matches": matches}
    drafter = NGram(max_spec_factor=factor, **settings_)
    sequence = decoding(tokens)
    drafter.start([sequence])
    found = [(list(path), weight) for path, weight in drafter.propose(sequence, levels)]
    expected = naive_continuations(
        tokens, levels, **settings_, scanned=NGram.SCANNED, factor=factor
    )
    assert found == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=streams, cuts=st.lists(st.integers(1, 6), max_size=8), min_match=st.integers(1, 3))
def test_ngram_index_of_a_growing_text_is_that_of_the_whole(
    tokens: list[int], cuts: list[int], min_match: int
) -> None:
    growing = NGram(min_match=min_match)
    start = max(1, len(tokens) - sum(cuts))
    sequence = decoding(tokens[:start])
    growing.start([sequence])
    for cut in [0, *cuts]:
        sequence.tokens += tokens[len(sequence.tokens) : len(sequence.tokens) + cut]
        fresh = NGram(min_match=min_match)
        fresh.start([sequence])
        expected = list(fresh.propose(sequence, 4))
        assert list(growing.propose(sequence, 4)) == expected
        assert list(growing.propose(sequence, 4)) == expected


def test_ngram_drafts_what_followed_last_time() -> None:
    drafter = prepared(NGram(), Chain(budget=3, children="top_k"))
    sequences = [
        decoding([1, 2, 3, 4, 5, 6, 1, 2, 3], row=1, number=10),
        decoding([7, 8, 9], row=0, number=11),
        decoding([0, 5, 0, 5], row=2, number=12),
    ]
    drafter.start(sequences)
    tree = drafter.draft(step_for(sequences))
    tree.check()
    assert paths_of(tree, 0)[-1] == (4, 5, 6)
    assert tree.size.tolist() == [4, 1, 3]
    assert paths_of(tree, 2)[-1] == (0, 5)


@pytest.mark.parametrize("children", CHILDREN)
def test_ngram_rows_do_not_hear_of_each_other(children: str) -> None:
    tree_policy = Static(widths=[2, 2, 1], children=children)
    texts = [[1, 2, 3, 1, 2, 4, 1, 2], [3, 1, 3, 1, 0, 3, 1], [2, 2, 2, 2, 2]]
    together = prepared(NGram(), tree_policy)
    sequences = [decoding(text, row=row, number=row) for row, text in enumerate(texts)]
    together.start(sequences)
    batch = together.draft(step_for(sequences))
    for row, text in enumerate(texts):
        alone = prepared(NGram(), tree_policy)
        sequence = decoding(text, row=0, number=row)
        alone.start([sequence])
        assert row_of(alone.draft(step_for([sequence])), 0) == row_of(batch, row)


def test_ngram_forgets_a_row_that_has_finished() -> None:
    drafter = prepared(NGram(), Chain(budget=3))
    first = decoding([1, 2, 3, 1, 2, 4, 1, 2], row=0)
    drafter.start([first])
    assert list(drafter.propose(first, 3))
    drafter.finish(first)
    second = decoding([9, 9, 5, 1, 2], row=0, number=1)
    drafter.start([second])
    assert list(drafter.propose(second, 3)) == []
    assert drafter.draft(step_for([second])).nodes == 1


def test_ngram_scans_only_the_latest_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer match that lies too far back is not found."""
    monkeypatch.setattr(NGram, "SCANNED", 3)
    far = [0, 8, 1, 2, 3]
    near = [[7, 1, 2, 4], [6, 1, 2, 5], [5, 1, 2, 6]]
    tokens = [*far, *(token for part in near for token in part), 0, 8, 1, 2]
    drafter = NGram(matches=8)
    sequence = decoding(tokens)
    drafter.start([sequence])
    assert [path for path, _ in drafter.propose(sequence, 1)] == [[6], [5], [4]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NGram(depth=0), "drafter.depth=0: must be at least 1"),
        (lambda: NGram(candidates=0), "drafter.candidates=0: must be at least 1"),
        (lambda: NGram(min_match=0), "drafter.min_match=0"),
        (
            lambda: NGram(min_match=4, max_match=3),
            "drafter.min_match=4, drafter.max_match=3",
        ),
        (lambda: NGram(matches=0), "drafter.matches=0"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
