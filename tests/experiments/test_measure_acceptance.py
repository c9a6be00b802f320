"""experiments/tools/measure_acceptance.py against models that are run position by position, and
against what trees really yield."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor

from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.fixed import FixedShape
from specdec.drafters.trees.shapes import Shape, expected_accepted
from specdec.experiments.tools import measure_acceptance
from specdec.experiments.tools.acceptance_watch import Watch
from specdec.experiments.tools.measure_acceptance import (
    Bench,
    Case,
    Options,
    case_of,
    check,
    static_shape,
    wide_shape,
)
from specdec.lab.command import parse
from specdec.models import load
from specdec.models.paged import PagedLM
from specdec.protocols import AcceptanceRule, StepContext
from specdec.rates import AcceptanceRates
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from tests.decoding import decoder_of, outputs_of
from tests.tiny import PROMPT, tiny_llama
from tests.verifier.laws import ALPHA, exact_law

pytestmark = pytest.mark.usefixtures("load_once")

SHAPE: Shape = frozenset({(0,), (1,), (2,), (0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)})
CASES = [
    Case("top_k", 0.0, None),
    Case("top_k", 0.8, None),
    Case("top_k", 1.0, 0.9),
    Case("sample", 1.0, None),
    Case("sample", 0.7, 0.9),
    Case("sample_with_replacement", 1.0, None),
]
TREES = ([1, 1, 1], [4, 2, 1], [2, 2, 2])


class Recording(AcceptanceRule):
    """A rule that keeps the trees it has judged, with the tokens they grew from."""

    def __init__(self, rule: AcceptanceRule) -> None:
        self.rule, self.name, self.needs_proposal = rule, rule.name, rule.needs_proposal
        self.trees: list[tuple[int, list[int], list[int], list[int]]] = []

    def lossy(self, *_: Any) -> None:
        return None

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        for row, sequence in enumerate(context.sequences):
            size = int(tree.size[row])
            nodes = tree.tokens[row, :size].tolist(), tree.parents[row, :size].tolist()
            self.trees.append((sequence.request.id, list(sequence.tokens), *nodes))
        return self.rule.accept(context, tree, logits)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, transformers.LlamaForCausalLM]:
    """Two small random models, which are found by their names."""
    models = {"target": tiny_llama(seed=0, layers=2), "draft": tiny_llama(seed=1, layers=1)}
    monkeypatch.setattr(
        load, "load_model", lambda path, *_, **__: PagedLM(copy.deepcopy(models[path]))
    )
    return models


def rule_of(case: Case) -> AcceptanceRule:
    if not case.temperature:
        return Greedy()
    return TargetOnly() if case.children == "top_k" else RecursiveRejection()


def decode(
    case: Case,
    shape: Shape,
    rule: AcceptanceRule,
    prompts: list[list[int]],
    tokens: int,
    draft: str = "draft",
) -> list[list[int]]:
    """Outputs of the tiny models."""
    decoder = decoder_of(
        load.load_model("target"),
        SmallLlama(path=draft),
        FixedShape(shape=shape, children=case.children),
        rule,
        sampling=SamplingParams(temperature=case.temperature, top_p=case.top_p, seed=5),
        rows=min(len(prompts), 64),
    )
    return outputs_of(decoder, prompts, tokens)


def law(model: transformers.LlamaForCausalLM, context: list[int], case: Case) -> np.ndarray:
    """The model's distribution of the next token, float64 [V]; at temperature 0 that of 1."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1].double().numpy()
    scores = logits / (case.temperature or 1.0)
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    if case.top_p is not None:
        order = np.argsort(-probs)
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= case.top_p]] = 0.0
        probs /= probs.sum()
    return probs


