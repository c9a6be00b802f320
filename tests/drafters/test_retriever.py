"""drafter=retriever: its automaton against plain counting, its sources, what it remembers, and the
published methods as settings of it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.automaton import END, Automaton
from specdec.drafters.host import Trie
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.retriever import Retriever
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.experiments.tools.build_datastore import build
from specdec.lab.settings import settings_of
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter
from specdec.request import Decoding, Request
from tests.decoding import decoder_of, prepared, requests_of

TREE = Chain(budget=4)
Paths = list[tuple[list[int], float]]

tokens_ = st.integers(0, 2)
texts_ = st.lists(st.integers(END, 2), max_size=40) | st.builds(
    lambda part, times, tail: part * times + tail,
    st.lists(tokens_, min_size=1, max_size=5),
    st.integers(1, 12),
    st.lists(st.integers(END, 3), max_size=5),
)


# --- the automaton


def followed(text: list[int], end: int) -> bool:
    return end < len(text) and text[end] != END


def ends_of(text: list[int], part: list[int]) -> list[int]:
    return [
        i + len(part) for i in range(len(text) - len(part) + 1) if text[i : i + len(part)] == part
    ]


def longest_match(text: list[int], context: list[int], most: int) -> int:
    """By looking everywhere."""
    lengths = range(1, min(len(context), most) + 1)
    found = [n for n in lengths if any(followed(text, end) for end in ends_of(text, context[-n:]))]
    return max(found, default=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=texts_,
    other=st.none() | st.lists(tokens_, min_size=1, max_size=6),
    most=st.integers(1, 8),
    reach=st.integers(1, 4),
    cuts=st.lists(st.integers(1, 9), max_size=4),
)
def test_automaton_counts_what_a_plain_scan_counts(
    text: list[int], other: list[int] | None, most: int, reach: int, cuts: list[int]
) -> None:
    """For the text's own end, and for the end of another text."""
    automaton = Automaton()
    for begin in [0, *(sum(cuts[: i + 1]) for i in range(len(cuts)))]:
        automaton.extend(text[len(automaton.text) : begin])
        automaton.match(text[:begin], most)  # looking changes nothing
    automaton.extend(text[len(automaton.text) :])
    assert automaton.text == text

    context = other or [token for token in text if token != END]
    if other is None and END in text:
        context = text[len(text) - text[::-1].index(END) :]
    state, length = automaton.match(context, most)
    assert length == longest_match(text, context, most)
    if not length:
        return
    ends = [end for end in ends_of(text, context[-length:]) if followed(text, end)]
    start = ends[-1]
    until = text.index(END, start) if END in text[start:] else len(text)
    assert automaton.recent(state, reach) == text[start : min(until, start + reach)]

    expected: Counter[tuple[int, ...]] = Counter()
    for end in ends:
        for n in range(1, reach + 1):
            path = text[end : end + n]
            if len(path) == n and END not in path:
                expected[tuple(path)] += 1
    found: Counter[tuple[int, ...]] = Counter()
    for path, count in automaton.followed(state, reach, 10**6):
        assert count > 0
        for n in range(1, len(path) + 1):
            found[tuple(path[:n])] += count
    assert found == expected


def test_the_most_frequent_continuations_come_first() -> None:
    text = [token for i in range(20) for last in range(i, 20) for token in (99, 98, last)]
    automaton = Automaton(text)  # 19 came twenty times, 18 nineteen times ...
    state, length = automaton.match([99, 98], 8)
    assert length == 2
    shown = list(automaton.followed(state, 1, 3))
    assert shown == [([19], 20), ([18], 19), ([17], 18)]
    deep = [path for path, _ in automaton.followed(state, 6, 3)]
    assert len(deep) <= 6
    assert {path[0] for path in deep} <= {path[0] for path, _ in shown}
    assert max(map(len, deep)) > 1


def test_of_equally_frequent_continuations_the_latest_leads() -> None:
    automaton = Automaton([1, 2, 1, 3, 1, 4, 1])
    state, _ = automaton.match([1], 4)
    assert [path for path, _ in automaton.followed(state, 1, 9)] == [[4], [3], [2]]
    assert automaton.recent(state, 9) == [4, 1]


