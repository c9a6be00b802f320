"""Today's behaviour, pinned: what every drafter drafts and what is kept of it, through settings
alone; see golden/trace.py and golden/lengths.py."""

import pytest

from tests.golden import lengths, trace

REMAKE = 'if this is meant: python -m tests.golden.{} --write "why it had to change"'


@pytest.mark.parametrize("sampling", trace.SAMPLINGS)
@pytest.mark.parametrize(
    ("batch", "every"),
    [(1, False), (3, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (1, 3))],
)
def test_trace(sampling: str, batch: int, every: bool) -> None:
    """All cases at both batches take long, so each is replayed at one of them, chains and trees
    in turn, and not for all prompts."""
    trees = trace.TREES if sampling == "greedy" else trace.TREES[::-1]
    tree = trees[batch != 1]
    cases = [c for c in trace.CASES if f"sampling={sampling}" in c and (every or tree in c)]
    prompts = trace.COUNT if every else 1 if batch == 1 else 3
    expected = trace.recorded(prompts)
    assert expected.keys() == set(trace.CASES), REMAKE.format("trace")
    for case, _, lines in trace.replay(cases, batch, prompts):
        wrong = trace.difference(f"{case} batch_size={batch}", expected[case], lines)
        assert wrong is None, f"{wrong}\n{REMAKE.format('trace')}"


@pytest.mark.some(1)
@pytest.mark.parametrize("group", lengths.GROUPS)
def test_lengths(group: str) -> None:
    expected = lengths.recorded()
    assert expected.keys() == {c for g in lengths.GROUPS.values() for c in g}
    found = dict(lengths.measured(lengths.GROUPS[group]))
    wrong = [
        f"{case}: {expected[case]} became {length}"
        for case, length in found.items()
        if abs(length / expected[case] - 1) > lengths.TOLERANCE
    ]
    assert not wrong, "\n".join([*wrong, REMAKE.format("lengths")])
