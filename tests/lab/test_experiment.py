"""Experiments: what a run leaves on disk, resuming, failures, samples."""

import json
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from specdec.cache import PagedKVCache
from specdec.drafters.none import NoDrafter
from specdec.lab.conversations import Conversations
from specdec.lab.experiment import Experiment
from specdec.lab.prompt_records import Prompt
from specdec.lab.prompts import encode
from specdec.lab.runs import SCHEMA
from specdec.lab.tracking import NoTracker
from specdec.models.load import load_model
from specdec.models.placement import Placement
from specdec.verifier.verifier import TreeVerifier
from tests.running import QUICK, SMALL_TARGET, jobs_by, lines, outputs, summary_of

pytestmark = pytest.mark.usefixtures("load_once")


def test_what_a_run_leaves(specdec, tmp_path):
    code, printed, _ = specdec("drafter=small_llama", "batch_size=2", f"out={tmp_path}/o", *QUICK)
    folder = tmp_path / "o"
    summary = summary_of(folder)
    generations, steps = lines(folder / "generations.jsonl"), lines(folder / "steps.jsonl")
    assert code == 0
    assert {
        *(
            "drafter",
            "target",
            "acceptance",
            "kernels",
            "temperature",
            "seed",
            "batch_size",
            "prompts",
            "tokens",
        ),
        *("steps", "seconds", "tokens_per_second", "mean_accepted_length", "acceptance_by_depth"),
        *("time", "baseline", "speedup", "lossless", "versions", "hardware", "git"),
    } <= set(summary)
    assert set(summary["time"]) == {"prefill", "draft", "verify", "accept", "commit", "other"}
    assert sum(summary["time"].values()) == pytest.approx(summary["seconds"])
    assert len(generations) == summary["prompts"] == 3
    assert summary["tokens"] == sum(len(g["output_ids"]) for g in generations)
    assert summary["tokens"] == sum(sum(step["tokens"]) for step in steps)
    assert summary["steps"] == len(steps)
    for generation in generations:
        mine = [
            tokens
            for step in steps
            for request, tokens in zip(step["requests"], step["tokens"], strict=True)
            if request == generation["request"]
        ]
        assert mine == generation["accepted_lengths"]
        assert sum(mine) == len(generation["output_ids"])
    pooled = sum(map(sum, (s["tokens"] for s in steps))) / sum(len(s["tokens"]) for s in steps)
    assert summary["mean_accepted_length"]["pooled"] == pytest.approx(pooled)
    ratio = summary["tokens_per_second"] / summary["baseline"]["tokens_per_second"]
    assert summary["speedup"] == pytest.approx(ratio)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["drafter"]["path"] == "zoo:draft"
    assert (config["choices"]["drafter"], config["schema"]) == ("small_llama", SCHEMA)
    assert "speedup" in printed
    assert "3 of 3 outputs equal the baseline" in printed


@pytest.mark.some(1)
@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_an_interrupted_run_resumes_to_the_same_outputs(
    specdec, tmp_path, monkeypatch, stop_after
):
    arguments = ("sampling=sample", "batch_size=2", "prompts.limit=5", "max_new_tokens=12")
    arguments += ("tracker=none", "drafter=small_llama", SMALL_TARGET)
    assert specdec(*arguments, f"out={tmp_path}/whole")[0] == 0

    steps = 0

    def interrupt(self: NoTracker, step: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "step", interrupt)
        code, printed, _ = specdec(*arguments, f"out={tmp_path}/cut")
    assert code == 130
    assert "resume=true" in printed
    assert summary_of(tmp_path / "cut")["interrupted"]
    lines(tmp_path / "cut/steps.jsonl")

    code, _, error = specdec(*arguments, f"out={tmp_path}/cut")
    assert code == 2
    assert "resume=true" in error
    code, _, error = specdec(*arguments, "seed=9", "resume=true", f"out={tmp_path}/cut")
    assert code == 2
    assert "seed" in error

    assert specdec(*arguments, "resume=true", f"out={tmp_path}/cut")[0] == 0
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    summary = summary_of(tmp_path / "cut")
    assert not summary["interrupted"]
    assert summary["tokens"] == sum(sum(s["tokens"]) for s in lines(tmp_path / "cut/steps.jsonl"))


