"""Losslessness reports against known divergences, and draws against the laws they follow."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.lab import witness as witness_module
from specdec.lab.bets import Bets, Found, places_of
from specdec.lab.lossless import compare, verdict
from specdec.lab.reading import Reading
from specdec.lab.witness import BOUND, Seen, Witness, noise, own_logits, unit
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.sampling import SamplingParams, probabilities
from tests.decoding import decoder_of, requests_of
from tests.lab.made import generation


def read(
    texts: list[dict], witness: Any, sampling: SamplingParams, sample: int = 8192
) -> dict[str, Any]:
    return Reading(witness, sampling).read(texts, sample)


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
    report = compare(mine, theirs, Witness(target))
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
    (divergence,) = compare(*sides, Witness(target, torch.float8_e4m3fn))["divergences"]
    assert divergence["logit_gap"] == pytest.approx(float(logits[6] - logits[4]), abs=1e-5)
    (plain,) = compare(*sides, Witness(target))["divergences"]
    assert abs(plain["logit_gap"] - divergence["logit_gap"]) > 1e-4


def test_turns_with_another_history_are_not_compared(target):
    other = {**generation(0, [4], 1, turn=1), "prompt_ids": [1, 3]}
    found = compare([generation(0, [3], 1, turn=1)], [other], Witness(target))
    assert (found["checked"], found["left_out"], found["identical"]) == (0, 1, 0)


def test_samples_of_a_prompt_are_compared_with_their_own(target):
    mine, theirs = (
        [generation(0, [3], 1, sample=sample) for sample in order] for order in ((0, 1), (1, 0))
    )
    theirs[0]["output_ids"] = [4]
    (divergence,) = compare(mine, theirs, Witness(target))["divergences"]
    assert (divergence["sample"], divergence["baseline_token"]) == (1, 4)


def test_a_gap_within_rounding_is_explained(target):
    rounded = PagedLM(LlamaForCausalLM(target.model.config).bfloat16())
    (logits,) = (some[0].float() for some in own_logits(rounded, [1, 2], [0]))
    witness = Witness(rounded)
    witness.units = BOUND
    for token in range(3):
        size = max(float(logits.max().abs()), float(logits[token].abs()))
        bound = BOUND * unit(size, torch.bfloat16)
        sides = [generation(0, [token], 1)], [generation(0, [5], 1)]
        (found,) = compare(*sides, witness)["divergences"]
        assert found["bound"] == bound
        assert found["explained"] == (abs(float(logits[token] - logits[5])) <= bound)


def test_unit_is_the_distance_to_the_next_number():
    for value in (20.3, 16.0, 0.7, -3.0):
        for dtype in (torch.bfloat16, torch.float32):
            here = torch.tensor(abs(value), dtype=dtype)
            bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
            beyond = (here.view(bits) + 1).view(dtype)
            assert unit(value, dtype) == float(beyond) - float(here)


@pytest.fixture(scope="module")
def rounded() -> PagedLM:
    return load_model("zoo:target", Placement(dtype=torch.bfloat16))


def test_noise_is_within_what_the_bound_assumes(rounded):
    tokens = rounded.tokenizer("It was a dark night, and the old captain stood at the").input_ids
    found = noise(rounded, tokens)
    assert found <= BOUND / 2
    witness = Witness(rounded)
    (*_,) = witness.follow({"prompt_ids": tokens[:1], "output_ids": tokens[1:]})
    assert witness.units == max(BOUND, 4 * found)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_witness_agrees_with_the_paged_pass(target, monkeypatch, kv_dtype):
    """Over any cache, whatever is read together."""
    monkeypatch.setattr(witness_module, "PROMPT_CHUNK", 3)
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    cache = target.new_cache(rows=1, pages=2, page_size=8, max_tokens=16, kv_dtype=kv_dtype)
    cache.open(0, tokens=16)
    theirs = [target.extend(cache, [0], [[token]])[0] for token in text]
    for prompt in (1, 8):
        for chunk in (2, 64):
            parts = own_logits(
                target, text[:prompt], text[prompt:], kv_dtype=kv_dtype, chunk=chunk
            )
            torch.testing.assert_close(torch.cat([*parts]), torch.stack(theirs[prompt - 1 : -1]))


def test_texts_are_read_as_sampled_without_a_look_at_them(target):
    texts = [{**text(number, [3] * 5), "prompt_ids": [1] * 5} for number in range(30)]
    found = read(texts, Witness(target), SamplingParams(temperature=1.0), sample=95)
    assert (found["texts"], found["tokens"]) == (10, 50)


# What becomes of the texts


class Told:
    """A witness of made-up logits: those of texts by their request."""

    units = BOUND

    def __init__(self, scores: dict[int, torch.Tensor]) -> None:
        self.scores = scores

    def follow(self, text: dict) -> Iterator[Seen]:
        count = len(text["output_ids"])
        yield Seen(torch.tensor(text["output_ids"]), self.scores[text["request"]][:count])

    def bound(self, scores: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return torch.full(scores.shape[:1], 0.1, dtype=scores.dtype)


def text(request: int, output: list[int], **more: Any) -> dict:
    return {**generation(request, output, 1), "request": request, **more}


GREEDY = SamplingParams()


def test_tokens_that_are_not_the_best_fail_beyond_rounding_alone():
    scores = torch.tensor([[1.0, 0.95, 0.5]]).double()
    for token, expected in enumerate([("passed", 0, 0), ("passed", 1, 0), ("failed", 0, 1)]):
        found = verdict([text(0, [token])], Told({0: scores}), GREEDY)
        assert (found["verdict"], found["edge"], found["impossible"]) == expected
    tie = Told({0: torch.ones(1, 3).double()})
    assert verdict([text(0, [2])], tie, GREEDY)["verdict"] == "passed"
    assert verdict([text(0, [])], tie, GREEDY)["verdict"] == "not checked"
    lossy = verdict([text(0, [2])], Told({0: scores}), GREEDY, lossy="it is")
    assert (lossy["verdict"], lossy["impossible"]) == ("lossy", 1)
    assert lossy["reason"].startswith("it is; 1 tokens are none that the target could choose; ")


def test_outputs_that_part_from_the_baseline_fail_beyond_rounding_alone():
    told = Told({0: torch.tensor([[1.0, 0.95, 0.5]]).double()})
    near, far = (verdict([text(0, [0])], told, GREEDY, baseline=[text(0, [i])]) for i in (1, 2))
    assert (near["verdict"], near["divergences"][0]["explained"]) == ("passed", True)
    assert (far["verdict"], far["divergences"][0]["explained"]) == ("failed", False)
    assert far["reason"].startswith("1 outputs part from the baseline's by more than rounding; ")


def test_exact_outputs_that_part_from_the_baseline_fail_however_near():
    told = Told({0: torch.tensor([[1.0, 0.95, 0.5]]).double()})
    near, same = (
        verdict([text(0, [0])], told, GREEDY, baseline=[text(0, [i])], exact=True) for i in (1, 0)
    )
    assert (near["verdict"], near["divergences"][0]["explained"]) == ("failed", True)
    assert "baseline's, and kernels.exact=true leaves no rounding; " in near["reason"]
    assert same["verdict"] == "passed"
    assert "1 of 1 outputs equal the baseline, token for token: equal bits" in same["reason"]


@pytest.mark.parametrize(
    ("filters", "chances"),
    [
        ({"top_k": 2}, [0.4, 0.3, 0.29, 0.01]),
        ({"top_p": 0.7}, [0.4, 0.301, 0.298, 0.001]),
        ({"min_p": 0.56}, [0.4, 0.23, 0.222, 0.148]),
    ],
)
def test_tokens_that_a_filter_cuts_by_rounding_are_no_impossible_ones(filters, chances):
    """Two tokens are kept, the third but for rounding as well."""
    told = Told({0: torch.tensor([chances]).double().log()})
    sampling = SamplingParams(temperature=1.0, **filters)
    for token, expected in enumerate([(0, 0), (0, 0), (1, 0), (0, 1)]):
        found = read([text(0, [token])], told, sampling)
        assert (found["edge"], found["impossible"]) == expected


# Above temperature 0


def test_places_are_those_of_a_step():
    assert places_of([3, 1, 2]) == [0, 1, 2, 0, 0, 1]


def world(generator: np.random.Generator, tokens: int, *, bent: float = 1.0) -> Found:
    """What bets find in a run: tokens from laws that depend on the last one and are as peaked as
    those of models; steps end at improbable tokens. `bent`: the power that laws are raised to at
    the second place of a step."""
    laws = generator.dirichlet(np.full(12, generator.choice([0.05, 0.3])), size=12)
    drawn, lengths = [0], [0]
    for _ in range(tokens):
        law = laws[drawn[-1]] ** (bent if lengths[-1] == 1 else 1.0)
        drawn.append(int(generator.choice(12, p=law / law.sum())))
        lengths[-1] += 1
        if laws[drawn[-2], drawn[-1]] < 0.3 or lengths[-1] == 3:
            lengths.append(0)
    bets, seen = Bets(), torch.tensor(laws[drawn[:-1]])
    places = np.array(places_of(lengths))
    bets.add(seen, torch.tensor(drawn[1:]), generator.random(tokens), places)
    return bets.found(1e-4)


def test_a_fault_at_one_place_of_a_step_is_found_there():
    generator = np.random.default_rng(8)
    for found in (world(generator, 4000, bent=1.6) for _ in range(3)):
        assert (found.bet, found.place, found.places) == ("surprisal", "1", ("1",))
        assert found.tokens is not None
        assert found.p_value < 1e-4
    sound = world(generator, 4000)
    assert sound.p_value > 0.01
    assert sound.places == ()


def drawn(target: PagedLM, sampling: SamplingParams, *, sharper: float = 1.0) -> list[dict]:
    """Texts drawn token by token from the model's own distributions; `sharper` raises those to a
    power."""
    generator = np.random.default_rng(5)
    found = []
    for number in range(6):
        prompt = generator.integers(16, size=4 + number).tolist()
        output: list[int] = []
        cache = target.new_cache(rows=1, pages=4, page_size=16, max_tokens=64)
        cache.open(0, tokens=64)
        for _ in range(40):
            logits = target.extend(cache, [0], [output[-1:] or prompt])[0]
            law = probabilities(logits.double(), sampling).numpy() ** sharper
            output.append(int(generator.choice(len(law), p=law / law.sum())))
        found.append(text(number, output, prompt_ids=prompt))
    return [*found, text(9, [])]


def test_equally_probable_tokens_have_an_order(target):
    """Of sixteen tokens, none likelier than another, each has a sixteenth of the unit interval."""
    even = PagedLM(LlamaForCausalLM(target.model.config))
    torch.nn.init.zeros_(even.model.lm_head.weight)
    sampling = SamplingParams(temperature=1.0)
    assert read(drawn(even, sampling), Witness(even), sampling)["p_value"] > 0.01


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_draws_from_the_target_follow_it_and_sharper_ones_do_not(target, monkeypatch, top_p):
    sampling = SamplingParams(temperature=0.9, top_p=top_p)
    texts, witness = drawn(target, sampling), Witness(target)
    found = verdict(texts, witness, sampling)
    assert (found["verdict"], found["tokens"], found["impossible"]) == ("passed", 240, 0)
    monkeypatch.setattr(witness_module, "CHUNK", 7)
    assert read(texts, witness, sampling)["p_value"] == pytest.approx(found["p_value"], rel=1e-3)
    bent = verdict(drawn(target, sampling, sharper=2.0), witness, sampling)
    assert (bent["verdict"], bent["impossible"]) == ("failed", 0)
    assert bent["p_value"] < 1e-4
    narrow = SamplingParams(temperature=0.9, top_p=0.3)
    assert read(texts, witness, narrow)["impossible"] > 0


@pytest.mark.some(2)
@pytest.mark.parametrize(("temperature", "wrong"), [(0.0, True), (1.0, True), (1.0, False)])
def test_a_wrong_bit_of_the_mask_of_trees_is_found(monkeypatch, temperature, wrong):
    """Nodes that do not see the first drafted one."""
    layout = PagedLM._layout

    def planted(lm: Any, cache: Any, rows: Any, offsets: Any, ancestors: Any, *rest: Any) -> Any:
        if wrong and ancestors is not None:
            ancestors = ancestors.clone()
            ancestors[:, 2:] &= ~2
        return layout(lm, cache, rows, offsets, ancestors, *rest)

    target = load_model("zoo:draft")
    monkeypatch.setattr(PagedLM, "_layout", planted)
    drafter = SmallLlama(path="zoo:draft", candidates=16)
    sampling = SamplingParams(temperature=temperature, seed=3)
    decoder = decoder_of(target, drafter, Chain(budget=3), sampling=sampling, rows=16)
    starts = ["It was a dark night", "def fold(items):", "The captain said", "Once there was"]
    prompts = [target.tokenizer(f"{i} {start}").input_ids for i in range(4) for start in starts]
    texts = [
        text(s.request.id, s.output_ids, accepted_lengths=s.accepted_lengths)
        | {"prompt_ids": list(s.request.prompt_ids)}
        for s in decoder.run(requests_of(prompts, 48 if temperature else 8))
    ]
    found = verdict(texts, Witness(target), sampling)
    assert found["verdict"] == ("failed" if wrong else "passed")
