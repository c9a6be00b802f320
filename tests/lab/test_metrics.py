"""Figures against hand-made records, and losslessness reports against known divergences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.lab import lossless as comparison
from specdec.lab.lossless import compare, follow, next_logits
from specdec.lab.metrics import acceptance_by_depth, summarise
from specdec.lab.records import RunFolder
from specdec.models.paged import PagedLM
from specdec.sampling import SamplingParams, probabilities


def generation(prompt: int, output: list[int], steps: int, turn: int = 0) -> dict:
    return {
        "prompt": prompt,
        "turn": turn,
        "prompt_ids": [1, 2],
        "output_ids": output,
        "tokens": len(output),
        "steps": steps,
        "drafted": 3 * steps,
        "finish_reason": "length",
    }


def step(requests: list[int], depths: list[int], accepted: list[int], tokens: list[int]) -> dict:
    seconds = {"draft": 0.25, "verify": 0.5, "prefill": 0.25}
    return {
        "requests": requests,
        "depths": depths,
        "accepted": accepted,
        "tokens": tokens,
        "seconds": seconds,
    }


def test_pooled_and_per_request_lengths_differ_as_defined():
    generations = [generation(0, [5] * 8, 2), generation(1, [5] * 2, 2)]
    steps = [step([0, 1], [3, 3], [3, 0], [4, 1]), step([0, 1], [3, 1], [3, 0], [4, 1])]
    summary = summarise(generations, steps)
    assert summary["mean_accepted_length"] == {"pooled": 10 / 4, "per_request": (4 + 1) / 2}
    assert summary["tokens_per_target_pass"] == 5
    assert summary["seconds"] == 2
    assert summary["tokens_per_second"] == 5
    assert summary["decode_tokens_per_second"] == 10 / 1.5
    assert summary["drafted_per_step"] == 3
    assert summary["finish_reasons"] == {"length": 2}


def test_acceptance_by_depth_counts_trees_that_reached_it():
    steps = [
        step([0, 1], [3, 1], [2, 1], [3, 2]),
        step([0], [2], [0], [1]),
        step([0], [0], [0], [1]),
    ]
    assert acceptance_by_depth(steps) == [2 / 3, 1 / 2, 0.0]


def test_an_empty_run_has_figures_too():
    summary = summarise([], [])
    assert summary["tokens_per_second"] == 0
    assert summary["mean_accepted_length"] == {"pooled": 0, "per_request": 0}


def test_sources_are_summed_where_trees_have_several():
    steps = [
        {**step([0, 1], [2, 1], [1, 0], [2, 1]), "sources": [{"a": (2, 1), "b": (1, 0)}, {}]},
        {**step([0], [1], [1], [2]), "sources": [{"b": [3, 2]}]},  # as read from a file
        step([1], [0], [0], [1]),
    ]
    expected = {"a": {"drafted": 2, "accepted": 1}, "b": {"drafted": 4, "accepted": 2}}
    assert summarise([], steps)["sources"] == expected
    assert "sources" not in summarise([], steps[2:])
    assert "sources" not in summarise([], [{**steps[2], "sources": [{}]}])


def test_sources_of_finished_prompts_survive_a_resume(tmp_path: Path):
    folder = RunFolder(tmp_path, config={}, resume=False)
    folder.begin()
    shared = {**step([7, 8], [1, 1], [1, 0], [2, 1]), "sources": [{"a": [1, 1]}, {"a": [1, 0]}]}
    bare = {**step([8], [1], [0], [1]), "sources": []}
    for record in (shared, bare):
        folder.main.steps.append(record)
    folder.main.generations.append({**generation(0, [5], 1), "request": 8})
    folder.close()

    folder = RunFolder(tmp_path, config={}, resume=True)
    folder.write_error(ValueError("of the run before"))
    folder.begin()
    kept, other = folder.main.steps.records
    assert (kept["requests"], kept["sources"]) == ([8], [{"a": [1, 0]}])
    assert other == bare
    assert not (tmp_path / "error.txt").exists()
    folder.close()


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
    theirs = [generation(0, [3, 6, 5], 3), generation(1, [3, 4, 9], 3), generation(2, [7], 1)]
    report = compare(mine, theirs, target)
    assert (report["checked"], report["identical"]) == (3, 1)
    first, second = report["divergences"]
    target.model.set_attn_implementation("eager")
    logits = target.model(torch.tensor([[1, 2, 3]])).logits[0, -1].detach()
    target.model.set_attn_implementation("specdec_paged")
    assert (first["prompt"], first["position"]) == (0, 1)
    assert (first["token"], first["baseline_token"]) == (4, 6)
    assert first["logit_gap"] == pytest.approx(float(logits[6] - logits[4]), abs=1e-5)
    assert (second["position"], second["token"], second["logit_gap"]) == (2, None, None)


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


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_draws_from_the_target_follow_it_and_sharper_ones_do_not(target, monkeypatch, top_p):
    sampling = SamplingParams(temperature=0.9, top_p=top_p)
    texts = drawn(target, sampling)
    found = follow(texts, target, sampling)
    assert (found["tokens"], found["impossible"]) == (240, 0)
    assert found["p_value"] > 0.01
    monkeypatch.setattr(comparison, "CHUNK", 7)
    assert follow(texts, target, sampling)["p_value"] == pytest.approx(found["p_value"], rel=1e-3)
    assert follow(drawn(target, sampling, sharper=1.8), target, sampling)["p_value"] < 1e-3
    narrow = SamplingParams(temperature=0.9, top_p=0.3)
    assert follow(texts, target, narrow)["impossible"] > 0
    assert follow([], target, sampling) == {"tokens": 0, "impossible": 0, "p_value": None}