def test_a_conversation_resumes_where_it_was(specdec, tmp_path, monkeypatch):
    turns = ["Name a colour.", "Name an animal.", "Name a town.", "Name a river."]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"turns": turns}))
    arguments = ("drafter=none", "baseline=false", f"prompts.path={tmp_path}/asked.jsonl")
    arguments += ("prompts.samples=2", "sampling=sample", *QUICK[:1], "max_new_tokens=4")
    arguments += (SMALL_TARGET,)
    assert specdec(*arguments, f"out={tmp_path}/whole")[0] == 0
    whole = lines(tmp_path / "whole/generations.jsonl")
    assert len({g["request"] for g in whole}) == len(whole) == 8
    for one in whole:
        before = [g for g in whole if g["sample"] == one["sample"] and g["turn"] < one["turn"]]
        for earlier in before:  # what was said is read again, in its order
            said = earlier["prompt_ids"]
            assert one["prompt_ids"][: len(said)] == said

    seen: set[int] = set()

    def interrupt(self: NoTracker, step: Any) -> None:
        seen.update(step.requests)
        if len(seen) == 4:  # in the last turn of the first sample
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "step", interrupt)
        assert specdec(*arguments, f"out={tmp_path}/cut")[0] == 130
    assert len(lines(tmp_path / "cut/generations.jsonl")) == 3
    assert specdec(*arguments, "resume=true", f"out={tmp_path}/cut")[0] == 0
    kept = ("request", "sample", "turn", "prompt_ids", "output_ids")
    ours, theirs = (
        sorted([g[name] for name in kept] for g in lines(tmp_path / run / "generations.jsonl"))
        for run in ("cut", "whole")
    )
    assert ours == theirs


class Learner(NoDrafter):
    reset = "category"
    seen: ClassVar[set[str | None]] = set()

    def start(self, sequences: Sequence[Any]) -> None:
        self.seen |= {sequence.request.category for sequence in sequences}


def test_a_resumed_run_says_what_its_drafter_no_longer_knows(specdec, tmp_path, monkeypatch):
    arguments = ("drafter=none", f"drafter._target_={__name__}.Learner", f"out={tmp_path}/o")
    arguments += (SMALL_TARGET,)

    def interrupt(self: NoTracker, step: Any) -> None:
        if step.requests[0] >= 1000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "step", interrupt)
        assert specdec(*arguments, *QUICK, "baseline=false")[0] == 130
    summary = summary_of(tmp_path / "o")
    assert (summary["state"], summary["resumed"]) == ({"reset": "category"}, False)
    code, printed, _ = specdec(*arguments, *QUICK, "baseline=false", "resume=true")
    assert code == 0
    assert "resumed: what the 1 finished texts taught the drafter" in printed
    assert summary_of(tmp_path / "o")["resumed"]
    categories = {g["category"] for g in lines(tmp_path / "o/generations.jsonl")}
    assert categories <= Learner.seen
    assert None not in categories


def test_synthetic_outputs_are_marked_wherever_they_go(specdec, tmp_path, monkeypatch):
    started: dict[str, Any] = {}
    monkeypatch.setattr(NoTracker, "start", lambda self, run: started.update(vars(run)))
    small = (*QUICK, SMALL_TARGET)
    code, printed, _ = specdec("drafter=synthetic", "ignore_eos=true", f"out={tmp_path}/o", *small)
    summary = summary_of(tmp_path / "o")
    assert code == 0
    assert (summary["synthetic"], summary["acceptance"]) == (True, "synthetic")
    assert summary["lossless"]["verdict"] == "not checked"
    assert summary["lossless"]["reason"].startswith("SYNTHETIC")
    assert all(g["synthetic"] for g in lines(tmp_path / "o/generations.jsonl"))
    assert not any("synthetic" in g for g in lines(tmp_path / "o/baseline/generations.jsonl"))
    assert printed.count("SYNTHETIC") == 3  # progress, the title, and instead of the check
    assert started["config"]["synthetic"]
    assert started["name"].startswith("SYNTHETIC ")

    code, printed, _ = specdec(
        "-m", "drafter=ngram,synthetic", "baseline=false", f"out={tmp_path}/s", *small
    )
    assert code == 0
    (row,) = (line for line in printed.splitlines() if "drafter=synthetic" in line and "│" in line)
    assert "SYNTHETIC" in row
    (row,) = (line for line in printed.splitlines() if "drafter=ngram" in line and "│" in line)
    assert "SYNTHETIC" not in row
    assert not summary_of(jobs_by(tmp_path / "s", "choices.drafter")["ngram"])["synthetic"]


def test_the_probabilities_of_another_drafter_are_taken_for_rates_on_demand(specdec, tmp_path):
    arguments = ("drafter=small_llama", "acceptance=synthetic", "acceptance.allow_lossy=true")
    assert specdec(*arguments, "baseline=false", f"out={tmp_path}/o", *QUICK)[0] == 0
    assert summary_of(tmp_path / "o")["synthetic"]


