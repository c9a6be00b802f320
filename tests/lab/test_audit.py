"""The audit: planted faults and where it says they are, and that it is silent if there is none."""

from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.static import Static
from specdec.evidence import evidence_line, numbers_in, numbers_of
from specdec.lab.audit import apart_of, audit, named, strata, told, units_between
from specdec.lab.lossless import verdict
from specdec.lab.witness import Witness
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.sampling import SamplingParams
from tests.decoding import decoder_of, requests_of
from tests.lab import planted
from tests.lab.made import generation

STARTS = ("It was a dark night, and the old captain stood", "def fold(items, start):\n    total =")
SAMPLED = SamplingParams(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


def decoded(
    target: PagedLM, sampling: SamplingParams, *, prompts: int = 4, new: int = 24, **how: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], SmallLlama]:
    """Texts, lines of evidence, and what drafted."""
    drafter = SmallLlama(path="zoo:draft", candidates=64)
    tree = Static(widths=[2, 2, 1], children="top_k" if sampling.greedy else "sample")
    options = {"rows": 2, "page_size": 8, "evidence": True, "sampling": sampling, **how}
    decoder = decoder_of(target, drafter, tree, **options)
    asked = [
        target.tokenizer(f"{i} {start}").input_ids
        for i in range(-(-prompts // 2))
        for start in STARTS
    ]
    done = [*decoder.run(requests_of(asked, new))]
    texts = [
        {
            **generation(s.request.id, s.output_ids, s.steps),
            "request": s.request.id,
            "prompt_ids": list(s.request.prompt_ids),
            "accepted_lengths": s.accepted_lengths,
        }
        for s in done
    ]
    return texts, [evidence_line(s) for s in done], drafter


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_sound_pass_is_clean(target, sampling):
    texts, lines, _ = decoded(target, sampling)
    found = audit(texts, lines, Witness(target), page_size=8)
    assert (found["verdict"], found["suspects"], found["strata"]) == ("clean", 0, [])
    assert found["tokens"] == sum(len(text["output_ids"]) for text in texts) == 96
    assert found["largest"] < 3
    assert "in 96 tokens" in told(found)


def test_evidence_is_that_of_the_tokens(target):
    """By a pass over each text of transformers' own, in float64 numbers."""
    texts, lines, _ = decoded(target, SAMPLED, prompts=2, new=9)
    for text, line in zip(texts, lines, strict=True):
        ids = [*text["prompt_ids"], *text["output_ids"]]
        target.model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = target.model(torch.tensor([ids])).logits[0, len(text["prompt_ids"]) - 1 : -1]
        target.model.set_attn_implementation("specdec_paged")
        first = logits.sort(descending=True).values[:, :2]
        expected = [logits[range(9), text["output_ids"]], *first.T, logits.logsumexp(-1)]
        np.testing.assert_allclose(numbers_in(line["numbers"]).T, torch.stack(expected), atol=1e-4)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (planted.mask, {"depth 2-3"}),
        (planted.position, {"depth 2-3"}),
        (planted.stale, {"after drafts were kept"}),
        (planted.short, {"second step"}),
        (planted.page, {"first step"}),
    ],
    ids=["mask", "position", "stale", "short", "page"],
)
def test_faults_of_pass_and_cache_are_found_in_a_hundred_tokens(target, monkeypatch, plant, names):
    plant(monkeypatch)
    texts, lines, _ = decoded(target, SAMPLED, prompts=12, new=10)
    monkeypatch.undo()
    found = audit(texts, lines, Witness(target), page_size=8)
    assert found["verdict"] == "bug"
    assert found["largest"] > 100
    assert found["strata"][0]["name"] in names
    judged = verdict(texts, Witness(target), SAMPLED, evidence=found)
    assert judged["verdict"] == "failed"
    assert found["strata"][0]["name"] in judged["reason"]


