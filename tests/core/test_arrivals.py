"""Prompts that are read beside rows that decode: what comes out is the same, nobody waits
long, and no row is lost."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import cached_model
from specdec.decode import Decoder
from specdec.drafters.compose import Compose
from specdec.drafters.eagle import Eagle3
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.chain import Chain
from specdec.flight import Step
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.prefixes import Prefixes
from specdec.protocols import Drafter
from specdec.request import Capacity, Request
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded
from tests.models.tiny import VOCABULARY, tiny

LONG, ALLOWED = 90, 12


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama").double())


@pytest.fixture(autouse=True)
def allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_model, "AT_ONCE", ALLOWED)


def prompt(length: int, salt: int) -> list[int]:
    return [(7 * i + 13 * salt * i * i + salt) % (VOCABULARY - 3) + 3 for i in range(length)]


def decoder(
    target: PagedLM, drafter: Drafter, *, rows: int, chunk: int, beside: int | None
) -> Decoder:
    verifier = TreeVerifier(target, prefill_chunk=chunk, prefill_beside=beside)
    loaded(drafter, target)
    tree = Chain(budget=0 if isinstance(drafter, NoDrafter) else 3)
    return decoder_of(verifier, drafter, tree, rows=rows, max_tokens=128, page_size=16)


def requests(lengths: list[int], new: list[int]) -> list[Request]:
    return [
        Request(id=i, prompt_ids=prompt(length, i), max_new_tokens=count)
        for i, (length, count) in enumerate(zip(lengths, new, strict=True))
    ]


def outputs(
    one: Decoder, asked: list[Request], steps: list[Step] | None = None
) -> list[list[int]]:
    done = {
        s.request.id: s.output_ids
        for s in one.run(asked, on_step=None if steps is None else steps.append)
    }
    one.verifier.cache.check()  # type: ignore[union-attr]
    return [done[request.id] for request in asked]


@pytest.mark.parametrize("drafter", [NoDrafter, NGram, TokenRecycling], ids=lambda d: d.__name__)
@settings(max_examples=3, deadline=None)
@given(
    chunk=st.integers(1, 40),
    beside=st.integers(1, 40),
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, LONG), min_size=3, max_size=5),
    data=st.data(),
)
def test_outputs_are_those_of_prompts_read_whole(
    target: PagedLM,
    drafter: type[Drafter],
    chunk: int,
    beside: int,
    rows: int,
    lengths: list[int],
    data: st.DataObject,
) -> None:
    """Whatever the sizes; in float64, where rounding decides nothing."""
    new = [data.draw(st.integers(1, 20)) for _ in lengths]
    asked = requests(lengths, new)
    made: dict[str, Drafter] = {"whole": drafter(), "beside": drafter()}
    whole = decoder(target, made["whole"], rows=rows, chunk=64, beside=None)
    apart = decoder(target, made["beside"], rows=rows, chunk=chunk, beside=beside)
    assert outputs(apart, asked) == outputs(whole, asked)


def passes_of(model: PagedLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass of a model over prompts from now on; -1 stands for a step."""
    seen: list[int] = []
    prefill, verify = PagedLM.prefill, TreeVerifier.verify

    def read(self, cache, rows, tokens, **how):  # type: ignore[no-untyped-def]
        if self is model and any(tokens):
            seen.append(sum(map(len, tokens)))
        prefill(self, cache, rows, tokens, **how)

    def stepped(self, *what):  # type: ignore[no-untyped-def]
        seen.append(-1)
        return verify(self, *what)

    monkeypatch.setattr(PagedLM, "prefill", read)
    monkeypatch.setattr(TreeVerifier, "verify", stepped)
    return seen


@pytest.mark.parametrize(("chunk", "beside"), [(8, 2), (8, 4), (5, 5), (4, 8)])
def test_rows_that_decode_wait_for_a_pass_now_and_then(
    target: PagedLM, monkeypatch: pytest.MonkeyPatch, chunk: int, beside: int
) -> None:
    seen = passes_of(target, monkeypatch)
    one = decoder(target, NoDrafter(), rows=2, chunk=chunk, beside=beside)
    outputs(one, requests([6, 6, LONG], [1, 80, 4]))
    first = seen.index(-1)
    later = seen[first:]
    read, steps = 0, 0
    for before, now in pairwise(later):
        assert now == -1 or before == -1  # never two passes without a step between them
        if now == -1:
            steps += 1
            continue
        assert now <= chunk
        assert read < ALLOWED + beside * (steps + 1)  # the next one was due
        read += now
    assert read == LONG - 1
    # It joins as soon as its rate allows: not one step later than that takes.
    least = (LONG - 1 - ALLOWED) // max(beside, chunk)
    most = (LONG - 1) // min(beside, chunk) + (LONG - 1) // chunk + 3
    end = max(i for i, tokens in enumerate(later) if tokens > 0)
    assert least <= later[:end].count(-1) <= most


def test_a_short_prompt_overtakes_a_long_one(target: PagedLM) -> None:
    one = decoder(target, NoDrafter(), rows=3, chunk=4, beside=1)
    steps: list[Step] = []
    asked = requests([6, 6, 6, LONG, 6], [2, 60, 4, 4, 4])
    outputs(one, asked, steps)
    began = {i: next(n for n, s in enumerate(steps) if i in s.requests) for i in range(5)}
    assert began[4] < began[3]
    assert all(1 in step.requests for step in steps[: began[3]])  # it has never waited for them


