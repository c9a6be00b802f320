"""drafter=own_cache: views hold the pages they should, drafts over them are what transformers
computes of the same keys, and outputs stay what they were."""

import inspect

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from specdec.drafters.none import NoDrafter
from specdec.drafters.own_cache import OwnCache
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.kernels.choose import Kernels
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.protocols import TreePolicy
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.core.cache_life import new_cache
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.models.tiny import VOCABULARY, own_attention, tiny

TEXTS = (
    "def fibonacci(n):\n    " * 6,
    "It was a dark night, and the old captain stood at the",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(" * 2,
)
NEW = 24
ROUNDING = 1e-5  # rotary angles are float32; a key too many or too few changes logits by 1e-3


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target", Placement(dtype=torch.float32))


@pytest.fixture(scope="module")
def prompts(target: PagedLM) -> list[list[int]]:
    return [target.tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize(("sink", "window"), [(0, 3), (1, 0), (4, 4), (5, 9), (0, 1), (20, 2)])
def test_a_view_holds_the_pages_of_its_tokens_and_no_others(sink: int, window: int) -> None:
    """Against every token one by one, at every length."""
    cache = new_cache(rows=2, pages=20, max_tokens=28)
    size, rows = cache.page_size, torch.tensor([0, 1])
    for row in rows.tolist():
        cache.open(row, tokens=28)
    for length in range(29):
        cache.lengths[0], cache.lengths[1] = length, 28 - length
        view = cache.view(rows, sink=sink, window=window)
        for row, own in enumerate((length, 28 - length)):
            wanted = {
                token // size for token in range(own) if token < sink or token >= own - window
            } | ({own // size} if own % size else set())
            pages = [int(cache.page_table[row, place]) for place in sorted(wanted)]
            seen = -(-int(view.lengths[row]) // size)
            assert view.page_table[row, :seen].tolist() == pages
            assert int(view.lengths[row]) + int(view.left_out[row]) == own
            assert int(view.lengths[row]) <= view.most
            assert int(view.left_out[row]) % size == 0


def test_making_a_view_waits_for_nothing() -> None:
    with FakeTensorMode():
        cache = new_cache(rows=3, pages=20, max_tokens=28)
        view = cache.view(torch.zeros(3, dtype=torch.int64), sink=4, window=5)
        assert view.page_table.shape == (3, 2 + 3)


def drafted(lm: PagedLM, tokens: list[int], chain: list[int], sink: int, window: int) -> Tensor:
    """Logits of a chain after these tokens, over a view of them, in the second of two rows."""
    cache = lm.new_cache(rows=2, pages=24, page_size=16, max_tokens=128)
    for row in range(2):
        cache.open(row, tokens=128)
    lm.prefill(cache, [0, 1], [tokens[:5], tokens])
    rows = torch.tensor([1], device=lm.device)
    view = cache.view(rows, sink=sink, window=window)
    given = torch.tensor([chain], device=lm.device)
    offsets = torch.arange(len(chain), device=lm.device)[None]
    logits = lm.forward(cache, rows, given, offsets, view=view)
    assert logits is not None
    return logits[0]


@pytest.mark.parametrize("family", ["llama", "granite"])  # the direct way, and the general one
@pytest.mark.parametrize("length", [80, 75])
def test_a_draft_is_what_transformers_makes_of_the_keys_in_the_view(
    family: str, length: int
) -> None:
    model = tiny(family).double()
    own = own_attention(model)
    tokens = [7 * i % (VOCABULARY - 3) + 3 for i in range(length)]
    chain, sink, window = [5, 9, 11], 16, 20
    ours = drafted(PagedLM(model), tokens, chain, sink, window)
    first = (length - window) // 16 * 16  # the page in which the window begins
    kept = torch.tensor([*range(sink), *range(first, length)])
    past = DynamicCache()
    known = inspect.signature(own.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # as transformers called it before
    with torch.no_grad():
        own(torch.tensor([tokens]), **{name: past})
        for layer in past.layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        positions = torch.arange(length, length + len(chain))[None]
        theirs = own(torch.tensor([chain]), position_ids=positions, **{name: past}).logits
        whole = own(torch.tensor([tokens + chain])).logits[0, -len(chain) :]
    assert float((ours - theirs[0]).abs().max()) < ROUNDING
    assert float((ours - whole).abs().max()) > 1e-3  # so the view does leave something out


@pytest.mark.slow
@pytest.mark.parametrize(
    "exact",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="takes five minutes in the interpreter"
            ),
        ),
    ],
)
def test_kernels_and_exact_mode_read_views_as_the_reference_does(exact: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, chain = [5 * i % 89 + 3 for i in range(70)], [5, 9]
    wanted = drafted(PagedLM(tiny("llama")), tokens, chain, 16, 20)
    lm = PagedLM(tiny("llama").to(device), kernels=Kernels(impl="triton", exact=exact))
    ours = drafted(lm, tokens, chain, 16, 20).cpu()
    assert float((ours - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    if exact:  # a view of everything, and one whose pages have another place, have the same bits
        whole = drafted(lm, tokens, chain, 0, 128)
        assert torch.equal(whole, drafted(lm, tokens, chain, 128, 0))


def test_with_every_page_in_the_window_the_target_agrees_with_itself(
    target: PagedLM, prompts: list[list[int]]
) -> None:
    drafter = OwnCache(sink=0, window=256)
    decoder = decoder_of(target, drafter, Chain(budget=3), rows=2)
    kept = [done.accepted_lengths for done in decoder.run(requests_of(prompts, NEW))]
    assert kept == [[4] * (NEW // 4)] * len(prompts)


@pytest.mark.some(1)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "tree",
    [Chain(budget=4), Static(widths=[3, 2, 1]), Dynamic(budget=12)],
    ids=["chain", "static", "dynamic"],
)
def test_with_a_window_outputs_are_those_of_plain_decoding(
    target: PagedLM,
    prompts: list[list[int]],
    tree: TreePolicy,
    rows: int,
    kv_dtype: torch.dtype | None,
) -> None:
    """Also after a row is filled again, and from pages of a quantised type."""
    given = {"rows": rows, "kv_dtype": kv_dtype}
    plain = outputs_of(decoder_of(target, NoDrafter(), **given), prompts, NEW)  # type: ignore[arg-type]
    decoder = decoder_of(target, OwnCache(sink=16, window=16), tree, **given)  # type: ignore[arg-type]
    assert outputs_of(decoder, prompts, NEW) == plain
    decoder.verifier.cache.check()  # type: ignore[union-attr]


def test_children_are_drawn_from_what_the_rule_is_told(
    target: PagedLM, prompts: list[list[int]]
) -> None:
    """A view of everything is the target itself: sampled children are then always accepted, with
    as many candidates as it has tokens."""
    drafter = OwnCache(sink=0, window=256, candidates=target.vocab_size)
    tree = Chain(budget=3, children="sample")
    decoder = decoder_of(target, drafter, tree, RecursiveRejection(), temperature=1.0, rows=2)
    for done in decoder.run(requests_of(prompts, 16)):
        assert done.accepted_lengths == [4] * 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sink": -1}, r"drafter\.sink=-1: must be at least 0"),
        ({"window": -2}, r"drafter\.window=-2: must be at least 0"),
        (
            {"sink": 0, "window": 0},
            r"drafter\.window=0: with drafter\.sink=0 a draft sees nothing",
        ),
        (
            {"window": 4090},
            r"drafter\.window=4090: with drafter\.sink=16 it is longer than the 4096",
        ),
    ],
)
def test_views_that_are_none_are_refused(
    target: PagedLM, settings: dict[str, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        loaded(OwnCache(**settings), target)


def test_models_with_sliding_windows_are_refused() -> None:
    mixed = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
    with pytest.raises(ValueError, match=r"drafter=own_cache: model has sliding windows of its"):
        loaded(OwnCache(window=32), PagedLM(tiny("qwen2", use_sliding_window=True, **mixed)))
