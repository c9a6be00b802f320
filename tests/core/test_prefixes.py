"""Prompts that are read once for decoders that take turns: who reads what, and that nothing else
changes."""

from collections.abc import Callable

import pytest
import torch

from specdec.decode import Decoder
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.own_cache import OwnCache
from specdec.drafters.trees.chain import Chain
from specdec.models.paged import PagedLM
from specdec.prefixes import Prefixes
from specdec.protocols import Drafter
from specdec.request import Capacity
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded, outputs_of
from tests.models.tiny import VOCABULARY, tiny

PAGE, NEW, ROWS, MOST = 8, 12, 3, 64
CAPACITY = Capacity(rows=ROWS, max_tokens=MOST, page_size=PAGE)
LENGTHS = (30, 5, 41)
DRAFTERS: list[Callable[[], Drafter]] = [NoDrafter, NGram, lambda: OwnCache(sink=8, window=8)]


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama").double())


def prompts() -> list[list[int]]:
    """The last begins like the first."""
    found = [
        [(7 * i + 13 * salt * i * i + salt) % (VOCABULARY - 3) + 3 for i in range(length)]
        for salt, length in enumerate(LENGTHS)
    ]
    found[2][:20] = found[0][:20]
    return found


def decoder(target: PagedLM, drafter: Drafter, prefixes: Prefixes | None) -> Decoder:
    tree = Chain(budget=0 if isinstance(drafter, NoDrafter) else 3)
    loaded(drafter, target)
    verifier = TreeVerifier(target, prefixes=prefixes)
    return decoder_of(verifier, drafter, tree, rows=ROWS, max_tokens=MOST, page_size=PAGE)


def reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the prompts that are read from now on."""
    seen: list[int] = []
    prefill = PagedLM.prefill

    def read(self, cache, rows, tokens, **how):  # type: ignore[no-untyped-def]
        seen.extend(map(len, tokens))
        prefill(self, cache, rows, tokens, **how)

    monkeypatch.setattr(PagedLM, "prefill", read)
    return seen


def test_full_pages_are_read_once_and_the_rest_by_each(
    target: PagedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [outputs_of(decoder(target, made(), None), prompts(), NEW) for made in DRAFTERS]
    prefixes = Prefixes(target, CAPACITY)
    decoders = [decoder(target, made(), prefixes) for made in DRAFTERS]
    assert {id(one.verifier.cache) for one in decoders} == {id(prefixes.cache)}
    seen = reading(monkeypatch)
    full = [(length - 1) // PAGE * PAGE for length in LENGTHS]
    common = 20 // PAGE * PAGE
    for _ in range(2):  # the same again, once it was given up
        assert prefixes.hold(prompts()) == sum(full) - common
        assert seen == [full[0], full[2] - common]
        for one, wanted in zip(decoders, alone, strict=True):
            seen.clear()
            assert outputs_of(one, prompts(), NEW) == wanted
            rest = [length - 1 - held for length, held in zip(LENGTHS, full, strict=True)]
            assert sorted(seen) == sorted(filter(None, rest))
            prefixes.settle()
            prefixes.cache.check()
        prefixes.release()
        seen.clear()
        assert prefixes.cache.free_pages == prefixes.cache.pages


def test_what_a_decoder_leaves_open_is_closed_and_what_is_held_stays(target: PagedLM) -> None:
    prefixes = Prefixes(target, CAPACITY)
    broken, whole = (decoder(target, NoDrafter(), prefixes) for _ in range(2))
    prefixes.hold(prompts())
    held = prefixes.cache.free_pages
    running = broken.run([])
    assert list(running) == []
    prefixes.cache.open(1, tokens=MOST)  # as if it had failed in the middle
    prefixes.settle()
    assert prefixes.cache.free_pages == held
    wanted = outputs_of(decoder(target, NoDrafter(), None), prompts(), NEW)
    assert outputs_of(whole, prompts(), NEW) == wanted


@pytest.mark.parametrize("pages", [8, 10, 13, 14, 24])
def test_prompts_are_held_as_far_as_there_is_room_to_decode(target: PagedLM, pages: int) -> None:
    """Whatever is held, every sequence fits beside it."""
    capacity = Capacity(rows=ROWS, max_tokens=MOST, page_size=PAGE, pages=pages)
    prefixes = Prefixes(target, capacity)
    prefixes.hold(prompts())
    for prompt in prompts():
        missing = capacity.pages_of_a_row - prefixes.cache.shareable(prompt[:-1]) // PAGE
        assert missing <= prefixes.cache.free_pages
    verifier = TreeVerifier(target, prefixes=prefixes)
    one = decoder_of(
        verifier, NoDrafter(), rows=ROWS, max_tokens=MOST, page_size=PAGE, pages=pages
    )
    assert verifier.cache is prefixes.cache
    assert outputs_of(one, prompts(), NEW) == outputs_of(
        decoder(target, NoDrafter(), None), prompts(), NEW
    )


def test_decoders_of_another_capacity_have_their_own_cache(target: PagedLM) -> None:
    prefixes = Prefixes(target, CAPACITY)
    verifier = TreeVerifier(target, prefixes=prefixes)
    decoder_of(verifier, NoDrafter(), rows=ROWS, max_tokens=MOST - 1, page_size=PAGE)
    assert verifier.cache is not prefixes.cache


def test_decoders_that_share_no_pages_are_refused(target: PagedLM) -> None:
    with pytest.raises(ValueError, match=r"capacity\.share=False"):
        Prefixes(target, Capacity(rows=1, max_tokens=8, share=False))
    assert target.dtype == torch.float64


def test_all_prompts_of_a_full_batch_are_held(target: PagedLM) -> None:
    """The last one too, for which nothing but the ends of sequences has room."""
    long = [[(11 * i + salt) % 80 + 3 for i in range(MOST - 3)] for salt in range(ROWS)]
    prefixes = Prefixes(target, CAPACITY)
    assert prefixes.hold(long) == ROWS * ((MOST - 4) // PAGE * PAGE)
    alone = outputs_of(decoder(target, NoDrafter(), None), long, 3)
    assert outputs_of(decoder(target, NoDrafter(), prefixes), long, 3) == alone
