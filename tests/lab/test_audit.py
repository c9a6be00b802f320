"""The audit: planted faults and where it says they are, and that it is silent if there is none."""

import base64
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specdec.decode import Decoder
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.static import Static
from specdec.evidence import evidence_line, numbers_in, numbers_of
from specdec.lab import audit as audit_module
from specdec.lab.audit import (
    Audit,
    Evidence,
    Risk,
    begun_alike,
    named,
    strata,
    told,
    units_between,
)
from specdec.lab.bets import ALARM, Bets, places_of
from specdec.lab.lossless import compare, verdict
from specdec.lab.witness import Seen, Witness, drafts_of
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.sampling import SamplingParams, probabilities
from specdec.verifier.target_only import TargetOnly
from tests.decoding import decoder_of, requests_of
from tests.lab import planted
from tests.lab.made import generation
from tests.models.tiny import tiny

STARTS = ("It was a dark night, and the old captain stood", "def fold(items, start):\n    total =")
SAMPLED = SamplingParams(temperature=1.0, seed=3)
COOL = SamplingParams(temperature=0.6, seed=3)


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


def decoded(
    target: PagedLM,
    sampling: SamplingParams,
    *,
    prompts: int = 4,
    new: int = 24,
    widths: Sequence[int] = (2, 2, 1),
    children: str | None = None,
    alike: bool = False,
    **how: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], SmallLlama]:
    """Texts, lines of evidence, and what drafted. Half of the prompts begin alike if asked for."""
    drafter = SmallLlama(path="zoo:draft", candidates=64)
    children = children or ("top_k" if sampling.greedy else "sample")
    tree = Static(widths=list(widths), children=children)
    options = {"rows": 2, "page_size": 8, "evidence": True, "sampling": sampling, **how}
    decoder = decoder_of(target, drafter, tree, **options)
    asked = [
        target.tokenizer(f"{start} {i}" if alike and k else f"{i} {start}").input_ids
        for i in range(-(-prompts // 2))
        for k, start in enumerate(STARTS)
    ]
    return *recorded(decoder, asked, new), drafter


def recorded(
    decoder: Decoder, asked: Sequence[Sequence[int]], new: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts and lines of evidence."""
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
    return texts, [evidence_line(s) for s in done]


def audited(
    texts: list[dict[str, Any]],
    evidence: Evidence,
    target: PagedLM,
    sampling: SamplingParams,
    kv_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """What evidence says of all of them."""
    witness = Witness(target, kv_dtype)
    found = verdict(texts, witness, sampling, evidence=evidence, sample=10**6)
    assert found["verdict"] == {"clean": "passed", "bug": "failed"}[found["evidence"]["verdict"]]
    if found["evidence"]["verdict"] == "bug":
        assert told(found["evidence"]) in found["reason"]
    return found["evidence"]


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_sound_pass_is_clean(target, sampling):
    texts, lines, _ = decoded(target, sampling, prompts=2)
    found = audited(texts, Evidence(lines=lines, page_size=8), target, sampling)
    assert (found["verdict"], found["suspects"], found["strata"]) == ("clean", 0, [])
    assert (found["not_best"], found["stops"]) == (0, 0)
    assert found["tokens"] == sum(len(text["output_ids"]) for text in texts) == 48
    assert found["largest"] < 3
    assert "in 48 tokens" in told(found)


@pytest.mark.slow
def test_a_sound_pass_in_bfloat16_is_clean():
    rounded = load_model("zoo:target", Placement(dtype=torch.bfloat16))
    for sampling in (SamplingParams(), SAMPLED):
        texts, lines, _ = decoded(rounded, sampling, prompts=8, new=32)
        found = audited(texts, Evidence(lines=lines, page_size=8), rounded, sampling)
        assert found["verdict"] == "clean"


@pytest.mark.parametrize("kept", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_sound_pass_is_clean_whatever_its_cache_holds(kept):
    """Evidence is recorded in float32, as norms are computed, whatever the type of the model; and
    numbers that passes round to different sides are so few that most texts have none."""
    wide = kept == torch.float64
    small = PagedLM(tiny("llama").double() if wide else tiny("llama"))
    asked = [[3 + (17 * i + 5 * j * j) % 90 for j in range(8)] for i in range(12)]
    cache = {"rows": 4, "kv_dtype": None if wide else kept}
    decoder = decoder_of(small, NoDrafter(), evidence=True, sampling=SAMPLED, **cache)
    texts, lines = recorded(decoder, asked, new=40)
    evidence = Evidence(lines=lines, page_size=16)
    found = audited(texts, evidence, small, SAMPLED, cache["kv_dtype"])
    assert (found["verdict"], found["suspects"]) == ("clean", 0)


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


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "wrong ancestor bit": (planted.mask, "depth 2-3"),
    "position below a branch": (planted.position, "depth 2-3"),
    "scratch row not overwritten": (planted.unwritten, "depth 1"),
    "row of another node": (planted.stale, "after drafts were kept"),
    "a row too few": (planted.short, "second step"),
    "a row too many": (planted.many, "second step"),
    "pages of other prompts": (planted.page, "first token"),
    "a shared page written": (planted.written, "begins like another text"),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_pass_and_cache_are_found_in_a_hundred_tokens(target, monkeypatch, fault):
    """In 360 one that waits for a page to be filled, and is in half of the texts."""
    plant, stratum = FAULTS[fault]
    plant(monkeypatch)
    prompts = 36 if plant is planted.written else 12
    texts, lines, _ = decoded(target, SAMPLED, prompts=prompts, new=10, rows=4, alike=True)
    monkeypatch.undo()
    found = audited(texts, Evidence(lines=lines, page_size=8), target, SAMPLED)
    assert found["verdict"] == "bug"
    assert found["tokens"] <= 10 * prompts
    assert found["largest"] > 100
    assert found["strata"][0]["name"] == stratum


def test_a_text_that_goes_on_after_a_stop_token_is_found(target, monkeypatch):
    texts, *_ = decoded(target, SamplingParams(), prompts=2)
    kept = [
        (t["output_ids"], sum(t["accepted_lengths"][:i]), n)
        for t in texts
        for i, n in enumerate(t["accepted_lengths"])
        if n > 1
    ]
    stops = {output[before] for output, before, _ in kept}
    for plant, result in ((None, "clean"), (planted.stop, "bug")):
        if plant is not None:
            plant(monkeypatch)
        texts, lines, _ = decoded(target, SamplingParams(), prompts=2, stop_tokens=stops)
        evidence = Evidence(lines=lines, page_size=8, stop_tokens=stops)
        found = audited(texts, evidence, target, SamplingParams())
        assert found["verdict"] == result
        assert (found["stops"] > 0) == (plant is not None)


RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (planted.Faulty("none"), {}),
    "none, top-k children": (TargetOnly(), {"children": "top_k"}),
    "residual forgotten": (planted.Faulty("residual"), {}),
    "residual not normalised": (planted.Faulty("unnormalised"), {}),
    "told of q before temperature": (planted.Faulty("told"), {"sampling": COOL}),
    "bonus from the parent's law": (planted.Faulty("bonus"), {}),
    "coin reused for siblings": (planted.SharedCoins(), {"children": "top_k"}),
}
# Where in a step: nothing is left to be scaled where a node has one child, at the last level of
# the tree; a leaf's own law is that of the place after it.
PLACES = {
    "residual forgotten": ("0", "1", "2-3"),
    "residual not normalised": ("0", "1"),
    "told of q before temperature": ("0", "1", "2-3"),
    "bonus from the parent's law": ("2-3",),
    "coin reused for siblings": ("0", "1"),
}
BETS = {"coin reused for siblings": "rank 2"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", RULES)
def test_faults_of_rules_are_found_in_five_thousand_tokens(target, fault):
    """Without one there is no alarm. Each takes 17 to 25 s of one processor, 20 in the mean."""
    rule, how = RULES[fault]
    how = {"sampling": SAMPLED, **how}
    texts, lines, drafter = decoded(target, prompts=104, new=48, rows=52, rule=rule, **how)
    witness = Witness(target, drafts=drafts_of(drafter.own_model, target))
    evidence = Evidence(lines=lines, page_size=8)
    found = verdict(texts, witness, how["sampling"], evidence=evidence, sample=10**6)
    assert found["tokens"] <= 5000
    assert found["evidence"]["verdict"] == "clean"  # the pass is sound
    assert (found["verdict"] == "passed") == fault.startswith("none"), found["p_value"]
    named, right = set(found["bets"]["places"]), PLACES.get(fault, ())
    assert set(right[:2]) <= named <= set(right)  # a third one has few tokens
    assert found["bets"]["bet"] == BETS.get(fault, found["bets"]["bet"])


@pytest.mark.slow
def test_audits_of_sound_runs_are_clean(target):
    """None of eight runs of 960 tokens each, at two temperatures, ends with an alarm. Seen:
    p-values from 0.52 to 0.98, evidence no further off than 1.03 times what rounding does."""
    for seed in range(8):
        sampling = SamplingParams(temperature=(1.0, 0.7)[seed % 2], seed=100 + seed)
        children = ("sample", "top_k")[seed // 2 % 2]
        rule = planted.Faulty("none") if children == "sample" else TargetOnly()
        how: dict[str, Any] = {"rule": rule, "children": children, "rows": 10}
        texts, lines, drafter = decoded(target, sampling, prompts=20, new=48, **how)
        witness = Witness(target, drafts=drafts_of(drafter.own_model, target))
        evidence = Evidence(lines=lines, page_size=8)
        found = verdict(texts, witness, sampling, evidence=evidence, sample=10**6)
        assert (found["verdict"], found["evidence"]["verdict"]) == ("passed", "clean")
        assert found["p_value"] > 1e-3


@pytest.mark.slow
def test_a_thousand_audits_of_sound_texts_end_with_one_alarm_at_most(target):
    """Each is of 480 tokens drawn anew from the laws along the texts of one run, of the places
    that they had in their steps. Seen: no alarm, the least p-value 0.003, 1 of 0.01 or less and 36
    of 0.1 or less."""
    texts, _, drafter = decoded(target, SAMPLED, prompts=10, new=48, rule=planted.Faulty("none"))
    witness = Witness(target, drafts=drafts_of(drafter.own_model, target))
    torch.manual_seed(0)
    generator, whole = np.random.default_rng(0), [Bets() for _ in range(1000)]
    for text in texts:
        places = places_of(text["accepted_lengths"])
        (seen,) = witness.follow(text)
        laws, drafts = (probabilities(x, SAMPLED) for x in (seen.scores, seen.draft))
        for law, draft, place in zip(laws, drafts, places, strict=True):
            drawn = torch.multinomial(law, len(whole), replacement=True)
            tokens, which = drawn.unique(return_inverse=True)
            ends = Bets()  # of the share that a token has of its own mass, 0 and 1
            for share in (0.0, 1.0):
                shape, size = (len(tokens), -1), len(tokens)
                known = law.expand(shape), tokens, np.full(size, share), np.full(size, place)
                ends.add(*known, draft.expand(shape))
            low, high = ends.shares
            for bets, n in zip(whole, which.tolist(), strict=True):
                bets.shares.append(low[n : n + 1] + generator.random() * (high - low)[n : n + 1])
                for name in ("powers", "events", "prices", "places"):
                    getattr(bets, name).append(getattr(ends, name)[0][n : n + 1])
    found = np.array([bets.found(ALARM).p_value for bets in whole])
    assert (found <= ALARM).sum() <= 1
    assert (found <= 0.01).sum() <= 15


# Divergences at temperature 0


class Stub:
    """A witness of made-up scores."""

    target = SimpleNamespace(dtype=torch.float32)
    scores = torch.tensor([[1.0, 0.95, 0.5]]).double()

    def follow(self, text: dict) -> Iterator[Seen]:
        yield Seen(torch.tensor(text["output_ids"]), self.scores)

    def bound(self, scores: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores[:, 0], 0.1)


def explained(
    mine: Sequence[float] | None, theirs: Sequence[float] | None, rounding: float
) -> tuple[bool, float | None]:
    """Of a run that chose token 0 and plain decoding that chose 1, by logits of their passes."""

    def lines(logits: Sequence[float] | None, token: int) -> list[dict[str, Any]]:
        if logits is None:
            return []
        numbers = numbers_of(torch.tensor([logits]), torch.tensor([token])).numpy()
        letters = base64.b64encode(numbers.astype("<f4").tobytes()).decode()
        return [{"request": 0, "row": 0, "numbers": letters}]

    evidence = Evidence(lines=lines(mine, 0), baseline=lines(theirs, 1), page_size=8)
    witness: Any = Stub()
    audit = Audit(evidence=evidence, witness=witness)
    vars(audit)["rounding"] = rounding
    sides = ([{**generation(0, [token], 1), "request": 0}] for token in (0, 1))
    (found,) = compare(*sides, witness, audit)["divergences"]
    return found["explained"], found["measured"]


def test_a_divergence_is_judged_by_what_both_passes_said():
    right, other = (1.0, 0.95, 0.5), (0.97, 0.98, 0.5)
    unit = 2.0**-23  # of numbers from 1 to 2
    wide, narrow = 0.01 / unit, 0.001 / unit
    assert explained(right, other, wide) == (True, pytest.approx(3.0, rel=0.01))
    assert explained(right, other, narrow) == (False, pytest.approx(30.0, rel=0.01))
    assert explained(other, other, wide) == (False, np.inf)  # the run did not choose its best
    assert explained(right, right, wide) == (False, np.inf)  # nor did plain decoding
    # Without evidence the bound of 0.1 decides, on the side that has none.
    assert explained(right, None, narrow) == (True, pytest.approx(0.0, abs=0.01))
    assert explained((1.3, 0.95, 0.5), None, narrow)[0] is False
    assert explained(None, other, narrow) == (True, None)


def test_tokens_that_the_pass_did_not_take_for_best_are_a_bug(target):
    texts, lines, _ = decoded(target, SamplingParams(), prompts=2, new=9)
    numbers = numbers_in(lines[0]["numbers"])
    numbers[4, 1] += 1.0
    letters = base64.b64encode(numbers.astype("<f4").tobytes()).decode()
    evidence = Evidence(lines=[{**lines[0], "numbers": letters}, *lines[1:]], page_size=8)
    found = audited(texts, evidence, target, SamplingParams())
    assert found["not_best"] == 1
    lossy = verdict(texts, Witness(target), SamplingParams(), evidence=evidence, lossy="it is")
    assert (lossy["verdict"], lossy["evidence"]["not_best"]) == ("lossy", 0)


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
    found = strata(text, 4)
    assert [label[0] for label in found] == ["root", "below the root"] * 2 + [
        "below the root",
        "root",
    ]
    assert found[0] == (
        "root",
        "first token",
        "first step",
        "after none was kept",
        "in the same page",
        "page 1",
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
    )


def test_texts_that_begin_alike_and_rows_that_were_used_are_known():
    prompts = [[1, 2, 3], [1, 2, 4], [5, 6, 7], [1, 2]]
    texts = [{"request": n, "prompt_ids": ids} for n, ids in enumerate(prompts)]
    assert begun_alike(texts, 2) == {0, 1}  # nothing is shared of a page that is not full
    lines = [{"request": n, "row": row} for n, row in ((0, 1), (2, 0), (1, 1), (3, 0))]
    assert Evidence(lines=lines, page_size=2).later == {1, 3}


def test_a_stratum_is_named_if_chance_does_not_explain_it():
    def texts(faulty: Sequence[bool]) -> list[Risk]:
        kinds = [(("a",),) if i < 50 else (("b",),) for i in range(100)]
        return [
            Risk(tokens=kind, whole=("one",), faulty=bad)
            for kind, bad in zip(kinds, faulty, strict=True)
        ]

    assert [s.name for s in named(texts([i < 20 for i in range(100)]))] == ["a"]
    assert [s.name for s in named(texts([i % 5 == 0 for i in range(100)]))] == ["everywhere"]
    assert named(texts([False] * 100)) == []


def test_a_stratum_of_texts_is_judged_by_texts():
    """A fault of first tokens, in all texts but two, which are of the other kind: those of the
    first kind are no longer than their fault, and yet the fault is not theirs."""
    early = [Risk(tokens=(("first",),), whole=(kind,), faulty=True) for kind in "aaaaaaabb"]
    sound = [Risk(tokens=(("first",), *[("later",)] * 19), whole=("b",), faulty=False)] * 2
    assert [s.name for s in named([*early, *sound])] == ["first"]
    # And one of its kind is named, wherever in texts it is.
    late = [
        Risk(tokens=(*[("any",)] * (3 * n + 1),), whole=(kind,), faulty=kind == "a")
        for n, kind in enumerate("abababababababab")
    ]
    (found,) = named(late)
    assert (found.name, found.faulty) == ("a", 8)
    assert found.chance == pytest.approx(1 / 12870)  # of 8 of 16 texts


def test_evidence_of_another_text_is_refused(target):
    text = {**generation(0, [3, 4], 1), "request": 0, "prompt_ids": [5, 6]}
    letters = base64.b64encode(bytes(3 * 16)).decode()
    evidence = Evidence(lines=[{"request": 0, "row": 0, "numbers": letters}], page_size=8)
    with pytest.raises(ValueError, match="3 tokens of request 0, whose text has 2; delete"):
        verdict([text], Witness(target), SAMPLED, evidence=evidence)


def test_a_suspect_passes_with_a_warning(target, monkeypatch):
    texts, lines, _ = decoded(target, SAMPLED, prompts=2, new=9)
    monkeypatch.setattr(audit_module, "SUSPECT", 1e-9)
    found = verdict(texts, Witness(target), SAMPLED, evidence=Evidence(lines=lines, page_size=8))
    assert (found["verdict"], found["evidence"]["verdict"]) == ("suspect", "suspect")
    logits, tokens = torch.randn(3, 9), torch.tensor([0, 4, 8])
    assert numbers_of(logits, tokens)[:, 0].tolist() == logits[range(3), tokens].tolist()
