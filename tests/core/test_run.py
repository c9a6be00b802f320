"""The command line as a user types it: every drafter, tree and rule; sweeps, mistakes."""

import itertools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from specdec.models.load import Models, load_model, zoo_path
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.mtp import MTP
from tests.heads.blocks import dflash
from tests.heads.made import begun, eagle3, medusa
from tests.models.tiny import disturbed, save, tiny
from tests.running import QUICK, ROOT, SHARED, SMALL_TARGET, jobs, lines, outputs, summary_of

pytestmark = pytest.mark.usefixtures("load_once")


def twice(tokens: list[int]) -> list[Sequence[int]]:
    """A drafter of the user's."""
    return [tokens[-2:], tokens[-1:]]


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "configs" / group).glob("*.yaml") if p.stem[0] != "_")


@pytest.fixture(scope="session")
def needed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What a drafter cannot do without."""

    def settings(drafter: str) -> list[str]:
        if drafter == "user":
            return [f"drafter._target_={__name__}.twice"]
        if drafter == "medusa":
            config = AutoConfig.from_pretrained(zoo_path("target", "target"))
            folder = tmp_path_factory.mktemp("heads")
            medusa(folder, SimpleNamespace(config=config), heads=8)
            return [f"drafter.path={folder}"]
        if drafter in ("dflash", "dspark"):
            folder = tmp_path_factory.mktemp("heads")
            model = load_model("zoo:target").model
            markov = "gated" if drafter == "dspark" else ""
            dflash(folder, model, layout="speculators", slots=9, markov=markov)
            return [f"drafter.path={folder}"]
        if drafter == "peagle":
            folder = tmp_path_factory.mktemp("heads")
            model, size = load_model("zoo:target").model, {"target_hidden_size": 384}
            eagle3(folder, model, layout="speculators", taps=(1, 3, 5), mask=7, config=size)
            return [f"drafter.path={folder}"]
        if drafter in ("eagle", "mtp"):
            folder = tmp_path_factory.mktemp("heads")
            begun(folder, load_model("zoo:target"), Eagle() if drafter == "eagle" else MTP())
            return [f"drafter.path={folder}"]
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


# Each drafter once, each tree with the default one; tests/drafters has all pairs.
LOSSLESS = [name for name in options("drafter") if name != "synthetic"]
PAIRS = [(name, tree) for name, tree in zip(LOSSLESS, itertools.cycle(options("tree")))]
PAIRS += [("small_llama", tree) for tree in options("tree")]


@pytest.mark.some(1)
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
    summary = summary_of(tmp_path / "o")
    assert code == 0
    found = summary["lossless"]
    assert (found["verdict"], found["checked"], found["identical"]) == ("passed", 3, 3)
    assert (found["tokens"], found["impossible"]) == (summary["tokens"], 0)
    assert outputs(tmp_path / "o") == outputs(tmp_path / "o/baseline")


LOSSY = ("greedy", "synthetic", "typical", "relaxed")
RULED = [(name, "auto") for name in options("drafter")]
RULED += [("small_llama", rule) for rule in options("acceptance")]


@pytest.mark.some(1)
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


def test_the_grid_has_all_policies_and_rules():
    grid = yaml.safe_load((ROOT / "configs/experiment/grid.yaml").read_text())
    params = grid["hydra"]["sweeper"]["params"]
    assert set(params["tree"].split(",")) == set(options("tree"))
    assert set(params["acceptance"].split(",")) == set(options("acceptance")) - {
        "auto",
        "synthetic",
    }


@pytest.mark.slow
def test_a_grid_verifies_what_is_lossless_and_refuses_the_rest(specdec, tmp_path):
    """Three rules on two trees at two temperatures, with a budget of tokens that shows a bias."""
    code, printed, error = specdec(
        *("-m", "experiment=grid", "tree=chain,static", "acceptance=block,traversal,typical"),
        *("sampling=sample,greedy", "tracker=none", "prompts.limit=2", "max_new_tokens=24"),
        f"out={tmp_path}/g",
    )
    found = [summary_of(job) for job in jobs(tmp_path / "g")]
    warm = [one for one in found if one["temperature"] > 0]
    assert code == 2
    assert sorted((one["tree"], one["acceptance"]) for one in warm) == [
        ("chain", "block"),
        ("chain", "traversal"),
        ("static", "traversal"),
    ]
    for one in warm:
        assert one["lossless"]["verdict"] == "passed"
        assert (one["lossless"]["tokens"], one["lossless"]["impossible"]) == (one["tokens"], 0)
    cold = [one for one in found if one["temperature"] == 0]
    assert len(cold) == 6  # at temperature 0 chains of rules and lossy ones are greedy
    assert all(one["lossless"]["identical"] == 2 for one in cold)
    assert error.count("\n") == 3
    assert error.count("not lossless, typical acceptance prefers") == 2
    assert "acceptance=block: judges chains alone, and a node of tree=static may have" in error
    sweep, _, refused = printed.partition("refused")
    assert sweep.count("p=") == 3
    assert "acceptance=block" in refused
    assert refused.count("acceptance=typical") >= 3  # a reason, and the runs it is the reason for


@pytest.mark.slow
def test_triton_decodes_what_the_reference_decodes(specdec, tmp_path):
    prompts, model = tmp_path / "prompts.jsonl", tiny("llama", num_hidden_layers=2)
    prompts.write_text('{"text": "w3 w1 w4 w1"}\n')
    target = save(model, tmp_path / "target")
    draft = save(disturbed(model, 0.3), tmp_path / "draft")
    for kernels in ("reference", "triton"):
        code, _, error = specdec(
            *(f"kernels={kernels}", f"prompts.path={prompts}", f"out={tmp_path}/{kernels}"),
            *("target=hf", f"target.path={target}", f"drafter.path={draft}"),
            *("drafter=small_llama", "tree=static", "tree.widths=[2]", "batch_size=1"),
            *("cache.page_size=4", "dtype=float32", "tracker=none", "max_new_tokens=6"),
            "baseline=false",
        )
        assert (code, error) == (0, "")
        summary = summary_of(tmp_path / kernels)
        assert summary["kernels"] == kernels
        assert summary["graphs"]["obstacle"] is None
        assert summary["graphs"]["counts"]["verify"]["called"] >= summary["steps"]
        assert 0 < summary["acceptance_by_depth"][0] < 1  # both branches of the loop were taken
    assert outputs(tmp_path / "triton") == outputs(tmp_path / "reference")


def test_triton_is_refused_where_it_cannot_run(specdec, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Models, "load", None)  # before any model is loaded
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
        specdec(
            f"drafter={drafter}",
            "tree.budget=0",
            f"out={tmp_path}/{drafter}",
            *QUICK,
            SMALL_TARGET,
        )
        summary = summary_of(tmp_path / drafter)
        assert summary["drafted_per_step"] == 0
        assert summary["mean_accepted_length"]["pooled"] == 1
        assert summary["lossless"]["identical"] == 3


def test_a_sweep_runs_every_job_and_reports_the_one_that_fails(specdec, tmp_path):
    code, printed, error = specdec(
        *("-m", "drafter=ngram,small_llama", "tree.budget=4,-1", f"out={tmp_path}/s"),
        *(*QUICK, SMALL_TARGET),
    )
    summaries = sorted((tmp_path / "s").glob("*/summary.json"))
    assert code == 2
    assert error.count("error: tree.budget=-1") == 2
    assert len(summaries) == 2
    assert [json.loads(s.read_text())["drafter"] for s in summaries] == ["ngram", "small_llama"]
    assert "drafter=ngram" in printed


def test_experiments_compose(specdec, tmp_path):
    code, printed, _ = specdec("experiment=sampled", f"out={tmp_path}/o", *QUICK)
    assert "takes -m" not in printed
    summary = summary_of(tmp_path / "o")
    assert code == 0
    assert (summary["tree"], summary["acceptance"]) == ("static", "recursive_rejection")
    one = ("experiment=budgets", f"out={tmp_path}/p", *QUICK, "baseline=false")
    code, printed, _ = specdec(*one)
    assert code == 0
    assert "experiment=budgets: its sweep over tree.budget takes -m; this is one run" in printed


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
    "nonsense=1": "nonsense: no such setting; python -m specdec.run --help lists them",
    "drafter.nonsense=1": "drafter.nonsense: no such setting",
    "+drafter.nonsense=1": "drafter.nonsense=1: SmallLlama has no such setting",
    "drafter=nonsense": "no such option; the nearest is none; there are compose, ",
    "tree=nonsense": "chain, cost_aware, dynamic, optimal, paths, static, threshold",
    "tree=chian": "tree=chian: no such option; the nearest is chain; there are accuracy, ",
    "batch_size=many": "batch_size=many: must be a valid integer",
    "batch_size=0": "batch_size=0: must be at least 1",
    "max_new_tokens=0": "max_new_tokens=0: must be at least 1",
    "dtype=int8": "dtype=int8: must be auto, float64",
    "device=abacus": "device=abacus: not available",
    "sampling.temperature=-1": "sampling.temperature=-1.0: must be 0",
    "sampling.temperature=warm": "sampling.temperature=warm: must be a valid number",
    "sampling.top_k=0": "sampling.top_k=0",
    "sampling.top_p=1.5": "sampling.top_p=1.5",
    "sampling.min_p=-0.1": "sampling.min_p=-0.1",
    "target.path=/no/such/model": "target.path=/no/such/model: no such folder",
    "target.path=zoo:eagle3": "a whole model is asked for; use drafter=eagle3 drafter.path=",
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
    "~drafter.path": "drafter.path: must be given, SmallLlama has no default of it",
    "drafter=synthetic drafter.rates=1.5": "drafter.rates=1.5: depth 1 has [1.5]; each must be",
    "drafter=synthetic drafter.rates=[0.5,[0.6,0.5]]": "depth 2 has [0.6, 0.5]; siblings exclude",
    "drafter=synthetic drafter.rates=often": "drafter.rates=often: must be a valid number",
    "drafter=synthetic tree.children=sample": "tree.children=sample: drafter.rates are chances",
    "drafter=synthetic acceptance=greedy": "greedy: drafter=synthetic works with acceptance=syn",
    "acceptance=synthetic": "acceptance=synthetic: not lossless",
    "acceptance=synthetic acceptance.rates=[1.2]": "acceptance.rates=[1.2]: depth 1 has [1.2]",
    "drafter=own_cache drafter.sink=-1": "drafter.sink=-1: must be at least 0 tokens",
    "drafter=own_cache drafter.sink=0 drafter.window=0": "drafter.window=0: with drafter.sink=0 a",
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
    "kernels=fast": "auto, reference, triton",
    "kernels.impl=cuda": "kernels.impl=cuda: must be 'auto', 'triton' or 'reference'",
    "kernels.exact=true": "kernels.exact=true: products of plain torch round by the number of",
    "kernels.exact=both": "kernels.exact=both: must be a valid boolean",
    "kernels.shared_prefix=both": "kernels.shared_prefix=both: must be a valid boolean",
    "prompts.path=/no/such/file.jsonl": "/no/such/file.jsonl",
    "prompts.limit=0": "prompts.limit=0",
    "prompts.limit=few": "prompts.limit=few: must be a valid integer",
    "prompts.limit=1.5": "prompts.limit=1.5: must be a valid integer",
    "prompts.path=7": "prompts.path=7: must be a valid string",
    "tree.widths=[1": "tree.widths=[1: must be group=option, or setting=value with the value in",
    "drafter": "drafter: must be group=option",
    "prompts.samples=0 sampling=sample": "prompts.samples=0: must be at least 1",
    "+prompts.sample=3": "prompts.sample=3: there is no such setting",
    "prompts.samples=3": "prompts.samples=3: at temperature 0 all of them are the same; use",
    "prompts.chat=loud": "prompts.chat=loud: must be one of auto, always, never",
    "prompts=file": "prompts.path: must be given",
    "tracker=wandb tracker.mode=loud": "tracker.mode=loud",
}


@pytest.mark.some(12)
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


def test_a_tree_that_cannot_be_drafted_is_refused_before_anything_is_loaded(specdec, tmp_path):
    code, printed, error = specdec(
        *("tree=static", "tree.widths=[2,2]", "drafter.depth=1"),
        *("target.path=/no/such/model", f"out={tmp_path}/o", *QUICK),
    )
    assert (code, printed) == (2, "")
    assert error.startswith("error: drafter.depth=1: tree.widths=[2, 2] has 2 levels; ")
    assert not (tmp_path / "o").exists()


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
