"""What drafters share that learn while they decode: how long they keep it, and that outputs stay
the target's."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.protocols import TreePolicy
from specdec.verifier.target_only import TargetOnly
from tests.decoding import prepared, requests_of
from tests.drafters.learning import KINDS, PROMPTS, SMALL, V, decoder, following, run, spied

WIDTHS = {0: [1], 1: [1], 2: [2], 9: [3, 2], 40: [4, 3, 2]}  # of static trees, by budget

TREES: dict[str, Callable[[int], TreePolicy]] = {
    "chain": lambda budget: Chain(budget=budget),
    "static": lambda budget: Static(widths=WIDTHS[budget], budget=budget),
    "dynamic": lambda budget: Dynamic(budget=budget, width=4, depth=5),
}


@pytest.mark.some(6)
@pytest.mark.parametrize("budget", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", KINDS)
def test_trees_are_valid_within_budget_and_the_same_again(
    name: str, tree: str, budget: int
) -> None:
    expected = [following(prompt[-1], 30) for prompt in PROMPTS]
    drafters = [spied(KINDS[name]) for _ in range(2)]
    for drafter in drafters:
        for _ in range(2):  # a second run of the same drafter begins with nothing
            assert run(drafter, PROMPTS, TREES[tree](budget), batch_size=3) == expected
    first, second = (drafter.noted for drafter in drafters)
    assert first == second
    assert first[: len(first) // 2] == first[len(first) // 2 :]
    steps = sum(map(len, drafters[0].kept)) // 2
    assert (steps < 4 * 30) == (budget > 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_a_batch_is_the_row_alone(name: str) -> None:
    def trees(batch_size: int) -> dict[int, list[Any]]:
        drafter = spied(KINDS[name])
        run(drafter, PROMPTS, Dynamic(budget=20, width=4, depth=5), batch_size=batch_size)
        found: dict[int, list[Any]] = {}
        for ids, tokens, parents in drafter.noted:
            for i, *row in zip(ids, tokens, parents, strict=True):
                found.setdefault(i, []).append(row)
        return found

    assert trees(1) == trees(3)


def first_kept(name: str, reset: str, categories: Sequence[str]) -> list[int]:
    """Tokens of the first step of each of three requests, all of whom ask the same."""
    drafter = spied(KINDS[name], reset=reset, from_prompt=False)
    loop = decoder(drafter, Dynamic(budget=30, width=4, depth=3))
    done = loop.run(requests_of([[3, 9]] * 3, 20, categories))
    return [s.accepted_lengths[0] for s in sorted(done, key=lambda s: s.request.id)]


@pytest.mark.parametrize("name", KINDS)
def test_knowledge_lasts_as_long_as_reset_says(name: str) -> None:
    categories = ["a", "b", "a"]
    assert max(first_kept(name, "prompt", categories)) <= 2
    first, second, third = first_kept(name, "category", categories)
    assert max(first, second) <= 2 < third
    first, second, third = first_kept(name, "never", categories)
    assert first <= 2 < min(second, third)


@pytest.mark.parametrize("reset", ["prompt", "category", "never"])
@pytest.mark.parametrize("name", KINDS)
def test_forgetting_leaves_nothing(name: str, reset: str) -> None:
    drafter = spied(KINDS[name], reset=reset)
    loop = decoder(drafter, Dynamic(budget=20, width=4, depth=4), batch_size=2)
    found = []
    for _ in range(3):
        before = len(drafter.noted)
        outputs = [s.output_ids for s in loop.run(requests_of(PROMPTS, 20, ["a", "b", "a", "b"]))]
        found.append((outputs, drafter.noted[before:]))
        if len(found) == 1:
            drafter.forget()
    assert found[0] == found[1]
    assert (found[1] == found[2]) == (reset == "prompt")


@pytest.mark.parametrize("name", KINDS)
def test_warming_up_teaches_nothing(name: str) -> None:
    drafter = spied(KINDS[name], reset="never")
    loop = decoder(drafter, Dynamic(budget=20, width=4, depth=4))
    found = []
    for warm in (False, True):
        if warm:
            loop.warm_up(PROMPTS[0], 20)
        else:
            drafter.forget()
        before = len(drafter.noted)
        list(loop.run(requests_of(PROMPTS[:1], 20)))
        found.append(drafter.noted[before:])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("token_recycling", {"successors": 0}, "drafter.successors=0: must be from 1"),
        ("token_recycling", {"successors": V + 1}, f"drafter.successors={V + 1}: must be"),
        ("token_recycling", {"decay": 0.0}, "drafter.decay=0.0: must be above 0"),
        ("token_recycling", {"decay": 1.1}, "drafter.decay=1.1: must be"),
        ("token_recycling", {"reset": "daily"}, "drafter.reset=daily: must be one of"),
        ("token_recycling", {"depth": 0}, "drafter.depth=0: must be at least 1"),
        ("lookahead", {"window": 0}, "drafter.window=0: must be from 1 to 64"),
        ("lookahead", {"ngram": 1}, "drafter.ngram=1: must be from 2"),
        ("lookahead", {"guesses": 0}, "drafter.guesses=0: must be at least 1"),
        ("lookahead", {"reset": "daily"}, "drafter.reset=daily: must be one of"),
        (
            "lookahead",
            {"tree": Chain(budget=2, children="sample")},
            "tree.children=sample: .* use tree.children=top_k",
        ),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    own = dict(settings)
    tree = own.pop("tree", Chain(budget=2))
    with pytest.raises(ValueError, match=message):
        prepared(KINDS[name](**own), tree, SMALL)


@pytest.mark.some(1)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_plain_decoding(
    zoo: Any, name: str, tree: str, batch_size: int
) -> None:
    target, prompts, expected = zoo
    drafter = spied(KINDS[name])
    found = run(drafter, prompts, TREES[tree](9), target=target, new=16, batch_size=batch_size)
    assert found == expected
    assert sum(map(len, drafter.kept)) < 4 * 16


@pytest.mark.parametrize("reset", ["prompt", "never"])
@pytest.mark.parametrize("name", KINDS)
def test_a_seed_decides_what_is_sampled(zoo: Any, name: str, reset: str) -> None:
    """What is learnt from other prompts makes other trees, and so other steps."""
    target, prompts, _ = zoo
    found = [
        run(
            KINDS[name](reset=reset),
            prompts[:2],
            Dynamic(budget=12),
            target=target,
            new=8,
            rule=TargetOnly(),
            temperature=1.0,
            batch_size=batch_size,
        )
        for batch_size in ((1, 2) if reset == "prompt" else (2, 2))
    ]
    assert found[0] == found[1]
