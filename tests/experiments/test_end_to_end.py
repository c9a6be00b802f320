"""The end-to-end experiment with the zoo pair on a CPU: sessions, figures, tables."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specdec.experiments.figures import draw, end_to_end_plot, pages
from specdec.experiments.studies import end_to_end
from specdec.experiments.studies.end_to_end import Part, note, time_runs
from specdec.experiments.studies.theirs import Theirs, load_plain
from specdec.lab.build import method_of
from specdec.lab.metrics import figures
from specdec.lab.prompts import Asked
from specdec.lab.session import Decoded
from specdec.lab.settings import settings_of
from specdec.lab.workshop import PLAIN, Workshop, name_of
from specdec.models.placement import Placement
from tests.running import forked

NEW = 6
TEXTS = ("def fibonacci(n):\n    ", "It was a dark night, and the old captain stood at the")


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return Workshop("target=zoo device=cpu")


@pytest.fixture(scope="module")
def prompts(shop: Workshop) -> list[Asked]:
    return [
        Asked(number, f"humaneval/{number}", shop.target.tokenizer(text).input_ids)
        for number, text in enumerate(TEXTS)
    ]


# Sessions


def test_transformers_says_the_same(shop: Workshop, prompts: list[Asked]) -> None:
    model, draft = (load_plain(f"zoo:{name}", Placement()) for name in ("target", "draft"))
    plain = shop.session(PLAIN, rows=1, longest=64).decode(prompts[:1], NEW)
    for extra in ({}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        found = Theirs(model, temperature=0.0, **extra).decode(prompts[:1], NEW)
        assert found.outputs == plain.outputs
        (passes,) = found.passes
        assert (passes < NEW) == ("assistant_model" in extra) or passes == NEW


def test_transformers_samples_from_all_tokens(prompts: list[Asked]) -> None:
    model = load_plain("zoo:draft", Placement())
    model.generation_config.top_k = 1  # must not matter
    session = Theirs(model, temperature=1.0)
    one, again = (session.decode(prompts[:1], NEW).outputs for _ in range(2))
    assert one == again
    others = [session.decode([prompts[0]._replace(id=seed)], NEW).outputs for seed in (1, 2, 3)]
    assert any(other != one for other in others)


# Figures


def runs(*longs: float, passes: int = 4) -> dict[str, Any]:
    return {"short": [0.5] * len(longs), "long": list(longs), "passes": [passes] * len(longs)}


def part_of(batch: int, **methods: Any) -> dict[str, Any]:
    found = {
        "part": "llama_160m",
        "temperature": 0.0,
        "batch": batch,
        "new_tokens": 11,
        "rounds": 1,
        "methods": methods,
    }
    for method in methods.values():
        if "runs" in method and "fault" not in method:
            method["figures"] = figures(method, methods["none"], found)
    return found


def test_figures_of_single_prompts() -> None:
    jobs = {"humaneval/0": runs(1.5, 9.9, 1.5), "mt_bench/0": runs(2.5, 2.5, 2.5)}
    fast = {"humaneval/0": runs(1.0, 1.0, 7.0), "mt_bench/0": runs(1.5, 1.5, 1.5)}
    verbs = {"verify": 6.0, "prefill": 50.0}
    part = part_of(1, none={"runs": jobs}, fast={"runs": fast, "verbs": verbs})
    found = part["methods"]["fast"]["figures"]
    assert found["all"]["ms_per_token"] == {"humaneval/0": 50.0, "mt_bench/0": 100.0}
    assert found["all"]["tokens_per_second"] == pytest.approx(20 / 1.5)
    assert found["all"]["speedup"] == pytest.approx(3.0 / 1.5)
    assert found["all"]["interval"] == [2.0, 2.0]
    assert found["all"]["accepted_length"] == pytest.approx(11 / 4)
    assert found["all"]["step_tokens_per_second"] == pytest.approx(6 * 11 / 6.0)
    assert found["humaneval"]["tokens_per_second"] == pytest.approx(10 / 0.5)
    assert end_to_end_plot.best(part) == ("fast", part["methods"]["fast"])
    assert part["methods"]["none"]["figures"]["all"]["speedup"] == 1.0


def test_figures_of_a_batch() -> None:
    jobs = {"humaneval/8": runs(2.5, 2.5, 3.5, passes=88)}
    fast = {"humaneval/8": runs(1.5, 1.0, 1.5, passes=44)}
    part = part_of(8, none={"runs": jobs}, fast={"runs": fast})
    found = part["methods"]["fast"]["figures"]["all"]
    assert found["tokens_per_second"] == pytest.approx(10 * 8 / 1.0)
    assert found["ms_per_token"] == {"humaneval/8": pytest.approx(100.0)}
    assert found["accepted_length"] == pytest.approx(2.0)
    assert found["repeats"] == pytest.approx([2.0, 4.0, 3.0])
    assert found["interval"] == pytest.approx([2.0, 4.0])


def made_up() -> dict[str, Any]:
    slow, fast = {"humaneval/0": runs(1.5)}, {"humaneval/0": runs(1.0)}
    gap = {"logit_gap": 0.5, "bound": 0.25, "explained": False}
    checked = {"checked": 2, "identical": 1, "divergences": [gap]}
    tree = {"runs": fast, "agreement": checked, "graphs": {"obstacle": "it waits"}}
    first = part_of(
        1,
        **{"none": {"runs": slow}, "small_llama chain 2": tree},
        **{"small_llama chain 3": {"runs": {}, "fault": "X: y [z]"}},
    )
    second = part_of(1, none={"runs": slow}, generate={"runs": slow})
    return {
        "command": "python -m specdec.experiments.studies.end_to_end",
        "settings": {"target": "zoo:target", "tokens": 11, "dtype": "float32", "prompts": 1},
        "hardware": {"cpu": "some", "gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "noise": {"humaneval": 1.5},
        "parts": {"a": first, "b": second | {"part": "transformers"}},
    }


def test_tables_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up()
    console = Console(width=200, file=io.StringIO())
    console.print(end_to_end_plot.table(result))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "1 of 2" in text
    assert "small_llama chain 3: X: y [z]" in text
    assert "no graphs: it waits" in text
    assert "unexplained" in text
    assert "passes differ by 1.5 ulp" in text
    lines = end_to_end_plot.end_to_end(result).splitlines()
    assert lines[3] == "| --- |" or lines[3].startswith("|---")
    rows = [line for line in lines if line.startswith("| 0, 1 |")]
    assert rows == [
        "| 0, 1 | `none` | 10 |  | 10 |  | 2.75 |  |  |  |",
        "| 0, 1 | `small_llama`, llama_160m: chain 2 | 20 |  | 20 |  | 2.75 | 2.00 | 1 of 2 "
        "| 0 of 1 |",
        "| 0, 1 | transformers `generate` | 10 |  | 10 |  | 2.75 | 1.00 |  |  |",
    ]
    path = tmp_path / "end_to_end.json"
    path.write_text(json.dumps(result))
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_exact_mode_is_shown_below_the_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("end_to_end", "step_anatomy", "calibrate"):
        (tmp_path / f"{name}.json").write_bytes((pages.RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "read", pages.read.__wrapped__)  # not what others have read
    before, picture, after = pages.written(*pages.PAGES["end_to_end"]).partition("\n\n![Tokens")
    result = made_up()
    result["settings"]["exact"] = True
    slow, fast = ({"runs": {"humaneval/0": runs(long)}} for long in (1.5, 1.0))
    head = part_of(1, **{"none": slow, "eagle3 chain 2": fast, "eagle3 chain 4": slow})
    result["parts"]["c"] = head | {"part": "eagle3 fp8"}
    (tmp_path / "end_to_end_exact.json").write_text(json.dumps(result))
    shown = pages.written(*pages.PAGES["end_to_end"])
    assert shown.startswith(before)
    assert shown.endswith(picture + after)
    added = shown[len(before) : -len(picture + after)]
    assert (
        "`zoo:target` in float32 in exact mode (`kernels.exact=true`) on one NVIDIA H200," in added
    )
    assert "[JSON](../../experiments/results/end_to_end_exact.json)" in added
    assert [row.split(" | ")[1] for row in added.splitlines() if row.startswith("| 0")] == [
        "`none`",
        "`small_llama`, llama_160m: chain 2",
        "transformers `generate`",
        "`eagle3 fp8`: chain 2",
    ]
    assert "in exact mode" not in before


# The grid


@pytest.mark.parametrize("part", [("draft", 0.0, 1), ("draft", 1.0, 8), ("ngram", 1.0, 1)])
def test_methods_of_a_part_have_names_and_lose_nothing(part: tuple[str, float, int]) -> None:
    found = Part(*part).words("drafter=small_llama")
    assert len(set(map(name_of, found))) == len(found) > 1
    for words in found:
        method_of(settings_of(f"{words} sampling.temperature={part[1]}"))


# The whole


class Scripted:
    """A session without a model, or one that fails."""

    def __init__(self, new: int | None) -> None:
        self.new = new

    def decode(self, batch: Any, new: int) -> Decoded:
        if self.new is None:
            raise RuntimeError("out of luck")
        outputs = [[1] * min(new, self.new) for _ in batch]
        return Decoded(seconds=float(new), outputs=outputs, passes=[new] * len(batch))


def test_a_turn_is_a_short_and_a_long_run(prompts: list[Asked]) -> None:
    entry: dict[str, Any] = {}
    turn: Any = time_runs(5)
    turn(Scripted(5), prompts[1:], entry)
    turn(Scripted(5), prompts, entry)
    turn(Scripted(5), prompts, entry)
    assert entry["runs"] == {
        "humaneval/1": {"short": [1.0], "long": [5.0], "passes": [5]},
        "humaneval/2": {"short": [1.0] * 2, "long": [5.0] * 2, "passes": [10] * 2},
    }
    with pytest.raises(ArithmeticError, match="outputs of \\[4\\] tokens"):
        turn(Scripted(4), prompts, entry)


def test_a_fault_is_noted_without_figures() -> None:
    entry = {"figures": {}}
    note(entry, RuntimeError("out of luck"))
    assert entry == {"fault": "RuntimeError: out of luck"}


@pytest.mark.slow
def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(end_to_end, "GREEDY", (end_to_end.CHAINS[:1],) * 2)
    monkeypatch.setattr(end_to_end, "NGRAM", (end_to_end.NGRAM[0][:1],) * 2)
    sets = {"humaneval": {"task_id": "a/0", "prompt": TEXTS[0]}}
    sets["mt_bench"] = {"question_id": 81, "turns": [TEXTS[1], "And then?"]}  # type: ignore[dict-item]
    for name, record in sets.items():
        lines = json.dumps(record) + "\n" + json.dumps(record | {"id": 1}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(lines)
    out = tmp_path / "out.json"
    words = [f"{name}={tmp_path}/{name}.jsonl" for name in sets]
    words += ["target=zoo:target", "draft=zoo:draft", "device=cpu", "dtype=float32", "tokens=4"]
    words += ["heads=eagle3=zoo:eagle3", "repeats=1", "temperatures=0", f"out={out}"]
    assert end_to_end.main([*words, "prompts=1", "batches=1"]) == 0
    result = json.loads(out.read_text())
    assert list(result["parts"]) == [
        f"T=0, batch 1, {part}" for part in ("draft", "eagle3", "ngram", "transformers")
    ]
    before = result["parts"]["T=0, batch 1, draft"]
    method = before["methods"]["small_llama chain 2"]
    assert method["agreement"]["identical"] == method["agreement"]["checked"] == 2
    assert list(method["runs"]) == ["humaneval/a/0", "mt_bench/81"]
    head = result["parts"]["T=0, batch 1, eagle3"]["methods"]["eagle3 chain 2"]
    assert head["agreement"]["identical"] == 2
    assert method["graphs"] == {"counts": method["graphs"]["counts"], "obstacle": None}
    assert {"verify", "draft"} <= method["verbs"].keys()
    assert out.with_suffix(".png").exists()

    more = ["batches=[1,2]", "parts=draft", "resume=true"]
    assert end_to_end.main([*words, "prompts=1", *more]) == 0
    result = json.loads(out.read_text())
    again = result["parts"]["T=0, batch 1, draft"]
    assert again["methods"] == before["methods"]
    batch = result["parts"]["T=0, batch 2, draft"]["methods"]["small_llama chain 2"]
    assert list(batch["runs"]) == ["humaneval/2", "mt_bench/2"]
    assert batch["agreement"]["checked"] == 4
    assert end_to_end.main([*words, "prompts=2", *more]) == 2
    assert "out.json: prompts=1 there, 2 now" in capsys.readouterr().err
    assert end_to_end.main([*words, "parts=none"]) == 2
    assert "parts=none: there are draft, eagle3, ngram, transformers" in capsys.readouterr().err


IMPORTS = """
import importlib, sys

without, *modules = sys.argv[1:]
tools = without.split(",")
for name in list(sys.modules):
    if name.partition(".")[0] == "specdec":
        del sys.modules[name]
for name in [*sys.modules, *tools]:
    if name.partition(".")[0] in tools:
        sys.modules[name] = None  # who imports it fails
for module in modules:
    importlib.import_module(f"specdec.experiments.{module}")
print(*sys.modules)
"""


@pytest.mark.parametrize(
    ("tools", "modules"),
    [
        (
            ("hydra", "omegaconf", "wandb", "datasets", "transformers"),
            ("bench.attention", "bench.elementwise", "bench.rules", "bench.run", "bench.steps"),
        ),
        (
            ("wandb", "datasets"),
            ("studies.end_to_end", "tools.calibrate", "figures.draw", "figures.pages"),
        ),
    ],
    ids=["benchmarks", "all"],
)
def test_they_import_no_trackers_and_benchmarks_no_tools_of_the_runner(
    tools: tuple[str, ...], modules: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "importing.py").write_text(IMPORTS)
    done = forked(tmp_path, "importing", ",".join(tools), *modules)
    assert done.returncode == 0, done.stderr
    assert {f"specdec.experiments.{module}" for module in modules} <= set(done.stdout.split())
