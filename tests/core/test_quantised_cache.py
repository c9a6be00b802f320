"""Quantised pages under a model: what it reads is what the pages will stand for."""

from typing import Literal

import pytest
import torch

from specdec.cache import PagedKVCache
from specdec.cached_model import CachedModel
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import TreeLayout
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.request import KV_DTYPES, CacheSettings, Capacity
from tests.core.cache_life import GPU_DEVICE, QUANTISED


@pytest.fixture(scope="module")
def lm() -> PagedLM:
    return load_model("zoo:draft")


def prefilled(
    lm: PagedLM, kv_dtype: torch.dtype | None, rounded: torch.dtype | None
) -> PagedKVCache:
    """A cache with two prompts.

    Args:
        kv_dtype: what its pages hold.
        rounded: what rows are rounded to on their way into the scratch.
    """
    model = CachedModel(lm)
    model.prepare(Capacity(rows=2, max_tokens=40, page_size=4, kv_dtype=kv_dtype))
    model.cache.kv_dtype = rounded
    for row, prompt in enumerate(([5, 9, 2, 77, 31, 8], [4, 4, 1])):
        model.cache.open(row, tokens=40)
        lm.prefill(model.cache, [row], [prompt])
    return model.cache


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_a_model_reads_what_quantised_pages_stand_for(lm: PagedLM, name: str) -> None:
    """The same logits, to the last bit, as over plain pages into which rounded rows go."""
    dtype = KV_DTYPES[name]
    quantised, rounded, exact = (
        prefilled(lm, *types) for types in ((dtype, dtype), (None, dtype), (None, None))
    )
    assert quantised.keys.dtype in QUANTISED
    assert quantised.tree_keys.dtype == rounded.keys.dtype == torch.float32
    assert quantised.key_scales is not None
    assert rounded.key_scales is None
    caches = (quantised, rounded, exact)
    for tokens in ([[3], [6]], [[8, 1], [70, 2]]):
        found, expected, other = (lm.extend(cache, [0, 1], tokens) for cache in caches)
        assert torch.equal(found, expected)
        assert not torch.equal(found, other)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("kv_dtype", "impl"),
    [
        *((kv_dtype, "reference") for kv_dtype in QUANTISED),
        *(pytest.param(kv, "triton", marks=pytest.mark.slow) for kv in QUANTISED),
    ],
    ids=str,
)
def test_a_model_sees_a_node_as_it_will_be_once_committed(
    impl: Literal["reference", "triton"], kv_dtype: torch.dtype
) -> None:
    """A chain in one pass against a pass and a commit for each of its tokens."""
    device = GPU_DEVICE if impl == "triton" else "cpu"
    kernels = Kernels(impl=impl)
    lm = load_model("zoo:draft", Placement(device=torch.device(device), kernels=kernels))
    tokens = [3, 60, 7]
    chain, offsets = torch.tensor([tokens], device=device), torch.arange(3, device=device)[None]

    def distance(rounded: torch.dtype | None) -> float:
        together = lm.forward(prefilled(lm, kv_dtype, rounded), [0], chain, offsets)
        assert together is not None
        cache = prefilled(lm, kv_dtype, rounded)
        apart = torch.cat([lm.extend(cache, [0], [[token]]) for token in tokens])
        return float((together[0] - apart).norm() / apart.norm())

    assert distance(kv_dtype) < 1e-5  # float32 and another order of sums
    assert distance(None) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_over_quantised_pages(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TreeLayout(
        page_table=torch.tensor([[4, 1], [2, -1]], dtype=torch.int32),
        context_lens=torch.tensor([5, 2], dtype=torch.int32),
        max_context=5,
        positions=torch.tensor([[5, 6, 7], [2, 3, 4]]),
        key_positions=torch.tensor([[5, 6, 7], [2, 3, 4]]),
    )
    query, key, value = (
        torch.randn(2, heads, 3, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    pages = [torch.randn(5, 2, 3, 8, generator=generator) for _ in range(2)]
    (keys, key_scales), (values, value_scales) = (
        reference.quantise(part, torch.int8) for part in pages
    )
    dense = [keys.float() * key_scales[..., None], values.float() * value_scales[..., None]]
    found = reference.tree_attention(
        query,
        keys,
        values,
        key,
        value,
        layout,
        scale=0.5,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    assert found.dtype == dtype
    expected = reference.tree_attention(query, *dense, key, value, layout, scale=0.5)
    assert torch.equal(found, expected)


def test_settings_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cache\.dtype=fp4: must be auto, fp8_e4m3, int8"):
        CacheSettings(dtype="fp4")
