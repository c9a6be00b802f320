"""Profiles, records on disk, and the command lines."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from specdec.costs import CostTable
from specdec.lab.command import run_main
from specdec.record import SHARD, command
from specdec.replay.command import Options, Walker, _asked, work
from specdec.replay.configurations import Asked
from specdec.replay.profile import Profile, read_profile
from specdec.replay.record import Record, drawn_from, shard_path
from specdec.replay.results import show
from specdec.sampling import SamplingParams, probabilities
from specdec.tables import DATA
from tests.running import ROOT

# Steps by tokens, of a draft head of NVIDIA's, and what their module makes of it.
HISTOGRAM = {1: 8611, 2: 7814, 3: 5337, 4: 8891}
MEAN = 2.4733
NAMES = ("output_ids", "offsets", "target_logs", "own_log", "draft_ids", "draft_logs")
WORDS = "device=cpu dtype=float32 prompts.turns=1 max_new_tokens=8 ignore_eos=true"


def profile(histogram: Mapping[int, int] = HISTOGRAM) -> Profile:
    steps: dict[int, float] = {tokens: float(count) for tokens, count in histogram.items()}
    return Profile.of_steps(steps, mean_per_request=2.5467, per_category={"code": 2.6})


def written(
    path: Path,
    *,
    histogram: Mapping[int, int] = HISTOGRAM,
    blockwise: bool = False,
    **changes: object,
) -> Path:
    data = profile(histogram).write(
        method="eagle3",
        target="t",
        draft=None,
        tree=False,
        blockwise=blockwise,
        conditions={"dataset": "x"},
    )
    path.write_text(json.dumps({**data, **changes}))
    return path


def test_profile_has_both_conventions_and_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path / "speculation_profile.json")
    data = json.loads(path.read_text())
    assert data["mean_accept_length"] == pytest.approx(MEAN, abs=1e-3)
    assert data["conditional_accept_rates"][1] == pytest.approx((5337 + 8891) / 22042, abs=1e-6)
    assert data["marginal_accept_rates"][1] == pytest.approx((5337 + 8891) / 30653, abs=1e-6)
    assert data["validation"]["mean_consistency"]["passed"]
    assert data["acceptance_length_histogram"] == {str(k): n for k, n in HISTOGRAM.items()}
    assert data["per_category"] == {"code": {"mean_accept_length": 2.6}}
    again = read_profile(path)
    assert again.marginal == pytest.approx(profile().marginal, abs=1e-6)
    assert again.mean_per_request == 2.5467


def test_profile_of_steps_that_keep_nothing_has_no_rates(tmp_path: Path) -> None:
    again = read_profile(written(tmp_path / "p.json", histogram={1: 7}))
    assert (again.marginal, again.conditional, again.mean) == ((), (), 1.0)


def test_profile_of_paths_judged_as_wholes_withholds_rates_and_keeps_steps(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", blockwise=True)
    data = json.loads(path.read_text())
    assert data["verification_method"] == "block"
    assert data["marginal_accept_rates"] is data["conditional_accept_rates"] is None
    assert "longest-prefix" in data["vectors_unavailable_reason"]
    assert read_profile(path).marginal == pytest.approx(profile().marginal)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": "2.0"}, "schema 1"),
        ({"measured": False}, "holds no rates"),
        ({"mean_accept_length": 3.1}, "contradicts itself"),
        ({"num_speculative_tokens": 4}, "must be 4 numbers"),
        ({"marginal_accept_rates": [0.2, 0.5, 0.1]}, "rise"),
        ({"acceptance_length_histogram": {"0": 3}}, "steps by tokens"),
        ({"conditional_accept_rates": [0.719, 0.4, 0.6]}, "contradicts itself"),
    ],
)
def test_profile_that_contradicts_itself(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        read_profile(written(tmp_path / "p.json", **changes))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.05),
    ],
)
def test_draft_law_is_worked_out_from_what_is_stored(sampling: SamplingParams) -> None:
    """As `drafters.logits` does it from all logits."""
    import torch

    logits = torch.randn(20, 200, dtype=torch.float64, generator=torch.manual_seed(0)) * 2
    probs, _ = probabilities(logits, sampling).topk(16)
    expected = (probs / probs.sum(-1, keepdim=True)).numpy()
    logs = logits.log_softmax(-1).topk(64)
    found = drawn_from(logs.values.numpy(), sampling, 16)
    np.testing.assert_allclose(found[:, :16], expected, atol=1e-9)
    assert (found[:, 16:] == 0).all()


def test_filters_at_another_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling.temperature=0.7"):
        drawn_from(np.zeros((1, 4)), SamplingParams(temperature=0.7, top_p=0.9), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "zoo"
    words = f"{WORDS} drafter=small_llama sampling=sample prompts.limit={SHARD + 1} out={out}"
    assert command(words.split()) == 0
    return out


def test_record_goes_on_shard_by_shard(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "record.json").unlink()
    shard_path(half, 1).rename(shard_path(half, 1).with_suffix(".tmp"))  # what a kill may leave
    stamp = shard_path(half, 0).stat().st_mtime_ns
    words = f"{WORDS} drafter=small_llama sampling=sample prompts.limit={SHARD + 1} out={half}"
    assert command(words.split()) == 2  # without resume
    assert command([*words.split(), "seed=5", "resume=true"]) == 2  # another record
    assert command([*words.split(), "resume=true"]) == 0
    assert shard_path(half, 0).stat().st_mtime_ns == stamp
    one, two = Record.open(folder), Record.open(half)
    assert one.outputs == two.outputs
    np.testing.assert_allclose(one.read("draft_logs"), two.read("draft_logs"), atol=1e-4)


KILLED = """
import os, pathlib, signal, sys

