"""Today's behaviour, pinned: what every drafter drafts and what is kept of it, through settings
alone; see golden/trace.py and golden/lengths.py."""

from collections.abc import Iterator

import pytest

from tests.golden import lengths, trace

REMAKE = 'if this is meant: python -m tests.golden.{} --write "why it had to change"'


def replays() -> Iterator[object]:
    """Every case once, half of them prompt by prompt, half three prompts at a time; the other way
    round is slow."""
    for sampling in trace.SAMPLINGS:
        for batch in (1, 3):
            quick, slow = [], []
            for case in trace.CASES:
                if f"sampling={sampling}" in case:
                    single = ("tree=chain" in case) == (sampling == "greedy")
                    (quick if single == (batch == 1) else slow).append(case)
            name = f"{sampling}-{batch}"
            yield pytest.param(batch, quick, id=name)
            yield pytest.param(batch, slow, id=f"{name}-other", marks=pytest.mark.slow)


@pytest.mark.parametrize(("batch", "cases"), replays())
def test_trace(batch: int, cases: list[str]) -> None:
    expected = trace.recorded()
    assert expected.keys() == set(trace.CASES), REMAKE.format("trace")
    for case, _, lines in trace.replay(cases, batch):
        wrong = trace.difference(f"{case} batch_size={batch}", expected[case], lines)
        assert wrong is None, f"{wrong}\n{REMAKE.format('trace')}"


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