@pytest.mark.parametrize("part", [[5], [5, 6], [5] * 99 + [6]])
def test_a_text_that_repeats_itself_takes_linear_time(part: list[int]) -> None:
    """Quadratic would be tens of millions of counts instead of under one."""
    size = 12_000 // len(part) * len(part)
    automaton = Automaton(part * (size // len(part)))
    state, length = automaton.match(automaton.text, 16)
    assert length == 16
    assert automaton.recent(state, 3) == (part * 5)[:3] if len(part) < 9 else True
    path, _ = max(automaton.followed(state, 3, 8), key=lambda found: found[1])
    assert path[0] in part


# --- look-ups


def decoding(
    tokens: Sequence[int], *, row: int = 0, number: int = 0, category: str | None = None
) -> Decoding:
    request = Request(id=number, prompt_ids=list(tokens), max_new_tokens=9, category=category)
    return Decoding(request, row, list(tokens))


def proposed(drafter: Retriever | NGram, sequence: Decoding, levels: int = 4) -> Paths:
    return [(list(path), weight) for path, weight in drafter.propose(sequence, levels)]


def alone(tokens: Sequence[int], levels: int = 4, **options: Any) -> Paths:
    drafter = prepared(Retriever(**options), TREE)
    sequence = decoding(tokens)
    drafter.start([sequence])
    return proposed(drafter, sequence, levels)


def test_shares_of_what_followed_and_the_length_of_the_match() -> None:
    text = [1, 2, 7, 1, 2, 7, 1, 2, 8, 3, 2, 9, 1, 2]
    found = alone(text, levels=1)
    assert found == [([7], pytest.approx(4 * 2 / 3)), ([8], pytest.approx(4 / 3))]
    assert alone(text, levels=1, min_match=3, max_match=3) == []
    assert alone(text, levels=1, max_match=1) == [
        ([7], pytest.approx(1.0)),
        ([9], pytest.approx(0.5)),
        ([8], pytest.approx(0.5)),
    ]
    assert alone([1, 2, 3], levels=4) == []


@pytest.mark.parametrize(("factor", "reach"), [(1.0, 2), (1.5, 3), (2.0, 4), (None, 6)])
def test_longer_matches_are_continued_further(factor: float | None, reach: int) -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    ((path, _),) = alone(text, levels=6, max_spec_factor=factor)
    assert path == [3, 4, 5, 6, 7, 8][:reach]


def test_match_length_is_that_of_the_last_look() -> None:
    for kind in (Retriever, NGram):
        drafter = prepared(kind(max_match=3), TREE)
        rows = [decoding([1, 2, 3, 4, 5], row=0), decoding([7, 5, 7], row=1)]
        drafter.start(rows)
        lengths = []
        for token in (2, 3, 4, 5, 9):
            rows[0].tokens.append(token)
            for sequence in rows:
                proposed(drafter, sequence)
            lengths.append(drafter.match_length(rows[0]))
            assert drafter.match_length(rows[1]) == 1
        assert lengths == [1, 2, 3, 3, 0]


def test_a_row_starts_anew_for_the_next_sequence() -> None:
    drafter = prepared(Retriever(), TREE)
    first = decoding([1, 2, 1, 2, 1], row=0)
    drafter.start([first])
    assert proposed(drafter, first)
    drafter.finish(first)
    second = decoding([3, 1], row=0, number=1)
    drafter.start([second])
    assert proposed(drafter, second) == []
    assert drafter.match_length(second) == 0


# --- history


def after(drafter: Retriever, *texts: tuple[str | None, list[int]]) -> None:
    """Requests with these categories and outputs have been decoded."""
    for number, (category, output) in enumerate(texts):
        sequence = decoding([0], number=number, category=category)
        drafter.start([sequence])
        sequence.tokens += output
        drafter.finish(sequence)


@pytest.mark.parametrize(
    ("reset", "seen"), [("prompt", set()), ("category", {6}), ("never", {6, 7})]
)
def test_outputs_of_earlier_requests(reset: Any, seen: set[int]) -> None:
    drafter = prepared(Retriever(reset=reset), TREE)
    assert drafter.reset == reset
    after(drafter, ("a", [4, 5, 6]), ("b", [4, 5, 7]))
    for _ in range(2):
        sequence = decoding([1, 4, 5], number=9, category="a")
        drafter.start([sequence])
        found = proposed(drafter, sequence, levels=3)
        assert {path[0] for path, _ in found} == seen
        assert drafter.match_length(sequence) == (2 if seen else 0)
        drafter.forget()
        assert proposed(drafter, sequence, levels=3) == []
        after(drafter, ("a", [4, 5, 6]), ("b", [4, 5, 7]))


def test_history_holds_outputs_and_no_continuation_crosses_their_ends() -> None:
    drafter = prepared(Retriever(reset="never", max_spec_factor=None), TREE)
    after(drafter, (None, [4, 5, 6]), (None, [7, 8]))
    for context, expected in (([4], [[5, 6]]), ([6], []), ([7], [[8]]), ([0], []), ([5, 0], [])):
        sequence = decoding([3, *context], number=9)
        drafter.start([sequence])
        assert [path for path, _ in proposed(drafter, sequence)] == expected


def test_own_text_and_history_meet() -> None:
    drafter = prepared(Retriever(reset="never"), TREE)
    after(drafter, (None, [4, 5, 6]), (None, [4, 5, 6]), (None, [4, 5, 7]))
    sequence = decoding([5, 8, 5], number=9)
    drafter.start([sequence])
    trie = Trie()
    for path, weight in proposed(drafter, sequence, levels=1):
        trie.add(path, weight)
    assert trie.best(9) == [
        (8, pytest.approx(1 / 2)),
        (6, pytest.approx(1 / 3)),
        (7, pytest.approx(1 / 6)),
    ]


# --- a datastore


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


@pytest.fixture(scope="module")
def store(target: PagedLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stores") / "s"
    texts = ["def fibonacci(n):\n    if n < 2:\n        return n\n", "It was a dark night, and"]
    build(texts, folder, tokenizer=target.tokenizer, name="zoo:target")
    return str(folder)


def test_a_datastore_is_looked_into(target: PagedLM, store: str) -> None:
    known = target.tokenizer("It was a dark night, and").input_ids
    drafter = Retriever(datastore=store, own_text=False, max_spec_factor=None)
    prepared(drafter, TREE, target)
    sequence = decoding([*known[:3], *known[:4]])
    drafter.start([sequence])
    assert proposed(drafter, sequence, levels=2) == [(known[4:6], 2.0**4)]
    assert drafter.match_length(sequence) == 4
    sequence.tokens += known[4:]
    assert proposed(drafter, sequence) == []  # the document ends there
    assert drafter.match_length(sequence) == 0


def test_all_sources_meet_in_one_trie(target: PagedLM, store: str) -> None:
    known = target.tokenizer("It was a dark night, and").input_ids
    drafter = prepared(Retriever(datastore=store, reset="never"), TREE, target)
    after(drafter, (None, [*known[:2], 55]))
    sequence = decoding([known[1], 66, *known[:2]], number=9)
    drafter.start([sequence])
    found = proposed(drafter, sequence, levels=1)
    assert found == [([66], 2.0), ([55], 4.0), ([known[2]], 4.0)]


# --- published methods


def configured(words: str, target: PagedLM | None = None) -> Retriever:
    """The drafter of a YAML, as the command line builds it."""
    options = settings_of(f"drafter={words}")["drafter"]
    assert options.pop("_target_") == "specdec.drafters.retriever.Retriever"
    return prepared(Retriever(**options), TREE, target)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=st.lists(tokens_, min_size=1, max_size=40))
def test_pld_is_a_plain_prompt_lookup(tokens: list[int]) -> None:
    """The longest of 3, 2, 1 last tokens that occurs earlier, the last time it does."""
    expected: Paths = []
    for n in (3, 2, 1):
        ends = [end for end in ends_of(tokens, tokens[-n:]) if end < len(tokens)]
        if ends and n <= len(tokens):
            expected = [(tokens[ends[-1] : ends[-1] + 5], 2.0**n)]
            break
    sequence = decoding(tokens)
    PLD.start([sequence])
    assert proposed(PLD, sequence, levels=5) == expected


PLD = configured("pld")


def test_rest_finds_in_its_datastore_alone(target: PagedLM, store: str) -> None:
    drafter = configured(f"rest drafter.datastore={store}", target)
    known = target.tokenizer("def fibonacci(n):").input_ids
    after(drafter, (None, [77, 78, 79]))
    sequence = decoding([77, 78, 77], number=9)
    drafter.start([sequence])
    assert proposed(drafter, sequence) == []
    sequence.tokens += known[:3]
    assert proposed(drafter, sequence, levels=2)[0][0] == known[3:5]
    with pytest.raises(ValueError, match=r"drafter\.datastore: must be given"):
        configured("rest")


def test_suffix_decoding_remembers_outputs() -> None:
    drafter = configured("suffix_decoding")
    after(drafter, ("a", [4, 5, 6, 7, 8, 9]))
    sequence = decoding([4, 5], number=9, category="b")
    drafter.start([sequence])
    assert proposed(drafter, sequence, levels=9) == [([6, 7, 8, 9], 4.0)]


# --- settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_match": 0}, "drafter.min_match=0, drafter.max_match=16: need 1 <="),
        ({"min_match": 4, "max_match": 3}, "drafter.min_match=4, drafter.max_match=3"),
        ({"samples": 0}, "drafter.samples=0: must be at least 1"),
        ({"max_spec_factor": 0.5}, "drafter.max_spec_factor=0.5: must be at least 1"),
        ({"reset": "daily"}, "drafter.reset=daily: must be one of"),
        ({"order": "random"}, "drafter.order=random: must be"),
        ({"own_text": False}, "drafter.own_text=false: nowhere to look"),
        ({"depth": 0}, "drafter.depth=0"),
        ({"candidates": 0}, "drafter.candidates=0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match="drafter") as error:
        Retriever(**options)
    assert expected in str(error.value)


# --- decoding


def outputs(
    target: PagedLM, drafter: Drafter, tree: Any, batch_size: int
) -> tuple[list[list[int]], int]:
    """Greedy outputs, and the steps they took."""
    texts = ["def fibonacci(n):\n", "It was a dark night", "def f(x):\n    return", "1 2 3 1 2"]
    prompts = [target.tokenizer(text).input_ids for text in [*texts, texts[0]]]
    decoder = decoder_of(target, drafter, tree, rows=batch_size, max_tokens=64)
    done = sorted(decoder.run(requests_of(prompts, 24)), key=lambda sequence: sequence.request.id)
    return [sequence.output_ids for sequence in done], sum(sequence.steps for sequence in done)


@pytest.fixture(scope="module")
def plain(target: PagedLM) -> tuple[list[list[int]], int]:
    return outputs(target, NoDrafter(), None, 4)


@pytest.mark.some(1)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", [Chain(budget=6), Dynamic(budget=8, width=3, depth=4)])
def test_decoding_with_all_sources_equals_plain_decoding(
    target: PagedLM, store: str, plain: tuple[list[list[int]], int], tree: Any, batch_size: int
) -> None:
    drafter = Retriever(datastore=store, reset="never")
    found, steps = outputs(target, drafter, tree, batch_size)
    assert found == plain[0]
    assert steps < 0.8 * plain[1]


def test_the_longest_matches_still_have_a_weight() -> None:
    """Floats end at 2 to the power of 1024."""
    request = Request(id=0, prompt_ids=[5] * 2500, max_new_tokens=8)
    sequence = Decoding(request, 0, list(request.prompt_ids))
    for kind in (Retriever, NGram):
        drafter = prepared(kind(max_match=2000), Chain(budget=4))
        drafter.start([sequence])
        assert [sum(w for _, w in drafter.propose(sequence, 4))] > [1e300]
        assert drafter.trie(sequence).best(4) == [(5, 1.0)]