FAILING = """
def repeat(tokens):
    return [tokens[-4:]]

def fail(tokens):
    if len(tokens) > {limit}:
        return [[tokens[len(tokens)]]]
    return repeat(tokens)
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which the search path does not hold yet."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_failing_drafter_is_named_with_its_prompt_and_loses_nothing(specdec, own_folder):
    own_folder.joinpath("failing_drafter.py").write_text(FAILING.format(limit=50))
    texts = {"a/1": "def f(x):", "a/2": "It was a dark night. " * 12, "a/3": "The end"}
    records = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    own_folder.joinpath("prompts.jsonl").write_text("\n".join(records))
    # A warm-up sees the first prompt alone.
    arguments = (
        *("drafter=user", "prompts.path=prompts.jsonl", "max_new_tokens=8", "tracker=none"),
        *("batch_size=3", "baseline=false", "dtype=float32"),
    )
    code, printed, error = specdec(
        *arguments, "drafter._target_=failing_drafter.fail", "batch_size=1", "out=o"
    )
    assert code == 1
    assert error == (
        "error: drafter=user (failing_drafter.fail) failed on prompt a/2: IndexError: list index "
        f"out of range (failing_drafter.py:7); the traceback is in {own_folder}/o/error.txt, and "
        f"resume=true out={own_folder}/o continues\n"
    )
    assert "Traceback" not in printed
    written = (own_folder / "o/error.txt").read_text()
    assert "return [[tokens[len(tokens)]]]" in written
    assert [g["id"] for g in lines(own_folder / "o/generations.jsonl")] == ["a/1"]
    summary = summary_of(own_folder / "o")
    assert (summary["interrupted"], summary["drafter"]) == (True, "user")

    code, printed, error = specdec(
        "-m", *arguments, "drafter._target_=failing_drafter.fail,failing_drafter.repeat", "out=s"
    )
    assert code == 1
    assert error.count("failed on prompt a/2: IndexError") == 1
    assert error.count("\n") == 1
    whole = jobs_by(own_folder / "s", "drafter._target_")["failing_drafter.repeat"]
    assert not summary_of(whole)["interrupted"]
    assert len(lines(whole / "generations.jsonl")) == 3

    own_folder.joinpath("failing_at_once.py").write_text(FAILING.format(limit=0))
    code, _, error = specdec(*arguments, "drafter._target_=failing_at_once.fail", "out=w")
    assert code == 1
    assert "failed on prompt a/1: " in error
    assert ", while warming up; " in error


@pytest.mark.parametrize("drafter", ["ngram", "early_exit"])
def test_one_cache_of_the_target_at_a_time(specdec, tmp_path, monkeypatch, drafter):
    """On a GPU a cache may take most of the memory: that of the baseline is gone before the other
    side has its own, and that before the texts are checked."""
    made: list[weakref.ref[PagedKVCache]] = []
    prepare, check = TreeVerifier.prepare, Experiment.check

    def prepared(self: TreeVerifier, *given: Any) -> None:
        assert [cache() for cache in made] == [None] * len(made)
        prepare(self, *given)
        made.append(weakref.ref(self.cache))

    def checked(self: Experiment, *given: Any, **more: Any) -> Any:
        assert [cache() for cache in made] == [None, None]
        return check(self, *given, **more)

    monkeypatch.setattr(TreeVerifier, "prepare", prepared)
    monkeypatch.setattr(Experiment, "check", checked)
    code, _, error = specdec(f"drafter={drafter}", f"out={tmp_path}/o", *QUICK, SMALL_TARGET)
    assert (code, error) == (0, "")
    assert len(made) == 2


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"^{name}=0: must be at least 1$"):
        Experiment(target=None, method=None, baseline=None, prompts=(), **{name: 0})


def test_a_failed_check_has_an_exit_code_of_its_own(specdec, tmp_path, monkeypatch):
    """One wrong token of the second of two jobs; a sweep ends with the worst of them."""
    finish = Conversations.finish

    def wrong(self: Conversations, *given: Any) -> Any:
        for record in finish(self, *given):
            drafted = record["drafted"] > 0
            yield {**record, "output_ids": [7, *record["output_ids"][1:]]} if drafted else record

    monkeypatch.setattr(Conversations, "finish", wrong)
    words = ("drafter=ngram", "prompts.limit=2", "max_new_tokens=8", *QUICK[:1], *QUICK[3:])
    words += ("baseline=false", SMALL_TARGET)
    code, printed, _ = specdec("-m", *words, "tree.budget=0,2", f"out={tmp_path}/s")
    assert code == 3
    found = jobs_by(tmp_path / "s", "tree.budget")
    first, second = (summary_of(found[budget])["lossless"] for budget in (0, 2))
    assert (first["verdict"], second["verdict"]) == ("passed", "failed")
    assert second["impossible"] >= 1
    assert printed.count("FAILED") == 2  # beneath the run, and in the table of all
    both = ("-m", *words, "tree.budget=2,-1", f"out={tmp_path}/b")
    assert specdec(*both)[0] == 3  # a refused run beside a failed one


def test_a_prompt_as_long_as_the_context_is_refused():
    """Before anything is decoded, with what mends it."""
    prompt = Prompt(index=0, id="long", category=None, turns=("word " * 20,), conversation=False)
    tokenizer = load_model("zoo:draft", Placement()).tokenizer
    length = len(encode(tokenizer, prompt, chat="never"))
    for context in (length, length + 1):
        target = SimpleNamespace(
            tokenizer=tokenizer, max_context=context, check_tokens=lambda ids, what: None
        )
        given: Any = SimpleNamespace(
            target=target, prompts=[prompt], chat="never", max_new_tokens=4
        )
        if context == length:
            with pytest.raises(ValueError, match=r"^prompt 'long': .* use prompts\.too_long="):
                Experiment._longest(given)
        else:
            assert Experiment._longest(given) >= length