def by_hand(children: list[int], p: np.ndarray, q: np.ndarray, case: Case) -> Iterator[float]:
    """The chance of each child to be the one accepted, tried one after the other."""
    left = 1.0
    for child in children:
        if case.temperature == 0.0:
            chance = float(child == p.argmax())
        elif case.children == "top_k":
            chance = p[child]
            p = np.where(np.arange(len(p)) == child, 0.0, p)
            p = p / p.sum() if p.sum() > 0 else p
        else:
            chance = min(1.0, p[child] / q[child])
            p = np.maximum(p - q, 0.0)
            p = p / p.sum() if p.sum() > 0 else p
            if case.children == "sample":
                q = np.where(np.arange(len(q)) == child, 0.0, q)
                q = q / q.sum() if q.sum() > 0 else q
        yield left * chance
        left *= 1.0 - chance


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rates_are_those_of_the_models_alone(
    case: Case, tiny: dict[str, transformers.LlamaForCausalLM]
) -> None:
    """Every node of every tree is judged again with transformers' own passes."""
    recording = Recording(rule_of(case))
    watch = Watch(recording, SHAPE)
    decode(case, SHAPE, watch, [PROMPT[:length] for length in (2, 3, 5)], 9)
    sums = np.zeros((3, 2, 4))  # by request: accepted by depth and rank, then reached
    for request, text, tokens, parents in recording.trees:
        paths: list[tuple[int, ...]] = [()]
        contexts, reach = [text], [1.0]
        for parent in range(len(tokens)):
            children = [node for node, above in enumerate(parents) if above == parent]
            depth = len(paths[parent])
            if any(len(node) == depth + 1 and node[:-1] == paths[parent] for node in SHAPE):
                sums[request, depth, -1] += reach[parent]
            p, q = (law(tiny[name], contexts[parent], case) for name in ("target", "draft"))
            found = by_hand([tokens[child] for child in children], p, q, case)
            for rank, (child, chance) in enumerate(zip(children, found, strict=True)):
                assert child == len(paths)
                paths.append((*paths[parent], rank))
                contexts.append([*contexts[parent], tokens[child]])
                reach.append(reach[parent] * chance)
                sums[request, depth, rank] += reach[child]
    estimate = watch.estimate()
    accepted, reached = sums[..., :-1], sums[..., -1:]
    rates = accepted.sum(0) / reached.sum(0)
    np.testing.assert_allclose(estimate.rates, rates, atol=2e-5)
    np.testing.assert_allclose(estimate.reached, reached.sum(0)[:, 0], rtol=1e-4)
    assert estimate.steps == len(recording.trees)
    # The error of a ratio of sums over prompts, as in any textbook of survey sampling.
    errors = (accepted - rates * reached).std(0, ddof=1) * np.sqrt(3) / reached.sum(0)
    np.testing.assert_allclose(estimate.errors, errors, atol=2e-5)


@pytest.mark.usefixtures("tiny")
def test_a_draft_like_the_target_is_always_accepted() -> None:
    case, shape = Case("sample", 1.0, None), frozenset({(0,), (0, 0)})
    watch = Watch(rule_of(case), shape)
    decode(case, shape, watch, [PROMPT, PROMPT[1:]], 9, draft="target")
    np.testing.assert_allclose(watch.estimate().rates, [[1.0], [1.0]], atol=1e-4)


@pytest.mark.some(1)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=lambda case: case.name)
def test_cut_steps_lose_nothing(
    case: Case, tiny: dict[str, transformers.LlamaForCausalLM]
) -> None:
    """Tokens at temperature above 0 follow the target's law, whatever is kept."""
    count, tokens = 900, 3
    watch = Watch(rule_of(case), SHAPE, kept=[(0,), (2,), (2, 1)])
    outputs = decode(case, SHAPE, watch, [PROMPT] * count, tokens)
    exact = exact_law(tiny["target"], SamplingParams(temperature=case.temperature), tokens)
    expected = np.array([count * chance for chance in exact.values()])
    found = np.array([outputs.count(list(text)) for text in exact])
    likely = expected >= 5
    expected = np.append(expected[likely], expected[~likely].sum())
    found = np.append(found[likely], found[~likely].sum())
    assert stats.chisquare(found, expected).pvalue > ALPHA


def test_steps_end_where_the_kept_nodes_do() -> None:
    """A greedy walk down (1), (1, 0), of which some is kept."""
    tokens, parents = torch.tensor([[7, 1, 2, 3, 4]]), torch.tensor([[-1, 0, 0, 2, 2]])
    tree = TokenTree(tokens=tokens, parents=parents.int(), size=torch.tensor([5]), depth=2)
    after = {0: 2, 2: 3, 3: 6}  # what the target says after nodes
    logits = torch.zeros(1, 5, 8)
    for node, token in after.items():
        logits[0, node, token] = 1.0
    context = StepContext(
        sequences=[],
        roots=tokens[:, 0],
        sampling=SamplingParams(),
        uniforms=lambda stream, count: torch.zeros(1, count, dtype=torch.float64),
    )
    shape = frozenset({(0,), (1,), (1, 0), (1, 1)})
    for kept, new in [(None, [2, 3, 6]), ([(1,)], [2, 3]), ([(0,), (1, 0)], [2]), ([], [2])]:
        found = Watch(Greedy(), shape, kept=kept).accept(context, tree, logits)
        assert found.new_tokens(tree)[0, : int(found.length)].tolist() == new


def test_the_widest_nodes_are_the_likeliest() -> None:
    rates = AcceptanceRates(values=[[0.5, 0.3, 0.1]])
    shape = wide_shape(rates, ranks=3, depth=3, expand=2)
    expanded = {node[:-1] for node in shape}
    assert expanded == {(), (0,), (1,), (0, 0), (0, 1)}
    assert len(shape) == 3 * len(expanded)


# With the zoo pair


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    texts = ("def fibonacci(n):\n    ", "Once upon a time", "import os\n\n\ndef ", "The sea is")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def options_of(*words: str) -> Options:
    return parse(Options, ["device=cpu", "out=x", *words])


