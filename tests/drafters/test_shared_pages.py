"""Beginnings of prompts that are shared beside drafters which read states: drafts are the
restatement's, and all that is kept of every token is what a run keeps that shares nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.decode import Decoder
from specdec.drafters.along import AlongText
from specdec.drafters.compose import Compose
from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.eagle import Eagle1, Eagle3, PEagle
from specdec.drafters.growth import GrowingDrafter
from specdec.drafters.medusa import Medusa
from specdec.drafters.mtp import MTP
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.lab.build import shares_pages
from specdec.lab.settings import settings_of
from specdec.models.paged import PagedLM
from specdec.observation import Observes
from specdec.protocols import Drafter
from specdec.reasons import DraftError
from specdec.request import Decoding
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.heads import blocks, made, oracle
from tests.heads.mtp import mtp
from tests.heads.test_drafts import Eager, Watcher
from tests.models.tiny import texts, tiny

PAGE, NEW, ROUNDING = 4, 7, 1e-4
TREE = Static(widths=[2, 2, 1], children="sample")
# Of each kind: the tokens after a page on which it depends, and what restates it.
SUCCESSORS = {
    "eagle3": 1,
    "eagle": 1,
    "peagle": 1,
    "mtp": 1,
    "three layers": 3,
    "dflash": 1,
    "dspark": 1,
    "medusa": 1,
    "with ngram": 1,
    "two heads": 3,
}
RESTATED: dict[str, Callable[..., Tensor]] = {
    "eagle3": oracle.eagle3,
    "peagle": oracle.peagle,
    "three layers": oracle.mtp,
    "dflash": oracle.dflash,
}


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8))


def drafter_of(kind: str, folder: Path, target: PagedLM) -> tuple[Any, Any]:
    """A drafter with a head of its own files, and the facts of it."""
    model, path = target.model, str(folder)
    if kind == "with ngram":
        head, facts = drafter_of("eagle3", folder, target)
        return Compose(parts={"ngram": NGram(), "head": head}, mode="union"), facts
    if kind == "two heads":
        parts = {
            name: drafter_of(name, folder / name, target)[0] for name in ("dflash", "three layers")
        }
        return Compose(parts=parts, mode="union"), None
    make: dict[str, tuple[Any, Callable[..., Any]]] = {
        "eagle3": (Eagle3, made.eagle3),
        "eagle": (Eagle1, made.eagle),
        "peagle": (PEagle, partial(made.eagle3, layout="specforge", mask=5)),
        "mtp": (MTP, mtp),
        "three layers": (MTP, partial(mtp, layers=3)),
        "dflash": (DFlash, blocks.dflash),
        "dspark": (DSpark, partial(blocks.dflash, layout="deepspec", markov="vanilla")),
        "medusa": (Medusa, made.medusa),
    }
    drafter, write = make[kind]
    facts = write(folder, model)
    return drafter(path=path), facts


def prompts() -> list[list[int]]:
    """That begin alike, and leave each other inside a page, at its border and one token later;
    equal ones that end before a border, at it and after it; and very short ones."""
    first, second = texts()
    return [
        first[:13],
        [*first[:8], *second[:6]],
        [*first[:9], *second[:6]],
        second[:1],
        *[first[:13]] * 2,
        *[first[:14]] * 2,
        *[first[:15]] * 2,
        [*first[:8], *second[:6]],
        *[second[:3]] * 2,
        [*first[:6], *second[:9]],
    ]


def caches_of(drafter: Any) -> list[PagedKVCache]:
    parts = getattr(drafter, "parts", [drafter])
    models = [part.model for part in parts if hasattr(part, "model")]
    return [one.cache for model in models for one in getattr(model, "each", [model])]


def entries(cache: PagedKVCache, row: int) -> Tensor:
    """[T, ...] of all that a row has committed."""
    count = cache.committed(row)
    pages = cache.page_table[row, : cache.pages_for(count)].long()
    both = [pool[:, pages].transpose(2, 3).flatten(1, 2) for pool in (cache.keys, cache.values)]
    return torch.cat(both, dim=-1)[:, :count].transpose(0, 1)


@dataclass
class Seen:
    """What a decode has come to: by request its text, trees and, at its end, entries of each
    cache; and how many tokens of prompts the target has read."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    trees: dict[int, list[Any]] = field(default_factory=dict)
    held: dict[int, list[Tensor]] = field(default_factory=dict)
    read: int = 0