from specdec import record
from specdec.replay import record as files
from specdec.tables import DATA

save, moment = files.save_file, sys.argv.pop(1)

def last(arrays, path):
    if path.name.startswith("00001"):
        if moment == "half":
            save(arrays, path)
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(arrays, path)

files.save_file = last
record.command(sys.argv[1:])
"""


def test_a_full_gpu_ends_a_record_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr("specdec.record.make", no_room)
    assert command([*WORDS.split(), "drafter=small_llama", f"out={tmp_path}/out"]) == 1
    assert capsys.readouterr().err == (
        "error: the memory of the GPU is full, 2.00 GiB more were needed; lower batch_size=1, or "
        "choose smaller models\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "half"])
def test_a_record_that_is_killed_loses_a_shard_at_most(
    moment: str, folder: Path, tmp_path: Path
) -> None:
    """Killed with the second shard before it is written, or half of it."""
    out = tmp_path / "killed"
    words = f"{WORDS} drafter=small_llama sampling=sample prompts.limit={SHARD + 1} out={out}"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, *words.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in out.glob("*.safetensors")] == [shard_path(out, 0).name]
    stamp = shard_path(out, 0).stat().st_mtime_ns
    with pytest.raises(ValueError, match="resume=true continues it"):
        Record.open(out)
    assert command([*words.split(), "resume=true"]) == 0
    assert shard_path(out, 0).stat().st_mtime_ns == stamp
    whole, resumed = Record.open(folder), Record.open(out)
    for name in NAMES:
        np.testing.assert_array_equal(resumed.read(name), whole.read(name))
    assert json.loads((out / "rates.json").read_text()) == json.loads(
        (folder / "rates.json").read_text()
    )


def test_record_is_small_and_holds_laws(folder: Path) -> None:
    record = Record.open(folder)
    tokens = int(record.offsets[-1])
    bytes_ = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert bytes_ / tokens < 8e6 / (32 * 64)  # of what a record of that size may have
    along = record.along(SamplingParams(temperature=1.0), candidates=64, children="sample")
    inside = np.arange(along.text.shape[1]) < along.count[:, None]
    np.testing.assert_allclose(along.draft.sum(-1)[inside], 1.0, atol=1e-5)
    assert (along.target.sum(-1) <= 1.0 + 1e-5).all()
    mass = np.exp(record.read("target_logs").astype(float)).sum(-1)
    mass += np.exp(record.read("target_tail").astype(float))
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def test_replay_writes_its_files(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "budgets=[2,4]", "costs=cpu", "oracle=true", f"out={tmp_path}"]
    assert run_main(Options, work, words, doc=None) == 0
    rows = list(csv.DictReader((tmp_path / "replay.csv").open()))
    found = json.loads((tmp_path / "replay.json").read_text())
    assert len(rows) == len(found["rows"]) > 40
    best = max(row["tokens_per_second"] for row in found["rows"])
    assert found["oracle"]["tokens_per_second"] >= best
    assert min(found["oracle"]["regret"].values()) == pytest.approx(
        1 - best / found["oracle"]["tokens_per_second"]
    )
    read_profile(tmp_path / "speculation_profile.json")


def test_the_table_of_a_replay_is_whole_in_eighty_columns() -> None:
    """What a figure is of stands above it: `tokens/s…` might be of a second or of a step."""
    one = {"tree": "cost_aware", "budget": 128, "children": "sample_with_replacement"}
    one |= {"acceptance": "recursive_rejection", "tokens_per_step": 12.3456, "low": 10.11}
    one |= {"high": 14.22, "nodes_per_step": 127.5, "tokens_per_second": 12345.6}
    console = Console(width=80, record=True, file=io.StringIO())
    show([one], {}, console)
    printed = console.export_text()
    assert "…" not in printed
    titles = ["tree", "budget", "children", "acceptance", "tokens/step", "nodes/step", "tokens/s"]
    assert next(line.split() for line in printed.splitlines() if "tree" in line) == titles
    whole = "cost_aware", "128", "12.346", "10.11–14.22", "127.5", "12345.6"
    assert all(f" {figure} " in printed for figure in whole)


@pytest.mark.slow
def test_thousand_configurations_of_a_small_file_take_a_minute(tmp_path: Path) -> None:
    """Of 32 prompts and 64 tokens each: 8 MB, JSON and all; in seconds of one processor, with all
    that the command writes."""
    folder = tmp_path / "zoo"
    words = f"drafter=small_llama sampling=sample prompts.limit=32 max_new_tokens=64 out={folder}"
    assert command([*WORDS.split(), *words.split()]) == 0
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    policies, budgets = "chain,static,optimal,accuracy", ",".join(map(str, range(1, 22)))
    begun = time.process_time()
    given = [str(folder), f"policies=[{policies}]", f"budgets=[{budgets}]", f"out={tmp_path}"]
    assert run_main(Options, work, given, doc=None) == 0
    assert time.process_time() - begun < 60
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["tokens"] >= 2000
    assert len(found["rows"]) >= 1000


def replayed(folder: Path, out: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Rows of replay.json by tree."""
    assert run_main(Options, work, [str(folder), *words, f"out={out}"], doc=None) == 0
    found = json.loads((out / "replay.json").read_text())
    return {row["tree"]: row for row in found["rows"]}


