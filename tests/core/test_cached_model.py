"""Taking sequences in, when the drafter takes fewer of them than the verifier has room for."""

from collections.abc import Sequence

import pytest
from torch import Tensor

from specdec.cached_model import Reading
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes
from specdec.request import Capacity, Decoding, Request
from specdec.verifier.verifier import TreeVerifier
from tests.models.tiny import texts, tiny

NEW, PAGE_SIZE = 8, 4


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama"))


def sequences() -> list[Decoding]:
    """Four, of which the last two begin like the first two, so that they wait for their pages."""
    first, second = texts()
    prompts = [first, second, [*first[:13], *second[:4]], [*second[:9], *first[:4]]]
    requests = [Request(id=i, prompt_ids=p, max_new_tokens=NEW) for i, p in enumerate(prompts)]
    return [Decoding(r, r.id, list(r.prompt_ids)) for r in requests]


def whole(reading: Reading) -> list[Decoding]:
    """All that it takes."""
    found: list[Decoding] = []
    while not reading.done:
        found += reading.read()
    return sorted(found, key=lambda sequence: sequence.request.id)


def at_once(sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding]:
    """A drafter that reads no prompts,"""
    return sequences


def whatever(prefix: Sequence[int]) -> None:
    """and has no pages of its own."""


@pytest.mark.parametrize("most", range(5))
def test_rows_that_the_drafter_does_not_take_are_given_back(target: PagedLM, most: int) -> None:
    verifier = TreeVerifier(target, prefill_chunk=5)
    verifier.prepare(Capacity(rows=4, max_tokens=40, page_size=PAGE_SIZE), Observes(prompts=True))
    cache, asked = verifier.cache, sequences()
    taken: list[Decoding] = []
    read: set[int] = set()

    def join(wave: list[Decoding]) -> Sequence[Decoding]:
        assert all(cache.allocated(s.row) for s in wave)  # there is room for them, but
        assert not any(cache.committed(s.row) % PAGE_SIZE for s in wave)  # nothing is read yet
        part = wave[: most - len(taken)]
        taken.extend(part)
        return part

    def see(rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        read.update(rows.tolist())

    started = whole(verifier.start(asked, join, see, at_once, whatever))
    assert started == taken == asked[:most]
    assert read == {s.row for s in started}
    cache.check()
    for s in started:
        assert cache.committed(s.row) == len(s.tokens) - 1
    most = len(asked)
    # The rows of the others are free.
    started += whole(verifier.start(asked[len(started) :], join, see, at_once, whatever))
    assert started == asked
    cache.check()
    for s in asked:
        verifier.finish(s)
    cache.check()
    assert cache.free_pages == cache.pages


@pytest.mark.parametrize("kept", [[1], [0, 1], [0], []], ids=str)
def test_a_drafter_may_take_a_later_one_without_the_one_before(
    target: PagedLM, kept: list[int]
) -> None:
    """A draft has prompts in tokens of its own, of which others may begin alike and wait, and then
    there is room for a shorter one."""
    verifier = TreeVerifier(target, prefill_chunk=5)
    verifier.prepare(Capacity(rows=4, max_tokens=40, page_size=PAGE_SIZE), Observes())
    cache, asked = verifier.cache, sequences()[:2]
    part = [asked[i] for i in kept]
    started = whole(verifier.start(asked, lambda wave: part, lambda *_: None, at_once, whatever))
    assert started == part
    for sequence in part:
        assert cache.committed(sequence.row) == len(sequence.tokens) - 1
    cache.check()
    for sequence in part:
        verifier.finish(sequence)
    assert cache.free_pages == cache.pages