def reading(decoder: Decoder, seen: Seen) -> None:
    """Count what the target reads from now on."""
    model: Any = decoder.verifier.target  # type: ignore[attr-defined]
    read = model.read

    def counted(sequences: Any, tokens: int, **how: Any) -> Any:
        unread = model._unread
        seen.read += sum(len(unread.get(s.row, [])[:tokens]) for s in sequences)
        return read(sequences, tokens, **how)

    model.read = counted


def decoded(decoder: Decoder, prompts: Sequence[Sequence[int]], new: int = NEW) -> Seen:
    seen, finish = Seen(), decoder.drafter.finish
    reading(decoder, seen)

    def finishing(sequence: Any) -> None:
        caches = caches_of(decoder.drafter)
        for cache in caches:
            cache.check()
        seen.held[sequence.request.id] = [entries(cache, sequence.row) for cache in caches]
        finish(sequence)

    def stepped(step: Any) -> None:
        for tree in step.trees:
            seen.trees.setdefault(tree.request, []).append((tree.tokens, tree.parents))

    decoder.drafter.finish = finishing  # type: ignore[method-assign]
    for sequence in decoder.run(requests_of(prompts, new), on_step=stepped):
        seen.texts[sequence.request.id] = sequence.output_ids
    for cache in caches_of(decoder.drafter):
        assert cache.free_pages == cache.pages
    return seen


def decoder(
    target: PagedLM, drafter: Drafter, rows: int, *, share: bool, chunk: int = 5, **more: Any
) -> Decoder:
    settings: dict[str, Any] = {"page_size": PAGE, "temperature": 1.0, "trees": NEW, **more}
    made = decoder_of(target, drafter, TREE, Eager(), rows=rows, share=share, **settings)
    made.verifier._pace["chunk"] = chunk  # type: ignore[attr-defined]
    return made


def least(prompts: Sequence[Sequence[int]], page: int, successors: int) -> int:
    """Tokens that must be read if all prompts are there at once: each page once for each
    beginning, successors among it, and of each prompt what lies behind its last such page."""
    pages, rest = set(), 0
    for prompt in prompts:
        count = max(0, len(prompt) - 1 - successors) // page
        pages |= {tuple(prompt[: (i + 1) * page + successors]) for i in range(count)}
        rest += len(prompt) - 1 - count * page
    return len(pages) * page + rest


@pytest.mark.some(5)
@pytest.mark.parametrize("kind", SUCCESSORS)
def test_texts_trees_and_entries_are_those_of_prompts_read_whole(
    kind: str, target: PagedLM, tmp_path: Path
) -> None:
    """With rows for all, and for some, whose pages later prompts find while they run."""
    drafter, _ = drafter_of(kind, tmp_path, target)
    asked = prompts()
    apart = decoded(decoder(target, drafter, 4, share=False), asked)
    assert apart.read == sum(len(prompt) - 1 for prompt in asked)
    for rows in (4, len(asked)):
        shared = decoded(decoder(target, drafter, rows, share=True), asked)
        assert (shared.texts, shared.trees) == (apart.texts, apart.trees)
        for number, held in apart.held.items():
            for mine, theirs in zip(shared.held[number], held, strict=True):
                assert torch.allclose(mine, theirs, atol=ROUNDING, rtol=ROUNDING)
        assert shared.read < apart.read
    assert shared.read == least(asked, PAGE, SUCCESSORS[kind])


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", RESTATED)
def test_drafts_are_as_restated(kind: str, target: PagedLM, tmp_path: Path) -> None:
    drafter, facts = drafter_of(kind, tmp_path, target)
    made = decoder(target, drafter, 4, share=True)
    watcher = Watcher(made, target, facts, partial(RESTATED[kind], facts))
    long = [prompt for prompt in prompts() if len(prompt) > 2]
    seen = Seen()
    reading(made, seen)
    list(made.run(requests_of(long, 4)))
    assert seen.read < 0.6 * sum(map(len, long))
    assert watcher.worst < 1e-5
    assert watcher.nodes > 40


def sequences_of(prompts: Sequence[Sequence[int]]) -> list[Decoding]:
    """On their way into the caches, in rows of their own."""
    requests = requests_of(prompts, NEW)
    return [Decoding(request, request.id, list(request.prompt_ids)) for request in requests]


def taken_in(decoder: Decoder, *sequences: Decoding) -> None:
    intake = decoder._start([*sequences])
    while not intake.done:
        intake.read()