def test_trees_that_follow_the_draft_have_costs(folder: Path, tmp_path: Path) -> None:
    """Walked from every place, as the oracle wants it, and here step by step, whose seconds are
    added up by hand."""
    costs = json.loads((DATA / "costs/cpu.json").read_text())
    costs["loop"]["accept"] = [1e-3] * 3  # of each level
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    where = f"costs={tmp_path / 'costs.json'}"
    words = ["policies=[dynamic,chain]", "budgets=[5]", "children=[top_k]", where]
    found = replayed(folder, tmp_path, *words, "oracle=true")["dynamic"]
    result = json.loads((tmp_path / "replay.json").read_text())
    assert result["oracle"]["tokens_per_second"] >= found["tokens_per_second"]
    assert set(result["oracle"]["regret"]) == {"dynamic", "chain"}
    record, table = Record.open(folder), CostTable.load(tmp_path / "costs.json")
    (one,) = Asked(
        policies=["dynamic"],
        budgets=[5],
        rules=["all"],
        children=["top_k"],
        sampling=SamplingParams(temperature=1.0),
        rates=None,
        costs=None,
        batch=1,
    ).configurations()
    walker = Walker(record, "small_llama", record.settings)
    drafter, seen = walker._loaded(), []
    begin = drafter.begin  # type: ignore[attr-defined]

    def watched(context: Any) -> Any:
        expand = begin(context)
        return lambda frontier: seen.append(frontier.tokens.shape[1]) or expand(frontier)

    drafter.begin = watched  # type: ignore[attr-defined]
    walked = walker.walked(one)
    widths = seen[: one.tree.depth]  # type: ignore[attr-defined]
    drafting = table.start(1) + sum(table.draft(1, n, 1) + table.level(1) + 1e-3 for n in widths)
    total, steps = 0.0, 0
    for text, (prompt, output) in enumerate(zip(record.prompts, record.outputs, strict=True)):
        place = 0
        while place < len(output):
            nodes = float(walked.nodes[text, place])
            total += table.verify(1, nodes + 1, len(prompt) + place) + table.step(1) + drafting
            place, steps = place + int(walked.kept[text, place]) + 1, steps + 1
    tokens = sum(map(len, record.outputs))
    assert found["tokens_per_second"] == pytest.approx(tokens / total, rel=1e-3)
    assert found["tokens_per_step"] == pytest.approx(tokens / steps)


