"""What is said of a comparison in words."""

from pathlib import Path

import pytest

from specdec.compare.comparing import compare
from tests.compare.folders import LENGTHS, SLOWER, Record, columns, entries, only, run, texts


def test_a_single_method_has_a_verdict_too(tmp_path: Path) -> None:
    run(tmp_path / "a", texts(LENGTHS), plain=texts([1.0] * 8))
    group = only(compare([tmp_path / "a"]))
    verdict, (found,) = group.verdict, group.entries
    assert found.speedup is not None
    assert verdict[0].startswith(
        f"ngram chain alone was measured: accepted length {found.accepted_length.value:.2f} ("
    )
    assert f"{found.speedup.value:.2f} (" in verdict[0]
    assert verdict[1] == "There is one category, so nothing to say of where methods differ."
    assert verdict[2] == "1 of 1 runs passed the check of losslessness."


def test_the_range_of_few_conversations_is_spoken(tmp_path: Path) -> None:
    run(tmp_path / "a", texts([2.0, 3.0]))
    verdict = only(compare([tmp_path / "a"])).verdict
    assert "accepted length 2.40 (single ones 2.00 to 3.00)" in verdict[0]
    run(tmp_path / "b", texts([2.0, 2.0]))
    assert "accepted length 2.00." in only(compare([tmp_path / "b"])).verdict[0]


def categories(lengths: dict[str, list[float]]) -> tuple[list[Record], list[Record]]:
    parts = [
        texts(own, category=name, first=20 * place)
        for place, (name, own) in enumerate(lengths.items())
    ]
    return [g for one in parts for g in one[0]], [s for one in parts for s in one[1]]


def test_a_category_with_a_winner_of_its_own_is_named(tmp_path: Path) -> None:
    run(tmp_path / "a", categories({"math": LENGTHS * 2, "code": SLOWER}))
    run(tmp_path / "b", categories({"math": SLOWER * 2, "code": LENGTHS}), drafter="pld")
    group = only(compare([tmp_path]))
    assert (
        "ngram is ahead in 1 of 2 categories, and loses code to pld (1.36 times"
        in group.verdict[1]
    )
    shares = entries(group)["pld"].by_category
    assert [shares[name].conversations for name in ("math", "code")] == [16, 8]
    whole = columns(texts(LENGTHS))
    assert shares["code"].accepted_length.value == pytest.approx(sum(whole[0]) / sum(whole[1]))


def test_a_category_that_may_be_chance_is_said_to_be(tmp_path: Path) -> None:
    code = [2.0, 3.0, 1.5, 2.0, 2.4, 4.0]
    run(tmp_path / "a", categories({"math": LENGTHS, "code": code}))
    other = [3.0, 2.0, 2.0, 1.5, 3.0, 4.0]
    run(tmp_path / "b", categories({"math": SLOWER, "code": other}), drafter="pld")
    verdict = only(compare([tmp_path])).verdict
    assert "in code (pld) may be chance" in verdict[1]


def test_methods_that_are_not_told_apart_are_said_to_be(tmp_path: Path) -> None:
    shuffled = [LENGTHS[i] for i in (3, 1, 2, 0, 5, 4, 6, 7)]
    run(tmp_path / "a", texts(LENGTHS))
    run(tmp_path / "b", texts([*shuffled[:-1], 1.5]), drafter="pld")
    verdict = only(compare([tmp_path])).verdict
    assert "ngram has the longest accepted length" in verdict[0]
    assert "not told apart from pld" in verdict[0]


def test_orders_that_depend_on_the_mean_are_told(tmp_path: Path) -> None:
    run(tmp_path / "a", texts([12.0, *[1.2] * 5]))  # one request of one step
    run(tmp_path / "b", texts([2.0] * 6), drafter="pld")
    notes = only(compare([tmp_path])).notes
    assert any("pld has the longer accepted length pooled" in note for note in notes)
    assert any("ngram the longer one by request" in note for note in notes)
