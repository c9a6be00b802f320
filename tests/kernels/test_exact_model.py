"""Exact mode from the first embedding to the logits, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.drafters.eagle import Eagle1, Eagle3
from specdec.kernels.choose import Kernels
from specdec.models.paged import PagedLM
from specdec.models.quantised import quantise_layer
from tests.decoding import loaded
from tests.drafters.test_shared_pages import decoded, decoder, drafter_of
from tests.heads import made
from tests.kernels.memory import DEVICE
from tests.models.tiny import VOCABULARY, texts, tiny

EXACT = Kernels(impl="triton", exact=True)
TEXT = [3 * i % 89 + 1 for i in range(26)]
COMMITTED = 22
#       0 - 2 - 3 - 5     is the text, 1 and 4 are others
PARENTS = [-1, 0, 0, 2, 0, 3]
PATH = [0, 2, 3, 5]


def ready(lm: PagedLM, committed: int) -> object:
    cache = lm.new_cache(rows=2, pages=8, page_size=16, max_tokens=40)
    for row in range(2):
        cache.open(row, tokens=40)
    lm.prefill(cache, [0, 1], [TEXT[:committed], TEXT[5:committed]], chunk=16)
    return cache


@pytest.mark.slow
@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("family", ["llama", "qwen3", "llama in fp8"])
def test_logits_of_a_token_alone_and_in_a_tree_have_equal_bits(family: str) -> None:
    model = tiny(family.split()[0]).to(DEVICE)
    if "fp8" in family:
        for layer in model.model.layers:
            quantise_layer(layer)
    lm = PagedLM(model, kernels=EXACT)
    alone: list[Tensor] = []
    cache = ready(lm, COMMITTED)
    for token in TEXT[COMMITTED:]:
        given = torch.tensor([[token]], device=DEVICE)
        one = torch.ones(1, dtype=torch.int64, device=DEVICE)
        alone.append(lm.append(cache, torch.zeros_like(one), given, one)[0])  # type: ignore[arg-type]
    cache = ready(lm, COMMITTED)
    parents = torch.tensor([PARENTS, [-1, 0, 1, 2, 3, 4]], dtype=torch.int32, device=DEVICE)
    structure = lm.kernels.on(lm.device).tree_structure(parents)
    tokens = torch.arange(12, device=DEVICE).view(2, 6)
    tokens[0, PATH] = torch.tensor(TEXT[COMMITTED:], device=DEVICE)
    logits = lm.forward(cache, [0, 1], tokens, structure.depths, ancestors=structure.ancestors)  # type: ignore[arg-type]
    assert logits is not None
    assert logits.shape == (2, 6, VOCABULARY)
    for node, wanted in zip(PATH, alone, strict=True):
        assert torch.equal(logits[0, node], wanted)


@pytest.mark.usefixtures("ordered_products")
def test_heads_join_what_they_read_row_by_row(tmp_path: Path) -> None:
    """Torch rounds one row otherwise than forty."""
    target = PagedLM(tiny("llama").to(DEVICE), kernels=EXACT)
    x = torch.randn(40, 4 * made.D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    embedded, states = x.split([made.D, 3 * made.D], dim=1)
    made.eagle3(three := tmp_path / "3", target.model)
    head = loaded(Eagle3(path=str(three), taps=[1, 2, 3]), target).head
    assert torch.equal(head.fuse(states[:1]), head.fuse(states)[:1])
    made.eagle(one := tmp_path / "1", target.model)
    head = loaded(Eagle1(path=str(one)), target).head
    parts = embedded, states[:, : made.D]
    alone = head.enter(0, *(part[:1] for part in parts))
    for mine, among in zip(alone, head.enter(0, *parts), strict=True):
        assert torch.equal(mine, among[:1])


def test_models_of_the_general_way_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.exact=true: model is a Gemma2ForCausalLM, .*"):
        PagedLM(tiny("gemma2").to(DEVICE), kernels=EXACT)


def test_caches_of_the_other_setting_are_refused() -> None:
    exact, other = (
        PagedLM(tiny("llama").to(DEVICE), kernels=kernels)
        for kernels in (EXACT, Kernels(impl="triton"))
    )
    for mine, theirs in ((exact, other), (other, exact)):
        cache = theirs.new_cache(rows=1, pages=2, page_size=16, max_tokens=20)
        with pytest.raises(ValueError, match=r"kernels\.exact=.*: model was given a cache"):
            mine.prefill(cache, [0], [[1, 2]])


@pytest.mark.slow
@pytest.mark.usefixtures("ordered_products")
def test_entries_of_a_head_have_equal_bits_where_pages_are_shared(tmp_path: Path) -> None:
    exact = PagedLM(tiny("llama", num_hidden_layers=2).to(DEVICE), kernels=EXACT)
    drafter, _ = drafter_of("three layers", tmp_path, exact)
    first, second = texts()
    asked = [[*first, *second[:8]], [*first[:21], *second[:3]]]
    apart, shared = (
        decoded(decoder(exact, drafter, 2, share=share, page_size=16, chunk=20), asked, 1)
        for share in (False, True)
    )
    assert (apart.read - shared.read, shared.texts, shared.trees) == (16, apart.texts, apart.trees)
    for number, held in apart.held.items():
        for mine, theirs in zip(shared.held[number], held, strict=True):
            assert torch.equal(mine, theirs)