@pytest.mark.parametrize(
    ("policies", "rules", "children", "said"),
    [
        ("chain,static", "block", "all", "static with block (for chains alone)"),
        ("chain,static", "target_only", "sample_with_replacement", ""),
        (
            "chain,static",
            "block,k_seq",
            "sample",
            "static with block (for chains alone); chain, static with k_seq (would change the law "
            "of texts with children=sample)",
        ),
        (
            "dynamic,chain",
            "traversal,target_only,block",
            "all",
            "dynamic with traversal (shapes would depend on what is drawn); dynamic with block "
            "(for chains alone)",
        ),
    ],
)
def test_what_is_left_out_is_said(
    policies: str,
    rules: str,
    children: str,
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All that was asked for is replayed or named, and nothing is both."""
    words = [f"policies=[{policies}]", f"rules=[{rules}]", f"children=[{children}]"]
    replayed(folder, tmp_path, *words, "budgets=[2]")
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert out == ([f"left out: {said}"] if said else [])
    found = json.loads((tmp_path / "replay.json").read_text())
    done = {(row["tree"], row["acceptance"]) for row in found["rows"]}
    left = [(p, r) for one in found["left_out"] for p in one["policies"] for r in one["rules"]]
    assert len({*left}) == len(left)
    assert not done & {*left}
    assert done | {*left} == {*product(policies.split(","), rules.split(","))}
    assert all(one["why"] in said for one in found["left_out"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["policies=[staic]"], "the nearest is static"),
        (["policies=[cost_aware]"], "needs costs"),
        (["oracle=true"], "needs costs"),
        (["rules=[k_seq]", "children=[sample]"], "none of them goes"),
        (["drafter=lookahead"], "the record is of small_llama"),
        (["drafter=pld 'x"], "drafter=pld 'x: No closing quotation"),
        (["policies=[dynamic]", "children=[sample]"], "policies=dynamic and children=sample"),
        (["drafter=ngram", "children=sample"], "children=sample: ngram has no probabilities"),
        (["policies=[]"], "policies=[]: must name one"),
        (["budgets=[]"], "budgets=[]: must be one number"),
        (["rates=nothing"], "rates=nothing: no such table"),
        (
            ["policies=[chain]", "budgets=[1]", "out=/dev/null/x"],
            "out=/dev/null/x: cannot be made",
        ),
    ],
)
def test_replay_refuses_in_one_line(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(Options, work, [str(folder), *words], doc=None) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["drafter=token_recycling"], "cannot answer"),
        (["drafter=lookahead"], "cannot answer"),
        (["run=one", "run=two"], "run=two: given twice"),
        (["-m", "drafter=small_llama,early_exit"], "-m: a record is one"),
    ],
)
def test_record_refuses_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*words, f"out={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_record_is_not_put_into_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert command([f"out={tmp_path}"]) == 2
    assert (
        capsys.readouterr().err == f"error: out={tmp_path}: holds a run; choose another folder\n"
    )


def test_all_children_are_those_that_a_record_knows(folder: Path) -> None:
    known = Record.open(folder)
    given = {**known.settings["sampling"], "temperature": 0.7}
    for filters, kinds in (({"top_p": None}, {"all"}), ({"top_p": 0.9}, {"top_k"})):
        settings = {**known.settings, "sampling": {**given, **filters}}
        record = Record(path=folder, about={**known.about, "settings": settings})
        assert {*_asked(record, Options(record=(folder,)), "small_llama").children} == kinds
