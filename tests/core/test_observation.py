"""What a drafter is shown of the target: of prompts each token that is read, once and in order."""

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdec.drafters.growth import Expand
from specdec.drafters.none import NoDrafter
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.static import Static
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes
from specdec.protocols import StepContext
from specdec.reasons import DraftError
from specdec.request import Decoding
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.models.tiny import logits_of, own_attention, texts, tiny

PAGE_SIZE, CHUNK = 4, 5
COMMON = 13  # tokens that two prompts begin with: three pages, and one token more


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    first, second = texts()
    return [first, second[:17], [*first[:COMMON], *second[:6]]]


@pytest.fixture(scope="module")
def best(prompts: list[list[int]]) -> list[Tensor]:
    """[N, 4] the most probable tokens after each, by transformers' own attention."""
    own = own_attention(tiny("llama"))
    return [logits_of(own, prompt).topk(4).indices for prompt in prompts]


class Reader(NoDrafter):
    """Notes what it is shown."""

    observes = Observes(tokens=4, prompts=True)

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}  # by row
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)  # by request
        self.best: defaultdict[int, list[list[int]]] = defaultdict(list)

    def start(self, sequences: Sequence[Decoding]) -> None:
        self.ids |= {s.row: s.request.id for s in sequences}

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        assert seen.tokens is not None
        assert seen.tokens.shape == (*tokens.shape, 4)
        for i, row in enumerate(rows.tolist()):
            count = int(length[i])
            assert 1 <= count <= CHUNK
            self.tokens[self.ids[row]] += tokens[i, :count].tolist()
            self.best[self.ids[row]] += seen.tokens[i, :count].tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_every_token_of_a_prompt_that_is_read_is_shown_once_and_in_order(
    target: PagedLM, prompts: list[list[int]], best: list[Tensor], rows: int
) -> None:
    verifier, reader = TreeVerifier(target, prefill_chunk=CHUNK), Reader()
    decoder = decoder_of(verifier, reader, rows=rows, max_tokens=40, page_size=PAGE_SIZE)
    outputs_of(decoder, prompts, 3)
    # The last token of a prompt is the root of the first tree. Together, the third finds the pages
    # that it shares with the first.
    first = [0, 0, COMMON // PAGE_SIZE * PAGE_SIZE if rows == 3 else 0]
    for i, prompt in enumerate(prompts):
        assert reader.tokens[i] == prompt[first[i] : -1]
        assert reader.best[i] == best[i][first[i] : -1].tolist()


def test_prompts_are_shown_to_those_who_ask(target: PagedLM, prompts: list[list[int]]) -> None:
    reader = Reader()
    reader.observes = Observes(tokens=4)
    outputs_of(decoder_of(target, reader, rows=3), prompts, 3)
    assert not reader.tokens


def test_a_drafter_that_fails_at_a_prompt_is_named_with_it(
    target: PagedLM, prompts: list[list[int]]
) -> None:
    class Failing(Reader):
        def read(self, *_: object) -> None:
            raise IndexError("no such page")

    decoder = decoder_of(target, Failing(), rows=1)
    with pytest.raises(DraftError, match=r"Failing failed on request 0: IndexError: no such page"):
        list(decoder.run(requests_of(prompts, 3)))


class Looked(TokenRecycling):
    """Keeps the table as it was when the first tree was drafted."""

    table: Tensor | None = None

    def begin(self, context: StepContext) -> Expand:
        if self.table is None:
            self.table = self._table[:-1].view(-1, self.vocab_size, self.successors).clone()
        return super().begin(context)


@pytest.mark.parametrize("successors", [1, 4])
def test_token_recycling_learns_the_candidates_of_prompts_and_stays_lossless(
    target: PagedLM, prompts: list[list[int]], best: list[Tensor], successors: int
) -> None:
    tree = Static(widths=[3, 2, 1])
    expected = outputs_of(decoder_of(target, NoDrafter(), rows=3), prompts, 24)
    drafter = Looked(successors=successors, from_prompt=False, prompt_candidates=True)
    loaded(drafter, target)
    verifier = TreeVerifier(target, prefill_chunk=CHUNK)
    decoder = decoder_of(verifier, drafter, tree, rows=3, page_size=PAGE_SIZE)
    assert outputs_of(decoder, prompts, 24) == expected
    assert drafter.table is not None
    # Each row its own slot, in the order of the prompts. Of a token that stands in a prompt
    # several times the last place counts; of shared pages nothing is learnt.
    first = [0, 0, COMMON // PAGE_SIZE * PAGE_SIZE]
    for i, prompt in enumerate(prompts):
        known = {
            prompt[n]: best[i][n, :successors].tolist() for n in range(first[i], len(prompt) - 1)
        }
        table = drafter.table[i]
        assert {t: table[t].tolist() for t in known} == known
        others = [token for token in range(target.vocab_size) if token not in known]
        assert (table[torch.tensor(others)] < 0).all()
