"""Sampling against transformers' warpers, and draws and random numbers against their laws."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from specdec.experiments.studies.rule_laws import Tokens, ordered_draws
from specdec.sampling import (
    SamplingParams,
    draw,
    probabilities,
    race,
    random_keys,
    sound,
    uniforms,
)
from tests.verifier.laws import ALPHA, chi_square


def rows_of_logits(vocab: int = 7) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(
        np.float64,
        (3, vocab),
        elements=st.floats(-8, 8, allow_nan=False),
        unique=True,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=rows_of_logits(),
    temperature=st.sampled_from([0.3, 1.0, 1.6]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_probabilities_equal_the_warpers_of_transformers(
    logits: np.ndarray,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = torch.tensor(logits)
    warpers: list[transformers.LogitsProcessor] = []
    if temperature != 1.0:
        warpers.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    warped = scores
    for warper in warpers:
        if isinstance(warper, transformers.TopPLogitsWarper):
            mass = warped.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
            assume(float((mass - params.top_p).abs().min()) > 1e-9)  # type: ignore[operator]
        if isinstance(warper, transformers.MinPLogitsWarper):
            shares = warped.softmax(-1)
            shares = shares / shares.amax(-1, keepdim=True)
            assume(min_p == 1.0 or float((shares - params.min_p).abs().min()) > 1e-9)
        warped = warper(None, warped)
    found = probabilities(scores, params)
    torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-9, atol=1e-12)
    assert torch.equal(found > 0, warped.softmax(-1) > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_wide_and_sum_to_one(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for params in (
        SamplingParams(temperature=0.0, top_k=3),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.05),
    ):
        probs = probabilities(logits, params)
        assert probs.dtype == wide
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, dtype=wide))
        if params.greedy:
            assert torch.equal(probs.argmax(-1), logits.argmax(-1))
            assert ((probs == 0) | (probs == 1)).all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
    ],
)
def test_sampling_settings_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        SamplingParams(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.0), ("top_k", 1), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 1.0)],
)
def test_the_ends_of_their_ranges_are_settings(setting: str, value: float) -> None:
    assert getattr(SamplingParams(**{setting: value}), setting) == value


@pytest.mark.parametrize("seed", [-1, -(10**30), 2**63, 2**64 - 1, 99999999999999999999999])
def test_seeds_of_any_size_count_modulo_two_to_the_64(seed: int) -> None:
    first = uniforms(seed, [5, 6], [0, 3], 1, 4)
    assert torch.equal(first, uniforms(seed % 2**64, [5, 6], [0, 3], 1, 4))
    assert not torch.equal(first, uniforms(seed + 1, [5, 6], [0, 3], 1, 4))
    keys = random_keys(seed, [5], [3], torch.device("cpu")).numpy().view(np.uint64)
    assert keys.tolist() == [[seed % 2**64, 5, 3]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=hnp.arrays(
        np.float64, (4, 6), elements=st.sampled_from([0.0, 0.0, 1e-300, 1e-40, 0.1, 1.0, 1e30])
    ),
    uniform=hnp.arrays(
        np.float64, (4, 6), elements=st.floats(0.0, 1.0, exclude_max=True, allow_nan=False)
    ),
)
def test_draw_never_yields_an_index_of_zero_weight(
    weights: np.ndarray, uniform: np.ndarray
) -> None:
    weights[weights.sum(-1) == 0, 3] = 1e-300
    index = draw(torch.tensor(weights), torch.tensor(uniform))
    assert (weights[np.arange(4), index.numpy()] > 0).all()
    arrival = race(torch.tensor(weights), torch.tensor(uniform))
    assert torch.equal(arrival.isinf(), torch.tensor(weights) == 0)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2, 0.0], [9.0, 3.0, 2.0, 1.0]])
def test_first_two_arrivals_are_draws_without_replacement(weights: list[float]) -> None:
    uniform = torch.tensor(np.random.default_rng(3).random((100_000, 4)))
    first_two = race(torch.tensor(weights), uniform).topk(2, largest=False).indices
    counts: dict[Tokens, int] = {}
    for pair in map(tuple, first_two.tolist()):
        counts[pair] = counts.get(pair, 0) + 1
    probs = np.array(weights) / sum(weights)
    assert chi_square(counts, dict(ordered_draws(probs, 2, replacement=False))) > ALPHA


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    rows=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**20)), min_size=1, max_size=5),
    stream=st.integers(0, 40),
    count=st.integers(1, 30),
    more=st.integers(0, 30),
)
def test_uniforms_depend_on_their_own_row_alone(
    seed: int, rows: list[tuple[int, int]], stream: int, count: int, more: int
) -> None:
    sequences, steps = [r[0] for r in rows], [r[1] for r in rows]
    numbers = uniforms(seed, sequences, steps, stream, count)
    assert numbers.dtype == torch.float64
    assert numbers.shape == (len(rows), count)
    assert ((numbers >= 0) & (numbers < 1)).all()
    longer = uniforms(seed, sequences, steps, stream, count + more)
    assert torch.equal(longer[:, :count], numbers)
    for row, (sequence, step) in enumerate(rows):
        assert torch.equal(uniforms(seed, [sequence], [step], stream, count)[0], numbers[row])


def test_uniforms_of_different_purposes_are_unrelated() -> None:
    """Every seed, sequence, step and stream gives new numbers, and together they are uniform."""
    blocks = [
        uniforms(seed, [0, 1, 2], [step] * 3, stream, 50)
        for seed in range(3)
        for step in range(4)
        for stream in range(5)
    ]
    numbers = torch.cat(blocks).flatten()
    assert len(numbers.unique()) == len(numbers)
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > ALPHA
    table = torch.cat(blocks).numpy()
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert abs(correlation).max() < 0.8


# Near temperature 0, and beyond numbers

TINY = (1e-7, 1e-30, 1e-39, 1e-45, 5e-324)


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 6e4])
def test_tiny_temperatures_give_the_limit(
    temperature: float, dtype: torch.dtype, scale: float
) -> None:
    """The most probable tokens share everything, whatever their logits are."""
    logits = torch.tensor([[0.25, -1.0, 0.25, 0.125], [-1.0, -0.5, -1.0, -math.inf]]) * scale
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]])
    for filters in ({}, {"top_k": 2}, {"top_p": 0.95}, {"min_p": 0.3}):
        params = SamplingParams(temperature=temperature, **filters)
        found = probabilities(logits.to(dtype), params)
        assert torch.equal(found.float(), expected), filters


def test_logits_that_make_a_distribution() -> None:
    nan, inf = math.nan, math.inf
    rows = {
        (0.0, 1.0): True,
        (-inf, 1.0): True,
        (nan, 1.0): False,
        (1.0, nan): False,
        (inf, 1.0): False,
        (inf, nan): False,
        (-inf, -inf): False,
        (-inf, nan): False,
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert sound(torch.tensor(list(rows), dtype=dtype)).tolist() == list(rows.values())


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. 2011: four numbers of 64 bits."""
    mask = 2**64 - 1
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high, low = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        upper, under = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = upper ^ c1 ^ k0, under, high ^ c3 ^ k1, low
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def test_uniforms_are_those_of_the_paper() -> None:
    """So that kernels can make them as well. Blocks count from 1."""
    seed, sequence, step, stream = 2**64 - 5, 2**33, 7, 3
    blocks = [philox([seed, sequence], [block, 0, stream, step]) for block in (1, 2)]
    expected = [(bits >> 11) / 2**53 for block in blocks for bits in block]
    assert uniforms(seed, [sequence], [step], stream, 8)[0].tolist() == expected


def test_any_filter_is_one() -> None:
    one: list[dict] = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}]
    assert not SamplingParams(temperature=0.7).filters
    assert all(SamplingParams(**setting).filters for setting in one)
    assert SamplingParams(top_k=3, top_p=0.5, min_p=0.1).filters
