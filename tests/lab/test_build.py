"""From settings to objects: parts of compositions, and what auto stands for."""

from collections.abc import Sequence
from typing import Any

import pytest

from specdec.drafters.ngram import NGram
from specdec.lab import build
from specdec.lab.build import method_of
from specdec.lab.settings import settings_of
from specdec.protocols import Drafter


def twice(tokens: list[int]) -> list[Sequence[int]]:
    """A drafter of the user's."""
    return [tokens[-2:], tokens[-1:]]


class Pair(Drafter):
    """A composition, as far as the runner is concerned."""

    def __init__(self, *, parts: dict[str, Drafter]) -> None:
        self.parts = parts


class Deep(Drafter):
    """Has a depth, and grows no trees by `drafters/growth.py`."""

    def __init__(self, *, depth: int | None = None) -> None:
        self.depth = depth


NGRAM = {"_target_": "specdec.drafters.ngram.NGram", "min_match": 2}
MODEL = {"_target_": "specdec.drafters.small_llama.SmallLlama", "path": "zoo:draft"}


def test_a_composition_gets_its_parts_built():
    settings = {
        "_target_": f"{__name__}.Pair",
        "parts": {"first": NGRAM, "second": {"_target_": f"{__name__}.twice", "depth": 2}},
    }
    built = build._drafter("pair", "drafter", settings)
    assert built.name == "pair"
    first, second = built.parts.values()
    assert list(built.parts) == ["first", "second"]
    assert isinstance(first, NGram)
    assert (first.name, first.min_match) == ("ngram", 2)
    assert (second.name, second.depth) == (f"test_build ({__name__}.twice)", 2)

    for wrong, expected in {
        "soon": "drafter.parts=soon: must be settings of drafters, by name",
        ("first", 3): "drafter.parts.first=3: must be the settings of a drafter",
        ("first", "min_match", "few"): "drafter.parts.first.min_match=few: must be a valid int",
        ("first", "min_match", 99): "drafter.parts.first.min_match=99, drafter.parts.first.max",
        ("first", "nonsense", 1): "drafter.parts.first.nonsense=1: NGram has no such setting",
        ("first", "_target_", "a.b"): "drafter.parts.first._target_=a.b: cannot be imported",
    }.items():
        parts: Any = wrong
        if isinstance(wrong, tuple):
            name, *setting, value = wrong
            parts = {name: {**NGRAM, setting[0]: value} if setting else value}
        with pytest.raises(ValueError, match=f"^{expected}".replace("[", r"\[")):
            build._drafter("pair", "drafter", {**settings, "parts": parts})


def test_children_are_sampled_if_all_parts_are_good_at_it():
    def samples(*parts: dict[str, Any]) -> bool:
        named = {str(number): part for number, part in enumerate(parts)}
        return build._prefers_sampling("drafter", {"_target_": f"{__name__}.Pair", "parts": named})

    assert samples(MODEL, MODEL)
    assert not samples(MODEL, NGRAM)
    assert build._prefers_sampling("drafter", MODEL)
    assert not build._prefers_sampling("drafter", NGRAM)


@pytest.mark.parametrize(
    ("words", "acceptance", "children"),
    [
        ("drafter=small_llama", "greedy", "top_k"),
        ("drafter=small_llama sampling=sample", "recursive_rejection", "sample"),
        ("drafter=ngram sampling=sample", "target_only", "top_k"),
        ("drafter=ngram sampling=sample tree.children=sample", "recursive_rejection", "sample"),
        ("acceptance=k_seq sampling=sample tree=static", "k_seq", "sample_with_replacement"),
        ("acceptance=k_seq", "k_seq", "top_k"),
    ],
)
def test_automatic_pairing(words, acceptance, children):
    labels = method_of(settings_of(words)).labels
    assert (labels["acceptance"], labels["children"]) == (acceptance, children)


def test_a_depth_that_contradicts_the_tree_is_refused_whatever_has_it():
    words = f"drafter=user drafter._target_={__name__}.Deep tree=static tree.widths=[2,2]"
    method_of(settings_of(f"{words} drafter.depth=2"))
    with pytest.raises(ValueError, match=r"^drafter.depth=1: tree.widths=\[2, 2\] has 2 levels"):
        method_of(settings_of(f"{words} drafter.depth=1"))
    method_of(settings_of(f"{words} drafter.depth=1 tree.budget=0"))