@pytest.mark.parametrize("kind", ["three layers", "two heads"])
@torch.inference_mode()
def test_no_more_is_found_than_target_and_head_have_both(
    kind: str, target: PagedLM, tmp_path: Path
) -> None:
    """Of a prompt that is being read further layers have less than the target, and of equal ones
    that read beside it they may have more."""
    drafter, _ = drafter_of(kind, tmp_path, target)
    one = decoder(target, drafter, 4, share=True, page_size=5)
    one.verifier._pace["beside"] = 1  # type: ignore[attr-defined]
    first, _ = texts()
    slow, fast, last, alone = sequences_of([first] * 4)
    begun = one._start([slow])
    begun.read(beside=True)
    assert (one.verifier.cache.shareable(first[:-1]), drafter.shareable(first[:-1])) == (5, 0)  # type: ignore[union-attr]
    for sequence, ahead, found in ((fast, [5, 0, 0], 0), (last, [5, 20, 20], 5)):
        assert [cache.shareable(first[:-1]) for cache in caches_of(drafter)[-3:]] == ahead
        taken_in(one, sequence)
        assert sequence.found == found
    while not begun.done:
        begun.read()
    whole = decoder(target, drafter_of(kind, tmp_path, target)[0], 4, share=False, page_size=5)
    taken_in(whole, alone)
    every = zip(caches_of(drafter), caches_of(whole.drafter), strict=True)
    for mine, theirs in [*every, (one.verifier.cache, whole.verifier.cache)]:
        assert mine is not None
        assert theirs is not None
        for sequence in (slow, fast, last):
            expected = entries(theirs, alone.row)
            assert torch.allclose(entries(mine, sequence.row), expected, atol=ROUNDING)
        mine.check()


