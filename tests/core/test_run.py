"""The command line as a user types it: results on disk, sweeps, resuming, mistakes."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from transformers import AutoTokenizer

from specdec import run as command
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.lab import build
from specdec.lab.tracking import NoTracker
from specdec.models.load import zoo_path
from specdec.protocols import Drafter

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
QUICK = ("tracker=none", "prompts.limit=3", "max_new_tokens=10", "dtype=float32")


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "configs" / group).glob("*.yaml") if p.stem[0] != "_")


def twice(tokens: list[int]) -> list[Sequence[int]]:
    """A drafter of the user's."""
    return [tokens[-2:], tokens[-1:]]


@pytest.fixture(scope="session")
def needed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What a drafter cannot do without."""

    def settings(drafter: str) -> list[str]:
        if drafter == "user":
            return [f"drafter._target_={__name__}.twice"]
        if drafter != "rest":
            return []
        pytest.importorskip("pydivsufsort")
        from specdec.experiments.tools.build_datastore import build

        folder = tmp_path_factory.mktemp("store")
        tokenizer = AutoTokenizer.from_pretrained(zoo_path("target", "target"))
        texts = [(ROOT / "specdec/decode.py").read_text()]
        build(texts, folder, tokenizer=tokenizer, name="zoo:target")
        return [f"drafter.datastore={folder}"]

    return settings


@pytest.fixture
def specdec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdec", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(folder: Path) -> dict[tuple[int, int], list[int]]:
    return {(g["prompt"], g["turn"]): g["output_ids"] for g in lines(folder / "generations.jsonl")}


# Each drafter once, each tree with the default one; tests/drafters has all pairs.
LOSSLESS = [name for name in options("drafter") if name != "synthetic"]
PAIRS = [(name, tree) for name, tree in zip(LOSSLESS, itertools.cycle(options("tree")))]
PAIRS += [("small_llama", tree) for tree in options("tree")]


@pytest.mark.parametrize("batch_size", [4])
@pytest.mark.parametrize(("drafter", "tree"), dict.fromkeys(PAIRS))
def test_drafters_and_trees_equal_the_baseline(
    specdec, tmp_path, needed, drafter, tree, batch_size
):
    code, _, _ = specdec(
        f"drafter={drafter}",
        *needed(drafter),
        f"tree={tree}",
        f"batch_size={batch_size}",
        f"out={tmp_path}/o",
        *QUICK,
    )
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert code == 0
    assert summary["lossless"] == {"checked": 3, "identical": 3, "divergences": []}
    assert outputs(tmp_path / "o") == outputs(tmp_path / "o/baseline")


LOSSY = ("greedy", "synthetic", "typical", "relaxed")
RULED = [(name, "auto") for name in options("drafter")]
RULED += [("small_llama", rule) for rule in options("acceptance")]


@pytest.mark.parametrize(("drafter", "rule"), dict.fromkeys(RULED))
def test_every_rule_samples_reproducibly(specdec, tmp_path, needed, drafter, rule):
    lossy = ["acceptance.allow_lossy=true"] if rule in LOSSY else []
    lossy += needed(drafter)
    found = []
    other = [("c", 4)] if (drafter, rule) == ("small_llama", "auto") else []
    for name, seed in (("a", 3), ("b", 3), *other):
        arguments = (f"drafter={drafter}", f"acceptance={rule}", "sampling=sample", f"seed={seed}")
        code, _, _ = specdec(
            *arguments, *lossy, "baseline=false", f"out={tmp_path}/{name}", *QUICK
        )
        assert code == 0
        found.append(outputs(tmp_path / name))
    assert found[0] == found[1]
    assert found[2:] != found[:1]  # another seed, other texts


def test_automatic_pairing(specdec, tmp_path):
    def chosen(*arguments: str) -> tuple[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        code, _, _ = specdec(*arguments, "baseline=false", f"out={folder}", *QUICK)
        assert code == 0
        summary = json.loads((folder / "summary.json").read_text())
        return summary["acceptance"], summary["children"]

    assert chosen("drafter=small_llama") == ("greedy", "top_k")
    assert chosen("drafter=small_llama", "sampling=sample") == ("recursive_rejection", "sample")
    assert chosen("drafter=ngram", "sampling=sample") == ("target_only", "top_k")
    assert chosen("drafter=ngram", "sampling=sample", "tree.children=sample") == (
        "recursive_rejection",
        "sample",
    )
    assert chosen("acceptance=k_seq", "sampling=sample", "tree=static") == (
        "k_seq",
        "sample_with_replacement",
    )
    assert chosen("acceptance=k_seq") == ("k_seq", "top_k")


def test_the_grid_has_all_policies_and_rules():
    grid = yaml.safe_load((ROOT / "configs/experiment/grid.yaml").read_text())
    params = grid["hydra"]["sweeper"]["params"]
    assert set(params["tree"].split(",")) == set(options("tree"))
    assert set(params["acceptance"].split(",")) == set(options("acceptance")) - {
        "auto",
        "synthetic",
    }


def test_a_grid_verifies_what_is_lossless_and_refuses_the_rest(specdec, tmp_path):
    """Three rules on two trees at two temperatures, with a budget of tokens that shows a bias."""
    code, printed, error = specdec(
        *("-m", "experiment=grid", "tree=chain,static", "acceptance=block,traversal,typical"),
        *("sampling=sample,greedy", "tracker=none", "prompts.limit=2", "max_new_tokens=24"),
        f"out={tmp_path}/g",
    )
    folders = [tmp_path / "g" / str(number) for number in range(12)]
    found = [json.loads(p.read_text()) for f in folders if (p := f / "summary.json").exists()]
    warm = [one for one in found if one["temperature"] > 0]
    assert code == 2
    assert [(one["tree"], one["acceptance"]) for one in warm] == [
        ("chain", "block"),
        ("chain", "traversal"),
        ("static", "traversal"),
    ]
    for one in warm:
        assert one["lossless"]["p_value"] > 1e-4
        assert (one["lossless"]["tokens"], one["lossless"]["impossible"]) == (one["tokens"], 0)
    cold = [one for one in found if one["temperature"] == 0]
    assert len(cold) == 6  # at temperature 0 chains of rules and lossy ones are greedy
    assert all(one["lossless"]["identical"] == 2 for one in cold)
    assert error.count("\n") == 3
    assert error.count("not lossless, typical acceptance prefers") == 2
    assert "acceptance=block: judges chains alone, and a node of tree=static may have" in error
    sweep, _, refused = printed.partition("refused")
    assert sweep.count("p=0.") == 3
    assert "acceptance=block" in refused
    assert refused.count("acceptance=typical") >= 3  # a reason, and the runs it is the reason for


def test_what_a_run_leaves(specdec, tmp_path):
    code, printed, _ = specdec("drafter=small_llama", "batch_size=2", f"out={tmp_path}/o", *QUICK)
    folder = tmp_path / "o"
    summary = json.loads((folder / "summary.json").read_text())
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
    assert yaml.safe_load((folder / "config.yaml").read_text())["drafter"]["path"] == "zoo:draft"
    assert "speedup" in printed
    assert "3 of 3 outputs equal the baseline" in printed


def test_triton_decodes_what_the_reference_decodes(specdec, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def f(x):"}\n{"text": "It was a"}\n')
    for kernels in ("reference", "triton"):
        code, _, error = specdec(
            *(f"kernels={kernels}", f"prompts.path={prompts}", f"out={tmp_path}/{kernels}"),
            *("drafter=small_llama", "tree=static", "tree.widths=[2,1]", "batch_size=2"),
            *("cache.page_size=4", "dtype=float32", "tracker=none", "max_new_tokens=3"),
            "baseline=false",
        )
        assert (code, error) == (0, "")
        summary = json.loads((tmp_path / kernels / "summary.json").read_text())
        assert summary["kernels"] == kernels
        assert summary["graphs"]["obstacle"] is None
        assert summary["graphs"]["counts"]["verify"]["called"] >= summary["steps"]
        assert 0 < summary["acceptance_by_depth"][0] < 1  # both branches of the loop were taken
    assert outputs(tmp_path / "triton") == outputs(tmp_path / "reference")


def test_triton_is_refused_where_it_cannot_run(specdec, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command.Models, "load", None)  # before any model is loaded
    for where, reason in {
        "device=cpu": "device=cpu is none",
        "dtype=float64": "has no kernels for float64",
    }.items():
        code, printed, error = specdec("kernels=triton", where, f"out={tmp_path}/o", QUICK[0])
        assert (code, printed) == (2, "")
        assert error.startswith("error: kernels.impl=triton: ")
        assert reason in error
        assert error.endswith("; use kernels=auto\n")
        assert error.count("\n") == 1


def test_budget_zero_drafts_nothing(specdec, tmp_path):
    for drafter in ("small_llama", "ngram"):
        specdec(f"drafter={drafter}", "tree.budget=0", f"out={tmp_path}/{drafter}", *QUICK)
        summary = json.loads((tmp_path / drafter / "summary.json").read_text())
        assert summary["drafted_per_step"] == 0
        assert summary["mean_accepted_length"]["pooled"] == 1
        assert summary["lossless"]["identical"] == 3


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_an_interrupted_run_resumes_to_the_same_outputs(
    specdec, tmp_path, monkeypatch, stop_after
):
    arguments = ("sampling=sample", "batch_size=2", "prompts.limit=5", "max_new_tokens=12")
    arguments += ("tracker=none", "drafter=small_llama")
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
    assert json.loads((tmp_path / "cut/summary.json").read_text())["interrupted"]
    lines(tmp_path / "cut/steps.jsonl")

    code, _, error = specdec(*arguments, f"out={tmp_path}/cut")
    assert code == 2
    assert "resume=true" in error
    code, _, error = specdec(*arguments, "seed=9", "resume=true", f"out={tmp_path}/cut")
    assert code == 2
    assert "seed" in error

    assert specdec(*arguments, "resume=true", f"out={tmp_path}/cut")[0] == 0
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    summary = json.loads((tmp_path / "cut/summary.json").read_text())
    assert not summary["interrupted"]
    assert summary["tokens"] == sum(sum(s["tokens"]) for s in lines(tmp_path / "cut/steps.jsonl"))


def test_a_sweep_runs_every_job_and_reports_the_one_that_fails(specdec, tmp_path):
    code, printed, error = specdec(
        "-m", "drafter=ngram,small_llama", "tree.budget=4,-1", f"out={tmp_path}/s", *QUICK
    )
    summaries = sorted((tmp_path / "s").glob("*/summary.json"))
    assert code == 2
    assert error.count("error: tree.budget=-1") == 2
    assert [s.parent.name for s in summaries] == ["0", "2"]
    assert [json.loads(s.read_text())["drafter"] for s in summaries] == ["ngram", "small_llama"]
    assert "drafter=ngram" in printed


class Pair(Drafter):
    """A composition, as far as the runner is concerned."""

    def __init__(self, *, parts: dict[str, Drafter]) -> None:
        self.parts = parts


NGRAM = {"_target_": "specdec.drafters.ngram.NGram", "min_match": 2}
MODEL = {"_target_": "specdec.drafters.small_llama.SmallLlama", "path": "zoo:draft"}


def test_a_composition_gets_its_parts_built():
    settings = {
        "_target_": f"{__name__}.Pair",
        "parts": {"first": NGRAM, "second": {"_target_": f"{__name__}.twice", "depth": 2}},
    }
    built = build._drafter("pair", "drafter", settings)
    assert built.name == "pair"
    first, second = built.parts.values()
    assert list(built.parts) == ["first", "second"]
    assert isinstance(first, NGram)
    assert (first.name, first.min_match) == ("ngram", 2)
    assert (second.name, second.depth) == (f"test_run ({__name__}.twice)", 2)

    for wrong, expected in {
        "soon": "drafter.parts=soon: must be settings of drafters, by name",
        ("first", 3): "drafter.parts.first=3: must be the settings of a drafter",
        ("first", "min_match", "few"): "drafter.parts.first.min_match=few: must be a valid int",
        ("first", "min_match", 99): "drafter.parts.first.min_match=99, drafter.parts.first.max",
        ("first", "nonsense", 1): "drafter.parts.first.nonsense=1: NGram has no such setting",
        ("first", "_target_", "a.b"): "drafter.parts.first._target_=a.b: cannot be imported",
    }.items():
        parts: Any = wrong
        if isinstance(wrong, tuple):
            name, *setting, value = wrong
            parts = {name: {**NGRAM, setting[0]: value} if setting else value}
        with pytest.raises(ValueError, match=f"^{expected}".replace("[", r"\[")):
            build._drafter("pair", "drafter", {**settings, "parts": parts})


def test_children_are_sampled_if_all_parts_are_good_at_it():
    def samples(*parts: dict[str, Any]) -> bool:
        named = {str(number): part for number, part in enumerate(parts)}
        return build._prefers_sampling("drafter", {"_target_": f"{__name__}.Pair", "parts": named})

    assert samples(MODEL, MODEL)
    assert not samples(MODEL, NGRAM)
    assert build._prefers_sampling("drafter", MODEL)
    assert not build._prefers_sampling("drafter", NGRAM)


class Learner(NoDrafter):
    reset = "category"
    seen: ClassVar[set[str | None]] = set()

    def start(self, sequences: Sequence[Any]) -> None:
        self.seen |= {sequence.request.category for sequence in sequences}


def test_a_resumed_run_says_what_its_drafter_no_longer_knows(specdec, tmp_path, monkeypatch):
    arguments = ("drafter=none", f"drafter._target_={__name__}.Learner", f"out={tmp_path}/o")

    def interrupt(self: NoTracker, step: Any) -> None:
        if step.requests[0] >= 1000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "step", interrupt)
        assert specdec(*arguments, *QUICK, "baseline=false")[0] == 130
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert (summary["state"], summary["resumed"]) == ({"reset": "category"}, False)
    code, printed, _ = specdec(*arguments, *QUICK, "baseline=false", "resume=true")
    assert code == 0
    assert "resumed: what the 1 finished texts taught the drafter" in printed
    assert json.loads((tmp_path / "o/summary.json").read_text())["resumed"]
    categories = {g["category"] for g in lines(tmp_path / "o/generations.jsonl")}
    assert categories <= Learner.seen
    assert None not in categories


def test_synthetic_outputs_are_marked_wherever_they_go(specdec, tmp_path, monkeypatch):
    started: dict[str, Any] = {}
    monkeypatch.setattr(NoTracker, "start", lambda self, **kwargs: started.update(kwargs))
    code, printed, _ = specdec("drafter=synthetic", "ignore_eos=true", f"out={tmp_path}/o", *QUICK)
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert code == 0
    assert (summary["synthetic"], summary["acceptance"]) == (True, "synthetic")
    assert summary["lossless"] == {"refused": "SYNTHETIC acceptance: outputs are not the target's"}
    assert all(g["synthetic"] for g in lines(tmp_path / "o/generations.jsonl"))
    assert not any("synthetic" in g for g in lines(tmp_path / "o/baseline/generations.jsonl"))
    assert printed.count("SYNTHETIC") == 2  # the title, and instead of the lossless check
    assert started["config"]["synthetic"]
    assert started["name"].startswith("SYNTHETIC ")

    code, printed, _ = specdec(
        "-m", "drafter=ngram,synthetic", "baseline=false", f"out={tmp_path}/s", *QUICK
    )
    assert code == 0
    (row,) = (line for line in printed.splitlines() if "drafter=synthetic" in line and "│" in line)
    assert "SYNTHETIC" in row
    (row,) = (line for line in printed.splitlines() if "drafter=ngram" in line and "│" in line)
    assert "SYNTHETIC" not in row
    assert not json.loads((tmp_path / "s/0/summary.json").read_text())["synthetic"]


def test_the_probabilities_of_another_drafter_are_taken_for_rates_on_demand(specdec, tmp_path):
    arguments = ("drafter=small_llama", "acceptance=synthetic", "acceptance.allow_lossy=true")
    assert specdec(*arguments, "baseline=false", f"out={tmp_path}/o", *QUICK)[0] == 0
    assert json.loads((tmp_path / "o/summary.json").read_text())["synthetic"]


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
    assert code == 2
    assert error == (
        "error: drafter=user (failing_drafter.fail) failed on prompt a/2: IndexError: list index "
        f"out of range (failing_drafter.py:7); the traceback is in {own_folder}/o/error.txt, and "
        f"resume=true out={own_folder}/o continues\n"
    )
    assert "Traceback" not in printed
    written = (own_folder / "o/error.txt").read_text()
    assert "return [[tokens[len(tokens)]]]" in written
    assert [g["id"] for g in lines(own_folder / "o/generations.jsonl")] == ["a/1"]
    assert json.loads((own_folder / "o/summary.json").read_text())["interrupted"]

    code, printed, error = specdec(
        "-m", *arguments, "drafter._target_=failing_drafter.fail,failing_drafter.repeat", "out=s"
    )
    assert code == 2
    assert error.count("failed on prompt a/2: IndexError") == 1
    assert error.count("\n") == 1
    assert not json.loads((own_folder / "s/1/summary.json").read_text())["interrupted"]
    assert len(lines(own_folder / "s/1/generations.jsonl")) == 3

    own_folder.joinpath("failing_at_once.py").write_text(FAILING.format(limit=0))
    code, _, error = specdec(*arguments, "drafter._target_=failing_at_once.fail", "out=w")
    assert code == 2
    assert "failed on prompt a/1: " in error
    assert ", while warming up; " in error


def test_experiments_compose(specdec, tmp_path):
    code, _, _ = specdec("experiment=sampled", f"out={tmp_path}/o", *QUICK)
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert code == 0
    assert (summary["tree"], summary["acceptance"]) == ("static", "recursive_rejection")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published question files")
def test_published_questions_decode_with_both_turns(specdec, tmp_path):
    path = SHARED / "data/spec_bench.jsonl"
    code, _, _ = specdec(
        *("prompts=spec_bench", f"prompts.path={path}", "drafter=ngram", "batch_size=4"),
        *("tracker=none", "prompts.limit=4", "max_new_tokens=6", f"out={tmp_path}/o"),
    )
    generations = lines(tmp_path / "o/generations.jsonl")
    assert code == 0
    assert sorted((g["prompt"], g["turn"]) for g in generations) == [
        (prompt, turn) for prompt in range(4) for turn in range(2)
    ]
    first = {g["prompt"]: g for g in generations if g["turn"] == 0}
    for second in (g for g in generations if g["turn"] == 1):
        ids = first[second["prompt"]]["prompt_ids"]
        assert second["prompt_ids"][: len(ids)] == ids


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published question files")
def test_all_of_spec_bench_decodes(specdec, tmp_path):
    path = SHARED / "data/spec_bench.jsonl"
    code, _, _ = specdec(
        *("prompts=spec_bench", f"prompts.path={path}", "drafter=ngram", "batch_size=8"),
        *("tracker=none", "max_new_tokens=4", "baseline=false", f"out={tmp_path}/o"),
    )
    assert code == 0
    assert len({g["prompt"] for g in lines(tmp_path / "o/generations.jsonl")}) == 480
    assert len(lines(tmp_path / "o/generations.jsonl")) == 560


MISTAKES = {
    "nonsense=1": "nonsense: no such setting",
    "drafter.nonsense=1": "drafter.nonsense: no such setting",
    "+drafter.nonsense=1": "drafter.nonsense=1: SmallLlama has no such setting",
    "drafter=nonsense": "; none; ",
    "tree=nonsense": "chain; cost_aware; dynamic; optimal; paths; static; threshold",
    "batch_size=many": "batch_size=many: must be a valid integer",
    "batch_size=0": "batch_size=0: must be at least 1",
    "max_new_tokens=0": "max_new_tokens=0: must be at least 1",
    "seed=-1": "seed=-1",
    "dtype=int8": "dtype=int8: must be auto, float64",
    "device=abacus": "device=abacus: not available",
    "sampling.temperature=-1": "sampling.temperature=-1.0: must be 0",
    "sampling.temperature=warm": "sampling.temperature=warm: must be a valid number",
    "sampling.top_k=0": "sampling.top_k=0",
    "sampling.top_p=1.5": "sampling.top_p=1.5",
    "sampling.min_p=-0.1": "sampling.min_p=-0.1",
    "target.path=/no/such/model": "target.path=/no/such/model: no such folder",
    "target.path=zoo:lion": "target.path=zoo:lion: no such built-in model",
    "drafter.path=./no_such_model": "drafter.path=./no_such_model: no such folder",
    "drafter.depth=0": "drafter.depth=0: must be at least 1",
    "drafter.depth=deep": "drafter.depth=deep: must be a valid integer",
    "drafter.candidates=0": "drafter.candidates=0",
    "tree.budget=-1": "tree.budget=-1",
    "tree=dynamic tree.width=0": "tree.width=0",
    "tree.children=clones": "tree.children=clones: must be one of",
    "tree=static tree.widths=[4,4,4] tree.budget=8": "84 nodes exceed tree.budget=8",
    "tree=static tree.widths=[2,0]": "tree.widths=[2, 0]",
    "tree=static tree.widths=wide": "tree.widths=wide",
    "tree=static tree.widths=[2,2] drafter.depth=1": "drafter.depth=1: tree.widths=[2, 2] has 2",
    "drafter=ngram drafter.min_match=9": "drafter.min_match=9, drafter.max_match=8",
    "drafter=user": "drafter._target_: must be given",
    "drafter=user drafter._target_=no_such.thing": "drafter._target_=no_such.thing: cannot be",
    "drafter=user drafter._target_=json.nothing": "json.nothing: cannot be imported, Attribute",
    "drafter=user drafter._target_=json.JSONDecoder": "must be a function, or a class derived",
    "drafter=user drafter._target_=json": "drafter._target_=json: must be a function",
    "drafter=user drafter._target_=json.loads +drafter.function=1": "has no such setting",
    "~drafter.path": "drafter: cannot build SmallLlama of these settings, missing a required arg",
    "drafter=synthetic drafter.rates=1.5": "drafter.rates=1.5: depth 1 has [1.5]; each must be",
    "drafter=synthetic drafter.rates=[0.5,[0.6,0.5]]": "depth 2 has [0.6, 0.5]; siblings exclude",
    "drafter=synthetic drafter.rates=often": "drafter.rates=often: must be a valid number",
    "drafter=synthetic tree.children=sample": "tree.children=sample: drafter.rates are chances",
    "drafter=synthetic acceptance=greedy": "works with acceptance=synthetic alone",
    "acceptance=synthetic": "acceptance=synthetic: not lossless",
    "acceptance=greedy sampling=sample": "acceptance=greedy: not lossless",
    "acceptance=recursive_rejection tree.children=top_k sampling=sample": "not lossless",
    "acceptance=k_seq tree.children=sample sampling=sample": "takes distinct children for indep",
    "acceptance=traversal tree.children=top_k sampling=sample": "takes top-k children for draws",
    "acceptance=block tree=dynamic sampling=sample": "judges chains alone, and a node of tree=dyn",
    "acceptance=typical acceptance.epsilon=2": "acceptance.epsilon=2.0: must be between 0 and 1",
    "acceptance=relaxed acceptance.top_n=0": "acceptance.top_n=0: must be at least 1",
    "acceptance=relaxed": "acceptance=relaxed: not lossless",
    "acceptance=block +acceptance.epsilon=1": "acceptance.epsilon=1: Block has no such setting",
    "cache.pages=2": "cache.pages=2: ",
    "cache.page_size=0": "cache.page_size=0",
    "cache.dtype=fp4": "cache.dtype=fp4: must be auto, fp8_e4m3, int8",
    "kernels=fast": "auto; reference; triton",
    "kernels.impl=cuda": "kernels.impl=cuda: must be 'auto', 'triton' or 'reference'",
    "kernels.fixed_splits=0": "kernels.fixed_splits=0: must be at least 1",
    "kernels.shared_prefix=both": "kernels.shared_prefix=both: must be a valid boolean",
    "prompts.path=/no/such/file.jsonl": "/no/such/file.jsonl",
    "prompts.limit=0": "prompts.limit=0",
    "prompts.chat=loud": "prompts.chat='loud'",
    "prompts=file": "prompts.path: must be given",
    "tracker=wandb tracker.mode=loud": "tracker.mode=loud",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(specdec, tmp_path, mistake):
    typed = mistake.split()
    rest = [q for q in QUICK if q.split("=")[0] not in {t.split("=")[0] for t in typed}]
    code, printed, error = specdec(*typed, *rest, f"out={tmp_path}/o")
    assert code == 2
    assert error.startswith("error: ")
    assert MISTAKES[mistake] in error
    assert error.count("\n") == 1
    assert printed == ""
    assert not (tmp_path / "o/generations.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ('{"text": "a"}\n{"text": "  "}\n', "blank"),
        ('{"nothing": 1}\n', "nothing"),
        ("", "holds no records"),
        (json.dumps({"text": "word " * 5000}), "leave no room in the context of 4096"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line_or_number(specdec, tmp_path, content, expected):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    code, _, error = specdec(f"prompts.path={path}", "tracker=none", f"out={tmp_path}/o")
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


def test_another_vocabulary_is_refused(specdec, tmp_path):
    folder = SHARED / "models/stories260k"
    if not folder.is_dir():
        pytest.skip("needs a model with another vocabulary")
    code, _, error = specdec(f"drafter.path={folder}", f"out={tmp_path}/o", *QUICK)
    assert code == 2
    assert "its vocabulary is not the target's (512 and 8192 tokens" in error
