"""The end-to-end experiment with the zoo pair on a CPU: sessions, rounds, agreement, figures."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.experiments.figures import draw, end_to_end_plot
from specdec.experiments.figures import pages as readme
from specdec.experiments.studies import agreement, end_to_end, files, methods
from specdec.experiments.studies.sessions import (
    Asked,
    Decoded,
    Ours,
    Theirs,
    load_plain,
    with_tree,
)
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.protocols import Drafter
from specdec.verifier.greedy import Greedy

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NEW = 6
TEXTS = ("def fibonacci(n):\n    ", "It was a dark night, and the old captain stood at the")


@pytest.fixture(scope="module")
def target() -> PagedLM:
    torch.manual_seed(0)
    return load_model("zoo:target")


@pytest.fixture(scope="module")
def prompts(target: PagedLM) -> list[Asked]:
    return [
        Asked(number, f"humaneval/{number}", target.tokenizer(text).input_ids)
        for number, text in enumerate(TEXTS)
    ]


# Sessions


def ours(target: PagedLM, drafter: Drafter, batch: int) -> Ours:
    return Ours(target, drafter, Greedy(), temperature=0.0, batch=batch, longest=64)


def test_ours_and_theirs_say_the_same(target: PagedLM, prompts: list[Asked]) -> None:
    drafter = SmallLlama(target=target, tree=Chain(budget=2), path="zoo:draft")
    twin = with_tree(drafter, Chain(budget=3))
    assert (twin.levels, drafter.levels, twin.lm) == (3, 2, drafter.lm)
    model = load_plain("zoo:target", dtype=torch.float32, device=CPU)
    draft = load_plain("zoo:draft", dtype=torch.float32, device=CPU)
    plain = ours(target, NoDrafter(), 2).decode(prompts, NEW)
    assert plain.passes == 2 * NEW
    assert sum(plain.verbs.values()) == pytest.approx(plain.seconds, rel=0.1)
    for session in (ours(target, drafter, 2), ours(target, twin, 2)):
        session.warm_up(prompts[0].tokens)
        found = session.decode(prompts, NEW)
        assert found.outputs == plain.outputs
        assert found.passes < plain.passes
        assert session.notes()["graphs"]["obstacle"] is None
    for extra in ({}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        theirs = Theirs(model, temperature=0.0, **extra)
        found = theirs.decode(prompts[:1], NEW)
        assert found.outputs == plain.outputs[:1]
        assert (found.passes < NEW) == ("assistant_model" in extra) or found.passes == NEW


def test_transformers_samples_from_all_tokens(prompts: list[Asked]) -> None:
    model = load_plain("zoo:draft", dtype=torch.float32, device=CPU)
    model.generation_config.top_k = 1  # must not matter
    session = Theirs(model, temperature=1.0)
    one, again = (session.decode(prompts[:1], NEW).outputs for _ in range(2))
    assert one == again
    others = [session.decode([prompts[0]._replace(id=seed)], NEW).outputs for seed in (1, 2, 3)]
    assert any(other != one for other in others)


# Agreement


def test_a_divergence_is_explained_by_its_gap(target: PagedLM, prompts: list[Asked]) -> None:
    plain = ours(target, NoDrafter(), 2).decode(prompts, NEW).outputs
    assert agreement.agreement(prompts, plain, plain, target) == {
        "checked": 2,
        "identical": 2,
        "divergences": [],
    }
    other = [[*plain[0][:3], plain[0][3] + 1, *plain[0][4:]], plain[1]]
    found = agreement.agreement(prompts, other, plain, target)
    (one,) = found["divergences"]
    assert (found["identical"], one["position"], one["prompt"]) == (1, 3, "humaneval/0")
    assert one["logit_gap"] >= one["top2_gap"] > 0
    assert 0 < one["bound"] < 1e-4
    assert not one["explained"]


def test_unit_is_the_distance_to_the_next_number() -> None:
    for value in (20.3, 16.0, 0.7, -3.0):
        for dtype in (torch.bfloat16, torch.float32):
            here = torch.tensor(abs(value), dtype=dtype)
            bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
            beyond = (here.view(bits) + 1).view(dtype)
            assert agreement.unit(value, dtype) == float(beyond) - float(here)


def test_noise_is_within_what_the_bound_assumes(prompts: list[Asked]) -> None:
    rounded = load_model("zoo:target", Placement(dtype=torch.bfloat16))
    assert agreement.noise(rounded, prompts[1].tokens) <= agreement.BOUND / 2


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
            method["figures"] = end_to_end_plot.figures(method, methods["none"], found)
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
        "verify_cost": {
            "context": 1024,
            "ratios": [{"batch": 1, "nodes": 64, "ms": 6.0, "plain_ms": 4.0, "ratio": 1.5}],
        },
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
    assert "64 nodes cost 1.50 plain steps at batch 1" in text
    lines = readme.end_to_end(result).splitlines()
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


# The grid


def test_every_drafted_child_is_judged_without_loss() -> None:
    from specdec.sampling import SamplingParams

    for temperature in (0.0, 1.0):
        for batch in (1, 8, 32):
            grid = list(methods.small_trees(temperature, batch))
            assert len({name for name, _, _ in grid}) == len(grid) > 3
            for name, tree, rule in grid:
                sampling = SamplingParams(temperature=temperature)
                assert rule.lossy(tree.children, sampling) is None, name
                assert (tree.children != "top_k") == ("sample" in name)


# The whole


class Scripted:
    """A session that fails when told to."""

    def __init__(self, name: str, log: list[str], broken: bool = False) -> None:
        self.name, self.log, self.broken = name, log, broken

    def warm_up(self, tokens: list[int]) -> None:
        """Nothing to do."""

    def decode(self, batch: Any, new: int) -> Decoded:
        if self.broken:
            raise RuntimeError("out of luck")
        self.log.append(f"{self.name} {batch[0].id} {new}")
        return Decoded(seconds=float(new), outputs=[[1] * new], passes=new)

    def notes(self) -> dict[str, Any]:
        return {}


def test_methods_take_turns_and_a_fault_ends_its_own_alone(
    target: PagedLM, prompts: list[Asked], tmp_path: Path
) -> None:
    log: list[str] = []
    build: Any = {
        "none": lambda: Scripted("none", log),
        "fast": lambda: Scripted("fast", log),
        "bad": lambda: Scripted("bad", log, broken=True),
    }
    jobs = {asked.name: [asked] for asked in prompts}
    part: dict[str, Any] = {"temperature": 1.0, "batch": 1, "new_tokens": 5, "rounds": 0}
    part["methods"] = {}
    saved: list[int] = []

    def save() -> None:
        saved.append(part["rounds"])
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_to_end.measure(part, build, jobs, target=target, repeats=2, save=save)
    assert saved == [1, 2, 3]
    assert part["methods"]["bad"]["fault"] == "RuntimeError: out of luck"
    assert log[:6] == [f"{name} 0 {new}" for name in ("none", "fast") for new in (1, 1, 5)]
    assert log[6:9] == [f"fast 1 {new}" for new in (1, 1, 5)]  # the other way round
    assert "none 1000 5" in log
    log.clear()
    end_to_end.measure(part, build, jobs, target=target, repeats=2, save=lambda: None)
    assert {line.split()[1] for line in log} == {"1001"}  # the round that was missing
    assert part["methods"]["fast"]["runs"]["humaneval/1"]["long"] == [5.0, 5.0]
    assert part["methods"]["fast"]["figures"]["all"]["tokens_per_second"] == pytest.approx(1.0)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "GREEDY", ((("chain", (2,)),),) * 2)
    monkeypatch.setattr(methods, "NGRAM", (((4, 1),),) * 2)
    sets = {"humaneval": {"task_id": "a/0", "prompt": TEXTS[0]}}
    sets["mt_bench"] = {"question_id": 81, "turns": [TEXTS[1], "And then?"]}
    for name, record in sets.items():
        lines = json.dumps(record) + "\n" + json.dumps(record | {"id": 1}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(lines)
    out = tmp_path / "out.json"
    arguments = shlex.split(
        f"--humaneval {tmp_path}/humaneval.jsonl --mt-bench {tmp_path}/mt_bench.jsonl "
        f"--target zoo:target --draft zoo:draft --device cpu --dtype float32 --tokens 4 "
        f"--prompts 1 --repeats 1 --temperatures 0 --out {out} --calibrated {tmp_path}/no.json"
    )
    assert end_to_end.main([*arguments, "--batches", "1"]) == 0
    result = json.loads(out.read_text())
    assert list(result["parts"]) == [
        f"T=0, batch 1, {part}" for part in ("draft", "ngram", "transformers")
    ]
    before = result["parts"]["T=0, batch 1, draft"]
    method = before["methods"]["small_llama chain 2"]
    assert method["agreement"]["identical"] == method["agreement"]["checked"] == 2
    assert list(method["runs"]) == ["humaneval/0", "mt_bench/0"]
    assert method["graphs"] == {"counts": method["graphs"]["counts"], "obstacle": None}
    assert {"verify", "draft"} <= method["verbs"].keys()
    assert out.with_suffix(".png").exists()

    more = ["--batches", "1", "2", "--parts", "draft", "--resume"]
    assert end_to_end.main([*arguments, *more]) == 0
    result = json.loads(out.read_text())
    again = result["parts"]["T=0, batch 1, draft"]
    assert again["methods"] == before["methods"]
    batch = result["parts"]["T=0, batch 2, draft"]["methods"]["small_llama chain 2"]
    assert list(batch["runs"]) == ["humaneval/2", "mt_bench/2"]
    assert batch["agreement"]["checked"] == 4
    with pytest.raises(ValueError, match=r"out\.json: prompts=1 there, 2 now"):
        end_to_end.main([*arguments, "--prompts", "2", "--resume"])


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "one.json"
    files.write(path, {"settings": {"a": 1}, "command": "first"})
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    found = files.resume(path, {"a": 1}, "second")
    assert found is not None
    assert found["command"] == "first; second"
    assert files.resume(tmp_path / "none.json", {}, "") is None


def test_they_import_no_tools_of_the_runner() -> None:
    names = "end_to_end, calibrate, step_anatomy, end_to_end_plot, readme"
    code = f"import sys; from experiments import {names}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    forbidden = {"hydra", "omegaconf", "wandb", "datasets"}
    assert forbidden.isdisjoint(done.stdout.split())