@pytest.mark.parametrize(
    ("length", "waves"),
    [(PAGE + 1, [[0, 1, 2, 3]]), (PAGE + 2, [[0], [1, 2, 3]]), (2 * PAGE + 1, [[0], [1, 2, 3]])],
)
@torch.inference_mode()
def test_equal_prompts_wait_for_one_of_them_and_only_if_it_yields_a_page(
    length: int, waves: list[list[int]], target: PagedLM, tmp_path: Path
) -> None:
    drafter, _ = drafter_of("eagle3", tmp_path, target)
    one = decoder(target, drafter, 4, share=True)
    start, found = drafter.start, list[list[int]]()

    def starting(sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        found.append([sequence.row for sequence in sequences])
        taken: Sequence[Decoding] = start(sequences)
        return taken

    drafter.start = starting
    taken_in(one, *sequences_of([texts()[0][:length]] * 4))
    assert found == waves


def test_quantised_pages_are_shared_too(target: PagedLM, tmp_path: Path) -> None:
    """The head's are not quantised."""
    drafter, _ = drafter_of("eagle3", tmp_path, target)
    asked = prompts()
    apart, shared = (
        decoded(decoder(target, drafter, 4, share=share, kv_dtype=torch.int8), asked)
        for share in (False, True)
    )
    assert (shared.texts, shared.trees) == (apart.texts, apart.trees)
    assert shared.read < apart.read


def along(
    target: PagedLM, drafter: Any, texts: Sequence[Sequence[int]], *, share: bool
) -> tuple[dict[tuple[int, int], Tensor], int]:
    """What a head says along the texts that the target writes, by request and place; and how many
    tokens of prompts were read."""
    asked = [prompt for prompt in prompts() if len(prompt) > 2]
    watched = AlongText(loaded(drafter, target))
    watched.texts = dict(enumerate(texts))
    verifier, rows = TreeVerifier(target), len(asked)
    one = decoder_of(verifier, watched, Chain(budget=3), rows=rows, page_size=PAGE, share=share)
    said, seen, commit = dict[tuple[int, int], Tensor](), Seen(), watched.commit
    reading(one, seen)

    def committing(context: Any, *rest: Any) -> None:
        for place, sequence in enumerate(context.sequences):
            number = sequence.request.id
            said[number, watched.asked[number]] = watched.probs[place]
        commit(context, *rest)

    watched.commit = committing  # type: ignore[method-assign]
    assert outputs_of(one, asked, NEW) == texts
    assert watched.shareable(asked[0]) == 0  # nobody is there any more
    return said, seen.read


def test_a_head_that_is_asked_along_a_text_says_the_same(target: PagedLM, tmp_path: Path) -> None:
    asked = [prompt for prompt in prompts() if len(prompt) > 2]
    plain = outputs_of(decoder_of(target, NoDrafter(), rows=4), asked, NEW)
    drafter, _ = drafter_of("three layers", tmp_path, target)
    apart, _ = along(target, drafter, plain, share=False)
    shared, read = along(target, drafter, plain, share=True)
    assert read == least(asked, PAGE, 3)
    assert apart.keys() == shared.keys()
    assert all(torch.allclose(apart[key], shared[key], atol=1e-5) for key in apart)


class Whole(GrowingDrafter):
    """Of a user, who has never heard of shared pages."""

    reads_states = True

    def load(self, target: PagedLM, models: Any) -> None:
        self.observes = Observes(taps=(2,), prompts=True)


def test_who_fails_to_say_what_it_has_is_named(target: PagedLM) -> None:
    class Failing(NoDrafter):
        def shareable(self, prefix: Sequence[int]) -> int | None:
            raise IndexError("nothing there")

    with pytest.raises(DraftError, match="Failing failed on request 0: IndexError: nothing"):
        outputs_of(decoder_of(target, Failing()), [[5, 6]], 2)


def test_who_needs_states_of_whole_prompts_is_refused(target: PagedLM, tmp_path: Path) -> None:
    head, _ = drafter_of("eagle3", tmp_path, target)
    for drafter in (
        Whole(depth=None),
        Compose(parts={"a": head, "b": Whole(depth=None)}, mode="union"),
    ):
        assert decoder_of(target, drafter).capacity.share is False
        with pytest.raises(ValueError, match=r"^capacity\.share=True: the drafter reads states"):
            decoder_of(target, drafter, share=True)
    settings = settings_of("cache.share=true")
    assert shares_pages(settings_of("cache.share=true drafter=eagle3"))
    assert not shares_pages(settings_of("drafter=eagle3"))
    with pytest.raises(
        ValueError, match=r"^cache\.share=true: Whole reads .* use cache\.share=null$"
    ):
        shares_pages({**settings, "drafter": {"_target_": f"{__name__}.Whole"}})


BEGINNINGS = ([5, 9, 5, 5, 9, 9, 5, 9, 5, 5, 5, 9], [5, 9, 5, 5, 9, 9, 9, 9], [9, 9, 5])
PROMPTS = st.builds(
    lambda begin, count, rest: [*begin[:count], *rest] or [5],
    st.sampled_from(BEGINNINGS),
    st.integers(0, 12),
    st.lists(st.sampled_from([5, 9]), max_size=3),
)


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["eagle3", "three layers", "dflash"])
def test_what_is_kept_of_a_token_is_a_function_of_what_it_depends_on(
    kind: str, target: PagedLM, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whoever has read it, and whatever is read, decodes, waits or has ended beside it."""
    drafter = loaded(drafter_of(kind, tmp_path_factory.mktemp("head"), target)[0], target)
    known: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        asked=st.lists(st.tuples(PROMPTS, st.integers(1, 5)), min_size=2, max_size=7),
        rows=st.integers(1, 4),
        page=st.integers(1, 5),
        room=st.integers(0, 9) | st.none(),
        pace=st.tuples(st.integers(1, 7), st.just(1) | st.none()),
    )
    def check(asked: Any, rows: int, page: int, room: int | None, pace: Any) -> None:
        most = 24
        pages = None if room is None else -(-most // page) + room
        how = {"page_size": page, "pages": pages, "max_tokens": most}
        one = decoder(target, drafter, rows, share=True, **how)
        one.verifier._pace = dict(zip(("chunk", "beside"), pace, strict=True))  # type: ignore[attr-defined]
        finish, done = drafter.finish, set()

        def finishing(sequence: Any) -> None:
            for layer, cache in enumerate(caches_of(drafter)):
                cache.check()
                later = 1 if kind == "dflash" else layer + 2
                for place, entry in enumerate(entries(cache, sequence.row)):
                    key = layer, tuple(sequence.tokens[: place + later])
                    if len(sequence.tokens) < place + later:
                        continue  # of a token that was cut off
                    assert torch.allclose(entry, known.setdefault(key, entry), atol=ROUNDING)
            done.add(sequence.request.id)
            finish(sequence)

        drafter.finish = finishing
        try:
            requests = requests_of([prompt for prompt, _ in asked], 1)
            for request, (_, new) in zip(requests, asked, strict=True):
                object.__setattr__(request, "max_new_tokens", new)
            list(one.run(requests))
        finally:
            drafter.finish = finish
        assert len(done) == len(asked)
        for cache in [one.verifier.cache, *caches_of(drafter)]:
            assert cache is not None
            assert cache.free_pages == cache.pages

    check()