def test_prompts_are_read_whole_where_nothing_decodes(
    target: PagedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes_of(target, monkeypatch)
    one = decoder(target, NoDrafter(), rows=2, chunk=16, beside=1)
    outputs(one, requests([LONG, LONG // 2], [4, 4]))
    assert sum(seen[: seen.index(-1)]) == LONG - 1 + LONG // 2 - 1
    assert -1 in seen
    assert max(seen[seen.index(-1) :]) == -1


def test_a_run_that_is_given_up_goes_on_where_it_was(target: PagedLM) -> None:
    asked = requests([6, 6, LONG, 8], [2, 40, 6, 6])
    whole = outputs(decoder(target, NoDrafter(), rows=2, chunk=64, beside=None), asked)
    one = decoder(target, NoDrafter(), rows=2, chunk=4, beside=1)
    running: Iterator[object] = one.run(asked)
    first = next(running)
    del running  # while the long prompt is being read
    done = {first.request.id: first.output_ids}  # type: ignore[attr-defined]
    done |= {s.request.id: s.output_ids for s in one.run()}
    assert [done[i] for i in range(len(asked))] == whole
    one.verifier.cache.check()  # type: ignore[union-attr]


def test_rows_come_back_when_a_prompt_finds_no_room(target: PagedLM) -> None:
    verifier = TreeVerifier(target, prefill_chunk=4, prefill_beside=2)
    one = decoder_of(
        verifier, NoDrafter(), rows=3, max_tokens=112, page_size=16, pages=8, share=False
    )
    asked = requests([6, LONG, 20, 6], [30, 8, 8, 8])
    whole = outputs(decoder(target, NoDrafter(), rows=3, chunk=64, beside=None), asked)
    assert outputs(one, asked) == whole
    again: list[Step] = []
    outputs(one, requests([6, 6, 6], [4, 4, 4]), again)
    assert [sorted(step.requests) for step in again] == [[0, 1, 2]] * 4


@pytest.mark.parametrize("name", ["chunk", "beside"])
def test_sizes_below_one_are_refused(target: PagedLM, name: str) -> None:
    with pytest.raises(ValueError, match=rf"cache\.prefill_{name}=0: must be at least 1"):
        TreeVerifier(target, **{f"prefill_{name}": 0})  # type: ignore[arg-type]


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["compose", "eagle3", "small_llama"])
def test_drafts_of_models_are_those_of_prompts_read_whole(kind: str) -> None:
    """Heads read the target's states of a prompt as it comes, and models the prompt itself, while
    they draft for other rows."""
    made: dict[str, Callable[[], Drafter]] = {
        "eagle3": lambda: Eagle3(path="zoo:eagle3"),
        "small_llama": lambda: SmallLlama(path="zoo:draft"),
        "compose": lambda: Compose(
            parts={"model": SmallLlama(path="zoo:draft"), "text": NGram()}, mode="union"
        ),
    }
    target = load_model("zoo:target", Placement(dtype=torch.float64))
    texts = ["Name three colours.", "def fibonacci(n):\n    " * 6, "It was a dark night, and"]
    asked = [
        Request(id=i, prompt_ids=target.tokenizer(text).input_ids, max_new_tokens=new)
        for i, (text, new) in enumerate(zip(texts, (40, 12, 4), strict=True))
    ]
    asked = [asked[2], asked[0], asked[1]]
    kept = []
    for chunk, beside in ((64, None), (5, 2)):
        verifier = TreeVerifier(target, prefill_chunk=chunk, prefill_beside=beside)
        drafter = loaded(made[kind](), target)
        one = decoder_of(verifier, drafter, Chain(budget=3), rows=2, max_tokens=160)
        done = {s.request.id: (s.output_ids, s.accepted_lengths) for s in one.run(asked)}
        kept.append([done[request.id] for request in asked])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("held", [False, True], ids=["read", "held"])
def test_no_pass_of_a_draft_model_is_longer_than_the_targets(
    monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Nor are there two without a step between them: not even where the target finds the prompt
    in pages that are held, and has nothing to read itself."""
    target, chunk, beside = load_model("zoo:target"), 8, 4
    asked = requests([6, 6, LONG], [1, 110, 4])
    model = SmallLlama(path="zoo:draft")
    drafter: Drafter = model
    if held:
        drafter = Compose(parts={"model": model, "text": NGram()}, mode="union")
    loaded(drafter, target)
    capacity = Capacity(rows=2, max_tokens=128)
    prefixes = Prefixes(target, capacity)
    if held:
        prefixes.hold([asked[2].prompt_ids])
    verifier = TreeVerifier(
        target, prefill_chunk=chunk, prefill_beside=beside, prefixes=prefixes if held else None
    )
    one = decoder_of(verifier, drafter, Chain(budget=3), rows=2, max_tokens=128)
    seen = passes_of(model.lm, monkeypatch)
    outputs(one, asked)
    later = seen[seen.index(-1) :]
    passes = [tokens for tokens in later if tokens > 0]
    assert sum(passes) == LONG - 1
    assert max(passes) <= chunk
    assert all(-1 in pair for pair in pairwise(later))