def test_predictions_are_exact_for_the_tree_that_was_watched() -> None:
    """At temperature 0 chances are outcomes, so that the rates of a tree count what it accepts."""
    bench, case = Bench(options_of("prompts=3", "tokens=12")), Case("top_k", 0.0, None)
    shape, method = static_shape([3, 2, 1]), bench.method(case)
    watch = Watch(method.rule, shape)
    bench.decode(replace(method, tree=FixedShape(shape=shape), rule=watch))
    rates = watch.estimate().rates.tolist()
    found = check(bench, {**case._asdict(), "rates": rates}, [3, 2, 1])
    assert found["predicted"] == pytest.approx(found["measured"], abs=1e-5)
    assert expected_accepted(shape, AcceptanceRates(values=rates)) > 1


def test_file_and_resume(
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rates.json"
    small = ["device=cpu", "prompts=2", "tokens=6", "ranks=3", "depth=2", "expand=2"]
    small += [f"mt_bench={prompts}", f"out={out}", "temperatures=[0,1]"]
    assert measure_acceptance.main([*small, "children=top_k"]) == 0
    before = json.loads(out.read_text())
    assert [case_of(entry).name for entry in before["cases"]] == ["top_k, T=0", "top_k, T=1"]

    more = [*small, "children=[top_k,sample]", "top_p=0.9", "resume=true", "check=[[2,1]]"]
    assert measure_acceptance.main(more) == 0
    result = json.loads(out.read_text())
    names = {case_of(entry).name: entry for entry in result["cases"]}
    assert list(names)[2:] == ["top_k, T=1, top-p 0.9", "sample, T=1", "sample, T=1, top-p 0.9"]
    assert result["cases"][:2] == before["cases"]
    assert result["command"].count("measure_acceptance") == 2
    assert {"hardware", "versions", "git"} <= result.keys()
    assert result["sets"] == {"mt_bench": ["0", "2"]}  # spread over the file
    for entry in result["cases"]:
        assert entry["acceptance"] == rule_of(case_of(entry)).name
        assert all(sum(row) <= 1.0 for row in entry["rates"])
        assert [len(row) for row in entry["errors"]] == [3] * len(entry["reached"])
        assert entry["reached"][0] == entry["steps"]
    loaded = AcceptanceRates.load(out, children="sample", temperature=1.0)
    assert loaded.values.tolist() == names["sample, T=1"]["rates"]
    assert [tuple(entry["widths"]) for entry in result["checks"]] == [(2, 1)] * 5
    predicted = result["checks"][0]["predicted"]
    row, below = before["cases"][0]["rates"]
    assert predicted == pytest.approx(1 + sum(row[:2]) * (1 + below[0]), abs=1e-5)

    monkeypatch.setattr(Bench, "decode", None)  # nothing is missing
    assert measure_acceptance.main(more) == 0
    more.remove("tokens=6")
    assert measure_acceptance.main([*more, "tokens=9"]) == 2
    assert "tokens=6 there, 9 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["ranks=0"], "ranks=0: must be greater than or equal to 1"),
        (["check=[[2,0]]"], "check=[[2, 0]]: must be greater"),
        (["children=sample", "temperatures=0"], "temperatures=0: children are"),
        (["temperatures=-1"], "sampling.temperature=-1.0: must be"),
        (["target=zoo:none"], "target=zoo:none: no such built-in model"),
        (["humaneval=none.jsonl"], "'none.jsonl' is not a file"),
        (["prompts=1"], "prompts=1: does not say"),
        (["drafter=lookahead"], "drafter=lookahead: must be one of small_llama"),
    ],
)
def test_mistakes_are_named_in_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure_acceptance.main(["device=cpu", f"out={tmp_path}/o.json", *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def predictions(*more: str) -> list[float]:
    """How far off the yields of `TREES` are, by the rates of a case."""
    options = options_of(*more)
    bench = Bench(options)
    (case,) = measure_acceptance.cases_of(options)
    entry = measure_acceptance.measure(bench, case)
    return [check(bench, entry, widths)["relative_error"] for widths in TREES]


@pytest.mark.slow
def test_yields_are_predicted() -> None:
    """At temperature 0 nothing but the positions where steps begin differs from tree to tree."""
    settings = ["prompts=5", "tokens=24", "ranks=4", "depth=3", "expand=2"]
    off = predictions(*settings, "children=top_k", "temperatures=0")
    assert max(map(abs, off)) < 0.05, off


@pytest.mark.slow
@pytest.mark.parametrize(("children", "temperature"), [("top_k", 0), ("sample", 1)])
def test_yields_are_predicted_over_many_tokens(children: str, temperature: int) -> None:
    settings = ["prompts=40", "tokens=128", "ranks=4", "depth=3", "expand=4", "batch=8"]
    off = predictions(*settings, f"children={children}", f"temperatures={temperature}")
    assert max(map(abs, off)) < 0.05, off
