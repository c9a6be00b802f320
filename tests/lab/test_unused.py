"""What a run says of settings that it does not use."""

import pytest

from specdec.lab.build import method_of
from specdec.lab.settings import settings_of
from specdec.lab.unused import without_effect


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("drafter=ngram tree.budget=8", []),
        ("drafter=none tree.budget=0 seed=3", []),
        ("tree=chain tree=chain", []),
        ("sampling=nucleus drafter.candidates=8", []),
        ("drafter=token_recycling drafter.prompt_candidates=true", []),
        ("drafter=compose drafter.parts.first.min_match=2 drafter.min_match=2", []),
        ("drafter=compose drafter.mode=bandit drafter.reset=prompt", []),
        ("tree=dynamic tree.budget=4 drafter.depth=1", []),
        ("tree=dynamic tree.depth=3 drafter.depth=3", []),
        ("tree=cost_aware tree.adapts=true drafter=dspark drafter.confidence=true", []),
        ("tree=threshold drafter=dspark drafter.confidence=true", []),
        ("tree=static drafter=dspark drafter.confidence=false", []),
        *(
            (f"tree={tree} drafter=dspark drafter.confidence=true", ["drafter.confidence=true: h"])
            for tree in ("chain", "static", "optimal", "cost_aware")
        ),
        (
            "tree=dynamic tree.depth=6 drafter.depth=3",
            ["tree.depth=6: has no effect, drafter.depth=3 makes trees of 3 levels"],
        ),
        ("acceptance=relaxed acceptance.delta=0.1 acceptance.allow_lossy=true", []),
        (
            "drafter=none tree.budget=8",
            ["tree.budget=8: has no effect, drafter=none drafts nothi"],
        ),
        ("drafter=none tree=static", ["tree=static: has no effect, drafter=none drafts nothing"]),
        (
            "drafter.depth=1 tree.budget=4",
            ["tree.budget=4: has no effect, drafter.depth=1 leaves"],
        ),
        ("tree=chain tree=static", ["tree=chain: has no effect, tree=static comes after it"]),
        ("sampling.top_p=0.9", ["sampling.top_p=0.9: has no effect at temperature 0"]),
        ("sampling=nucleus sampling.temperature=0", ["sampling.top_p=0.9: has no effect at temp"]),
        (
            "drafter.candidates=8",
            ["drafter.candidates=8: has no effect, tree.children=top_k draw"],
        ),
        (
            "drafter=compose drafter.parts.second.candidates=8",
            ["drafter.parts.second.candidates=8: has no effect, tree.children=top_k draw"],
        ),
        (
            "drafter=compose drafter.mode=union drafter.min_match=2 drafter.reset=prompt",
            [
                f"drafter.{setting}: has no effect, drafter.mode=union does not ask for it"
                for setting in ("min_match=2", "reset=prompt")
            ],
        ),
        (
            "acceptance=typical acceptance.delta=0.1",
            ["acceptance.delta=0.1: has no effect, at te"],
        ),
        (
            "kernels.shared_prefix=true",
            ["kernels.shared_prefix=True: has no effect, Triton does not run"],
        ),
    ],
)
def test_settings_without_effect_are_named(words: str, expected: list[str]) -> None:
    settings = settings_of(words)
    said = list(without_effect(settings, method_of(settings), "reference", words.split()))
    assert len(said) == len(expected), said
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning)