def test_a_text_that_goes_on_after_a_stop_token_is_found(target, monkeypatch):
    texts, *_ = decoded(target, SamplingParams())
    kept = [
        (t["output_ids"], sum(t["accepted_lengths"][:i]), n)
        for t in texts
        for i, n in enumerate(t["accepted_lengths"])
        if n > 1
    ]
    stops = {output[before] for output, before, _ in kept}
    clean, lines, _ = decoded(target, SamplingParams(), stop_tokens=stops)
    assert audit(clean, lines, Witness(target), page_size=8, stop_tokens=stops)["stops"] == 0
    planted.stop(monkeypatch)
    texts, lines, _ = decoded(target, SamplingParams(), stop_tokens=stops)
    found = audit(texts, lines, Witness(target), page_size=8, stop_tokens=stops)
    assert found["verdict"] == "bug"
    assert told(found).endswith("texts go on after a stop token")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "residual", "told", "bonus"])
def test_faults_of_rules_are_found_in_five_thousand_tokens(target, fault):
    texts, _, drafter = decoded(
        target, SAMPLED, prompts=104, new=48, rows=16, rule=planted.Faulty(fault)
    )
    witness = Witness(target, draft=drafter.own_model)
    found = verdict(texts, witness, SAMPLED, sample=10**6)
    assert found["tokens"] <= 5000
    assert (found["verdict"] == "failed") == (fault != "none")


# Parts


def test_numbers_that_are_none_are_far_apart():
    inf = float("inf")
    mine = torch.tensor([[1.0, 2, 1, 3], [-inf, 2, 1, 3], [-inf, 2, 1, 3]]).double()
    theirs = mine.clone()
    theirs[2, 0] = 0.0
    theirs[0, 1] += 3 * 2.0**-22  # the unit of 3.0 in float32
    assert units_between(mine, theirs, torch.float32).tolist() == [3.0, 0.0, inf]


def test_strata_are_what_was_known_before():
    text = {"prompt_ids": [1] * 7, "output_ids": [2] * 6, "accepted_lengths": [2, 3, 1]}
    found = strata(text, 4, 4)
    assert [label[0] for label in found] == ["root", "below the root"] * 2 + [
        "below the root",
        "root",
    ]
    assert found[0] == (
        "root",
        "first step",
        "after none was kept",
        "in the same page",
        "page 1",
        "batch row 4",
    )
    assert found[3][1:5] == (
        "depth 1",
        "second step",
        "after drafts were kept",
        "a page was begun",
    )
    assert found[5][1:] == (
        "later step",
        "after drafts were kept",
        "in the same page",
        "page 2",
        "batch row 4",
    )


def test_a_stratum_is_named_if_chance_does_not_explain_it():
    labels = [("a", "even"[: 1 + i % 2])[:1] if i < 50 else ("b",) for i in range(100)]
    faulty = np.array([i < 20 for i in range(100)])
    assert [s.name for s in named(labels, faulty)] == ["a"]
    assert [s.name for s in named(labels, np.arange(100) % 5 == 0)] == ["everywhere"]
    assert named(labels, faulty & False) == []


def test_evidence_of_another_text_is_refused(target):
    text = {**generation(0, [3, 4], 1), "prompt_ids": [5, 6]}
    with pytest.raises(ValueError, match="3 tokens of request 0, whose text has 2; delete"):
        apart_of(text, np.zeros((3, 4)), Witness(target))


def test_a_suspect_passes_with_a_warning(target):
    texts, lines, _ = decoded(target, SAMPLED, prompts=2, new=9)
    found = audit(texts, lines, Witness(target), page_size=8)
    found |= {"verdict": "suspect", "suspects": 1, "strata": []}
    assert verdict(texts, Witness(target), SAMPLED, evidence=found)["verdict"] == "suspect"
    logits, tokens = torch.randn(3, 9), torch.tensor([0, 4, 8])
    assert numbers_of(logits, tokens)[:, 0].tolist() == logits[range(3), tokens].tolist()
