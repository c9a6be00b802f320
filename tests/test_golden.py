"""Today's behaviour, pinned: what every drafter drafts and what is kept of it, through settings
alone; see golden/trace.py and golden/lengths.py."""

from itertools import product

import pytest

from tests.golden import lengths, trace

REMAKE = 'if this is meant: python -m tests.golden.{} --write "why it had to change"'
MODELS = trace.Models()


def quick() -> list[tuple[str, int, int]]:
    """Of each drafter a case for each sampling, its batch and how many prompts: trees and batches
    take turns, so that of all pairs some drafters have each."""
    found = []
    for (i, drafter), (j, sampling) in product(
        enumerate(trace.DRAFTERS), enumerate(trace.SAMPLINGS)
    ):
        tree = trace.TREES[0 if drafter == "none" else (i + j) % 2]
        batch = (1, 3)[(i // 2 + j) % 2]
        found.append((f"drafter={drafter} tree={tree} sampling={sampling}", batch, batch))
    return found


def test_the_trace_has_every_case() -> None:
    assert trace.recorded().keys() == set(trace.CASES), REMAKE.format("trace")
    every = {case for group in lengths.GROUPS.values() for case in group}
    assert lengths.recorded().keys() == every, REMAKE.format("lengths")
    pairs = {(tree in case, batch) for case, batch, _ in quick() for tree in trace.TREES[:1]}
    assert len(pairs) == 4


@pytest.mark.parametrize(
    ("case", "batch", "prompts"),
    [
        *quick(),
        *(
            pytest.param(case, batch, trace.COUNT, marks=pytest.mark.slow)
            for case, batch in product(trace.CASES, (1, 3))
        ),
    ],
)
def test_trace(case: str, batch: int, prompts: int) -> None:
    ((_, _, lines),) = trace.replay([case], batch, prompts, models=MODELS)
    wrong = trace.difference(f"{case} batch_size={batch}", trace.recorded(prompts)[case], lines)
    assert wrong is None, f"{wrong}\n{REMAKE.format('trace')}"


@pytest.mark.some(5)
@pytest.mark.parametrize("case", [case for group in lengths.GROUPS.values() for case in group])
def test_lengths(case: str) -> None:
    expected = lengths.recorded()[case]
    ((_, length),) = lengths.measured([case], MODELS)
    change = f"{case}: {expected} became {length}\n{REMAKE.format('lengths')}"
    assert abs(length / expected - 1) <= lengths.TOLERANCE, change
