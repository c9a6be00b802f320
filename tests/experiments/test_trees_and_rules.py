"""experiments/studies/trees_and_rules.py with the zoo pair on a CPU: grids, records, tables and
plots."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.shapes import expected_accepted
from specdec.experiments.figures import trees_and_rules_plot as shown
from specdec.experiments.studies import trees_and_rules as study
from specdec.experiments.tools.measure_acceptance import static_shape
from specdec.lab.build import method_of
from specdec.lab.command import parse
from specdec.lab.settings import settings_of
from specdec.rates import AcceptanceRates
from specdec.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("load_once")
TEXTS = ("def fibonacci(n):\n    ", "class Stack:\n    def __init__(self")
WARM = SamplingParams(temperature=study.TEMPERATURE)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    code = [{"task_id": f"a/{i}", "prompt": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(r) + "\n" for r in code))
    sizes = ["device=cpu", "tokens=6", "prompts=2", "batch=2", "costs=cpu"]
    return [f"humaneval={tmp_path}/code.jsonl", *sizes, f"out={tmp_path}/out.json"]


@pytest.mark.some(1)
@pytest.mark.parametrize("grid", ["lengths", "speed"])
def test_methods_are_lossless_keep_budgets_and_have_names(words: list[str], grid: str) -> None:
    options = parse(study.Options, [*words, f"grid={grid}"])
    budgets = options.budgets if grid == "lengths" else [0]
    for budget in budgets:
        found = list(study.lengths(budget, options) if budget else study.speed(options))
        assert len({method.name for method in found}) == len(found)
        policies = {method.policy for method in found if method.axis == "policy"}
        if budget:
            folder = Path(__file__).parents[2] / "configs/tree"
            assert policies == {path.stem for path in folder.glob("*.yaml")}
        lossless = {"target_only", "recursive_rejection", "tokenwise", "k_seq", "block"}
        lossless |= {"traversal", "multi_path"}
        assert {method.rule for method in found} == lossless
        for method in found if budget in (0, 8) else ():
            built = method_of(settings_of(f"{method.words} sampling.temperature=1.0"))
            assert built.rule.lossy(built.tree.children, WARM) is None
            assert built.tree.children == method.children
            assert not budget or built.tree.budget <= budget
            assert isinstance(built.tree, Chain) == (method.policy == "chain")


@pytest.mark.slow
def test_from_prompts_to_tables_and_plots(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "CHAINS", (1, 2))
    monkeypatch.setattr(study, "THRESHOLDS", (0.1,))
    wanted = [*words, "grid=lengths", "budgets=8"]
    assert study.main(wanted) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for entry in result["methods"].values():
        assert [prompt["tokens"] for prompt in entry["prompts"].values()] == [6, 6]
    chains = [one for one in result["methods"].values() if one["policy"] == "chain"]
    assert len(chains) == 2 * 1 + 2 * 2  # one per length as a policy, and under either rule
    best = shown.best(result, "policy", 8)
    assert set(best) == {
        *("chain", "static", "paths", "dynamic", "threshold", "optimal", "accuracy"),
        "cost_aware",
    }
    ratio, low, high = shown.compared(best["optimal"], shown.chain_of(result, 8)).around
    assert low <= ratio <= high
    text = shown.tree_lengths(result)
    assert "| policy | 8 nodes |" in text
    assert "| `traversal` (with replacement) | " in text
    for axis in ("policy", "rule"):
        shown.PLOTS["trees" if axis == "policy" else "rules"](result, tmp_path / f"{axis}.png")
        assert (tmp_path / f"{axis}.png").stat().st_size > 10_000

    missing = list(result["methods"])[-1]  # what an interruption would have left out
    whole = result["methods"].pop(missing)
    (tmp_path / "out.json").write_text(json.dumps(result))
    assert study.main([*wanted, "resume=true"]) == 0
    again = json.loads((tmp_path / "out.json").read_text())["methods"][missing]
    assert {name: one["steps"] for name, one in again["prompts"].items()} == {
        name: one["steps"] for name, one in whole["prompts"].items()
    }


@pytest.mark.slow
def test_speed_takes_turns_and_compares_with_fixed_trees(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TIMED", (2,))
    monkeypatch.setattr(study, "FIXED", ((2, 1),))
    monkeypatch.setattr(study, "FIXED_DEEP", ())
    assert study.main([*words, "grid=speed"]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    aware = result["methods"]["0 policy: cost_aware , recursive_rejection, sampled"]
    assert aware["choice"]["tokens"] >= 1
    assert len(aware["choice"]["paths"]) == aware["nodes"]
    assert all(len(one["prompts"]) == 2 for one in result["methods"].values())
    text = shown.tree_speed(result)
    assert "| `cost_aware` | `recursive_rejection` | sampled |" in text
    assert "| `none` | `target_only` |" in text


def test_measured_lengths_of_fixed_trees_are_those_predicted_from_measured_rates() -> None:
    """Chains and static trees timed on a GPU, where at least 10,000 tokens of each were decoded,
    against rates measured elsewhere, on a few of the prompts."""
    rates = AcceptanceRates.load("zoo", children="sample", temperature=study.TEMPERATURE)
    counts: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
    for name in ("tree_speed", "tree_speed_batch8"):
        path = Path(__file__).parents[2] / f"experiments/results/{name}.json"
        for entry in json.loads(path.read_text())["methods"].values():
            if entry["rule"] not in ("tokenwise", "recursive_rejection"):
                continue
            widths = (1,) * entry["nodes"]
            if entry["policy"] == "static":
                widths = tuple(map(int, entry["setting"].split(",")))
            if entry["policy"] in ("static", "chain"):
                for prompt in entry["prompts"].values():
                    counts[widths].update(tokens=prompt["tokens"], steps=prompt["steps"])
    decoded = {widths: count for widths, count in counts.items() if count["tokens"] > 10_000}
    assert len(decoded) >= 8
    for widths, count in decoded.items():
        predicted = 1 + expected_accepted(static_shape(widths), rates)
        assert predicted == pytest.approx(count["tokens"] / count["steps"], rel=0.05), widths


@pytest.mark.parametrize("name", ["tree_speed", "tree_speed_batch8"])
def test_the_cost_aware_tree_is_as_fast_as_the_best_of_the_measured_grid(name: str) -> None:
    path = Path(__file__).parents[2] / f"experiments/results/{name}.json"
    methods = json.loads(path.read_text())["methods"].values()
    speeds = {
        policy: max(
            shown.pooled(entry)["tokens_per_second"]
            for entry in methods
            if entry["policy"] == policy and entry["rule"] in ("tokenwise", "recursive_rejection")
        )
        for policy in ("chain", "static", "cost_aware")
    }
    assert speeds["cost_aware"] > 0.98 * max(speeds.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("rates=nothing", "tree.rates=nothing: no such table; known are "),
        ("target=zoo:nobody", "target=zoo:nobody"),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], wrong: str, said: str
) -> None:
    assert study.main([*words, "grid=lengths", "budgets=8", wrong]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
