"""Texts that repeat themselves: loops and bigrams against their definitions, token by token, and
what a run says of them."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from specdec.lab import repetition as module
from specdec.lab.metrics import summarise
from specdec.lab.repetition import LONGEST_PERIOD, degenerate, repetition
from specdec.lab.terminal import show_summary
from tests.lab.made import generation
from tests.running import QUICK, lines, summary_of


def loop_by_definition(text: list[int], longest_period: int) -> int:
    """Every stretch and every period is tried."""
    best = 0
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            stretch = text[begin:end]
            for period in range(1, min(longest_period, len(stretch) // 2) + 1):
                if stretch[period:] == stretch[:-period]:
                    best = max(best, len(stretch))
    return best


@given(st.lists(st.integers(0, 3), max_size=24), st.integers(1, 6))
def test_loops_and_bigrams_are_what_they_are_defined_to_be(text: list[int], period: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST_PERIOD", period)
        found = repetition(text)
    pairs = list(pairwise(text))
    assert found["longest_loop"] == loop_by_definition(text, period)
    assert found["distinct_bigrams"] == (len(set(pairs)) / len(pairs) if pairs else 1.0)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ([], 0),
        ([5], 0),
        ([5, 5], 2),
        ([1, 2, 3, 1, 2], 0),  # less than twice
        ([9, *[1, 2, 3] * 3, 1, 8], 10),
        ([*range(LONGEST_PERIOD)] * 2, 2 * LONGEST_PERIOD),
        ([*range(LONGEST_PERIOD + 1)] * 2, 0),
        ([2**40, 7] * 4, 8),  # of any vocabulary
    ],
)
def test_known_loops(text: list[int], loop: int) -> None:
    assert repetition(text)["longest_loop"] == loop


@pytest.mark.parametrize(
    ("other", "loop", "bad"), [(0, 15, False), (0, 16, True), (48, 16, True), (49, 16, False)]
)
def test_a_degenerate_text_loops_for_a_while_and_for_a_quarter(
    other: int, loop: int, bad: bool
) -> None:
    text = [*range(100, 100 + other), *[7] * loop]
    assert degenerate(generation(0, text, 1)) == bad
    record = {"tokens": len(text), "repetition": {"longest_loop": loop}}
    assert degenerate(record) == bad


def test_the_length_without_loops_is_that_of_the_others() -> None:
    loops, others = [generation(0, [7] * 40, 10)], [generation(1, [*range(40)], 20)]
    skipped = {**generation(2, [], 0), "finish_reason": "context"}
    found = summarise([*loops, *others, skipped], [])
    assert found["mean_accepted_length"] == {"pooled": 80 / 30, "per_request": 3.0}
    without = {"pooled": 2.0, "per_request": 2.0}
    assert found["repetitive"] == {"texts": 1, "accepted_length_without": without}
    alone = summarise([*loops, skipped], [])["repetitive"]
    assert alone == {"texts": 1, "accepted_length_without": None}


@pytest.mark.usefixtures("load_once")
def test_a_run_that_feeds_on_loops_says_so(specdec, tmp_path) -> None:
    """What the zoo says of lists is its own repetition; two texts, of which one loops."""
    (tmp_path / "asked.jsonl").write_text(
        '{"prompt": "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"}\n{"prompt": "It was a dark night"}\n'
    )
    words = ("drafter=ngram", "tree.budget=6", "baseline=false", *QUICK[:1], "dtype=float32")
    words += ("ignore_eos=true", "max_new_tokens=32", f"prompts.path={tmp_path}/asked.jsonl")
    code, printed, _ = specdec(*words, "prompts.chat=never", f"out={tmp_path}/o")
    assert code == 0
    texts, summary = lines(tmp_path / "o/generations.jsonl"), summary_of(tmp_path / "o")
    loops = [loop_by_definition(text["output_ids"], 8) for text in texts]
    assert summary["repetitive"]["texts"] == sum(loop >= 16 for loop in loops) == 1
    without = summary["repetitive"]["accepted_length_without"]["pooled"]
    assert without < 0.95 * summary["mean_accepted_length"]["pooled"]
    assert "1 of 2 texts loops; the accepted length, " in printed
    assert f"is {without:.2f} without them" in printed

    printed_again = io.StringIO()
    summary["repetitive"]["accepted_length_without"] = {
        name: 0.96 * length for name, length in summary["mean_accepted_length"].items()
    }
    show_summary(summary, Console(file=printed_again))
    assert "loops" not in printed_again.getvalue()
