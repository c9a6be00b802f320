"""Losslessness reports against known divergences, and draws against the laws they follow."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.lab import lossless
from specdec.lab.lossless import BOUND, compare, follow, next_logits, noise, unit
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.sampling import SamplingParams, probabilities
from tests.lab.made import generation


@pytest.fixture(scope="module")
def target() -> PagedLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return PagedLM(LlamaForCausalLM(config))


def test_divergences_are_placed_and_their_gap_is_the_models_own(target):
    mine = [generation(0, [3, 4, 5], 1), generation(1, [3, 4], 1), generation(2, [7], 1)]
    theirs = [generation(0, [3, 6, 5], 1), generation(1, [3, 4, 9], 1), generation(2, [7], 1)]
    report = compare(mine, theirs, target)
    assert (report["checked"], report["identical"]) == (3, 1)
    first, second = report["divergences"]
    target.model.set_attn_implementation("eager")
    logits = target.model(torch.tensor([[1, 2, 3]])).logits[0, -1].detach()
    target.model.set_attn_implementation("specdec_paged")
    assert (first["prompt"], first["position"]) == (0, 1)
    assert (first["token"], first["baseline_token"]) == (4, 6)
    assert first["logit_gap"] == pytest.approx(float(logits[6] - logits[4]), abs=1e-5)
    assert first["top2_gap"] == pytest.approx(float(-logits.topk(2).values.diff()), abs=1e-5)
    assert 0 < first["bound"] < 1e-4 < abs(first["logit_gap"])
    assert not first["explained"]
    assert (second["position"], second["token"], second["logit_gap"]) == (2, None, None)
    assert not second["explained"]


def test_the_gap_is_that_of_the_cache_that_was_decoded_over(target):
    sides = [generation(0, [3, 4], 1)], [generation(0, [3, 6], 1)]
    cache = target.new_cache(
        rows=1, pages=1, page_size=4, max_tokens=4, kv_dtype=torch.float8_e4m3fn
    )
    cache.open(0, tokens=4)
    for token in (1, 2, 3):
        logits = target.extend(cache, [0], [[token]])[0]
    (divergence,) = compare(*sides, target, kv_dtype=torch.float8_e4m3fn)["divergences"]
    assert divergence["logit_gap"] == pytest.approx(float(logits[6] - logits[4]), abs=1e-5)
    (plain,) = compare(*sides, target)["divergences"]
    assert abs(plain["logit_gap"] - divergence["logit_gap"]) > 1e-4


def test_turns_with_another_history_are_not_compared(target):
    other = {**generation(0, [4], 1, turn=1), "prompt_ids": [1, 3]}
    assert compare([generation(0, [3], 1, turn=1)], [other], target)["checked"] == 0


def test_samples_of_a_prompt_are_compared_with_their_own(target):
    mine, theirs = (
        [generation(0, [3], 1, sample=sample) for sample in order] for order in ((0, 1), (1, 0))
    )
    theirs[0]["output_ids"] = [4]
    (divergence,) = compare(mine, theirs, target)["divergences"]
    assert (divergence["sample"], divergence["baseline_token"]) == (1, 4)


def test_a_gap_within_rounding_is_explained(target):
    rounded = PagedLM(LlamaForCausalLM(target.model.config).bfloat16())
    logits = next_logits(rounded, [1, 2])
    for token in range(3):
        bound = BOUND * unit(float(logits[[token, 5]].abs().max()), torch.bfloat16)
        sides = [generation(0, [token], 1)], [generation(0, [5], 1)]
        (found,) = compare(*sides, rounded)["divergences"]
        assert found["bound"] == bound
        assert found["explained"] == (abs(float(logits[token] - logits[5])) <= bound)


def test_unit_is_the_distance_to_the_next_number():
    for value in (20.3, 16.0, 0.7, -3.0):
        for dtype in (torch.bfloat16, torch.float32):
            here = torch.tensor(abs(value), dtype=dtype)
            bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
            beyond = (here.view(bits) + 1).view(dtype)
            assert unit(value, dtype) == float(beyond) - float(here)


def test_noise_is_within_what_the_bound_assumes():
    rounded = load_model("zoo:target", Placement(dtype=torch.bfloat16))
    tokens = rounded.tokenizer("It was a dark night, and the old captain stood at the").input_ids
    assert noise(rounded, tokens) <= BOUND / 2


# Above temperature 0


def drawn(target: PagedLM, sampling: SamplingParams, *, sharper: float = 1.0) -> list[dict]:
    """Texts drawn token by token from the model's own distributions; `sharper` raises those to a
    power."""
    generator = np.random.default_rng(5)
    found = []
    for number in range(6):
        prompt = generator.integers(16, size=4 + number).tolist()
        output: list[int] = []
        for _ in range(40):
            law = probabilities(next_logits(target, prompt + output).double(), sampling).numpy()
            law = law**sharper
            output.append(int(generator.choice(len(law), p=law / law.sum())))
        found.append({"request": number, "prompt_ids": prompt, "output_ids": output})
    return [*found, {"request": 9, "prompt_ids": [1], "output_ids": []}]


def test_equally_probable_tokens_have_an_order(target):
    """Of sixteen tokens, none likelier than another, each has a sixteenth of the unit interval."""
    even = PagedLM(LlamaForCausalLM(target.model.config))
    torch.nn.init.zeros_(even.model.lm_head.weight)
    sampling = SamplingParams(temperature=1.0)
    assert follow(drawn(even, sampling), even, sampling)["p_value"] > 0.01


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_draws_from_the_target_follow_it_and_sharper_ones_do_not(target, monkeypatch, top_p):
    sampling = SamplingParams(temperature=0.9, top_p=top_p)
    texts = drawn(target, sampling)
    found = follow(texts, target, sampling)
    assert (found["tokens"], found["impossible"]) == (240, 0)
    assert found["p_value"] > 0.01
    monkeypatch.setattr(lossless, "CHUNK", 7)
    assert follow(texts, target, sampling)["p_value"] == pytest.approx(found["p_value"], rel=1e-3)
    assert follow(drawn(target, sampling, sharper=1.8), target, sampling)["p_value"] < 1e-3
    narrow = SamplingParams(temperature=0.9, top_p=0.3)
    assert follow(texts, target, narrow)["impossible"] > 0
    assert follow([], target, sampling) == {"tokens": 0, "impossible": 0, "p_value": None}
