"""Hidden states on the way through a target: those that transformers shows, at every token of a
prompt and at every node that a rule keeps, and none that nobody asks for."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.drafters.trees.static import Static
from specdec.models.paged import PagedLM
from specdec.models.states import States
from specdec.observation import Observation, Observes, Tap
from specdec.protocols import StepContext
from specdec.request import Decoding
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.synthetic import Synthetic
from tests.decoding import decoder_of, requests_of
from tests.models.tiny import HEADS, MIXED, VOCABULARY, own_attention, texts, tiny

CHUNK, NEW = 7, 12
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma3_text": HEADS | MIXED | {"query_pre_attn_scalar": 8},
    "gpt_oss": HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


class Noting(GrowingDrafter):
    """Drafts what it likes, and notes the states that it is shown, token by token."""

    def __init__(self, taps: Sequence[Tap], *, prompts: bool = True) -> None:
        super().__init__()
        self.observes = Observes(taps=tuple(taps), prompts=prompts)
        self.ids: dict[int, int] = {}  # by row
        self.states: defaultdict[int, list[dict[Tap, Tensor]]] = defaultdict(list)  # by request

    def start(self, sequences: Sequence[Decoding]) -> None:
        self.ids |= {s.row: s.request.id for s in sequences}

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        for place, row in enumerate(rows.tolist()):
            self._note(row, seen, place, range(int(length[place])))

    def begin(self, context: StepContext) -> Expand:
        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            ids = (frontier.tokens[..., None] * 5 + torch.arange(1, 4)) % VOCABULARY
            return ids, torch.full(ids.shape, 0.3, dtype=torch.float64)

        return expand

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        self.made = tree
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        for place, row in enumerate(context.rows.tolist()):
            kept = acceptance.path[place, : int(acceptance.length[place])]
            self._note(row, seen, place, kept.tolist())

    def _note(self, row: int, seen: Observation, place: int, nodes: Sequence[int]) -> None:
        found = self.states[self.ids[row]]
        found += [{tap: x[place, node] for tap, x in seen.states.items()} for node in nodes]


def wanted(model: Any, tokens: list[int]) -> dict[Tap, Tensor]:
    """By transformers, with its own attention and no cache."""
    with torch.no_grad():
        out = model.base_model(torch.tensor([tokens]), output_hidden_states=True)
    *states, normal = (x[0] for x in out.hidden_states)
    return {**dict(enumerate(states)), "normal": normal}


@pytest.mark.some(4)
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("kind", FAMILIES)
def test_states_are_those_of_transformers(kind: str, rows: int) -> None:
    model = tiny(kind, **FAMILIES[kind])
    own, target = own_attention(model), PagedLM(model)
    taps = [*range(target.layers), "normal"]
    drafter = Noting(taps)
    how: dict[str, Any] = {"rows": rows, "share": False, "chunk": CHUNK}
    decoder = decoder_of(target, drafter, Static(widths=[3, 2, 1]), Synthetic(), **how)
    first, second = texts()
    prompts = [first, first[:9], second[:1]]
    for sequence in decoder.run(requests_of(prompts, NEW)):
        found = drafter.states[sequence.request.id]
        known = sequence.tokens[: len(found)]
        assert len(sequence.tokens) - 1 <= len(found)
        assert max(sequence.accepted_lengths) > 1
        for tap, states in wanted(own, known).items():
            mine = torch.stack([one[tap] for one in found[: len(known)]])
            off = (mine - states).norm(dim=-1) / states.norm(dim=-1)
            assert off.max() <= 2e-5, tap


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_the_state_before_the_final_norm_is_there_too(kind: str) -> None:
    target = PagedLM(tiny(kind, **FAMILIES[kind]))
    cache = target.new_cache(rows=1, pages=4, page_size=16, max_tokens=64)
    cache.open(0, tokens=32)
    states = States([target.layers, "normal"])
    tokens = torch.tensor([texts()[0][:8]])
    target.forward(cache, [0], tokens, torch.arange(8)[None], states=states)
    normed = target.model.base_model.norm(states.found[target.layers])
    assert torch.allclose(normed, states.found["normal"], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_nothing_is_kept_that_nobody_asks_for(kind: str) -> None:
    target = PagedLM(tiny(kind, **FAMILIES[kind]))
    drafter = Noting([])
    decoder = decoder_of(target, drafter, Static(widths=[3]), rows=1)
    assert [len(s.output_ids) for s in decoder.run(requests_of([texts()[0][:5]], 4))] == [4]
    assert not any(one for found in drafter.states.values() for one in found)
    assert not target.model.base_model._forward_hooks


def test_taps_a_model_does_not_have_are_refused() -> None:
    target = PagedLM(tiny("llama"))
    target.check_taps([0, target.layers, "normal"], "drafter.taps")
    with pytest.raises(
        ValueError, match=r"^drafter.taps: reads the state after layer 9, and model"
    ):
        target.check_taps([1, 9], "drafter.taps")
