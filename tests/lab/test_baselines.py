"""Sweeps: what is decoded once, what is not decoded again, and what is in turns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from specdec.decode import Decoder
from specdec.lab import baselines
from specdec.lab.jobs import jobs_of
from specdec.models import load
from specdec.timing import Laps
from tests.running import jobs, jobs_by, lines, outputs, summary_of

pytestmark = pytest.mark.usefixtures("load_once")

SHORT = ("tracker=none", "prompts.limit=2", "max_new_tokens=4", "dtype=float32")
SHORT += ("target.path=zoo:draft",)  # the smaller one


class Clock:
    """Every lap takes as long, times `pace`."""

    pace = 1.0

    def read(self, laps: Any) -> dict[str, float]:
        return {name: 0.001 * self.pace for name, _ in laps._marks[1:]}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A steady one."""
    made = Clock()
    monkeypatch.setattr(Laps, "read", lambda laps: made.read(laps))
    return made


def own(folder: Path) -> list[str]:
    """Jobs that have plain decoding of their own."""
    return [job.name for job in jobs(folder) if (job / "baseline").exists()]


@pytest.mark.parametrize("budgets", [pytest.param("1,2,3,4,6,8", marks=pytest.mark.slow), "3"])
def test_jobs_share_plain_decoding_and_are_not_done_twice(
    specdec, tmp_path, clock, monkeypatch, budgets
):
    """Drafters at two temperatures and several budgets: two baselines. Once more: nothing is
    decoded. One value more: its jobs alone are."""
    words = ("-m", *SHORT, "drafter=ngram,pld", "sampling=greedy,sample", f"out={tmp_path}/s")
    assert specdec(*words, f"tree.budget={budgets}")[0] == 0
    count = 4 * len(budgets.split(","))
    found = jobs(tmp_path / "s")
    assert len(found) == count
    shared = sorted((tmp_path / "s/baselines").iterdir())
    assert len(shared) == 2
    assert own(tmp_path / "s") == []
    for job in found:
        summary = summary_of(job)
        assert (job / summary["baseline_from"]).resolve() in shared
        assert summary["anchor"]["used"]
        assert summary["speedup"] > 0
        assert summary["lossless"]["verdict"] == "passed"
    before = {job: (job / "summary.json").read_bytes() for job in found}

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_step", None)
        code, printed, _ = specdec(*words, f"tree.budget={budgets}")
    assert (code, printed.count("done already: ")) == (0, count)

    code, printed, _ = specdec(*words, f"tree.budget={budgets.replace('3', '3,5')}")
    assert (code, printed.count("done already: ")) == (0, count)
    assert len(jobs(tmp_path / "s")) == count + 4
    assert sorted((tmp_path / "s/baselines").iterdir()) == shared
    assert own(tmp_path / "s") == []
    assert before == {job: (job / "summary.json").read_bytes() for job in found}


def test_shared_texts_are_those_of_a_run_alone(specdec, tmp_path, clock):
    words = (*SHORT, "sampling=sample", "drafter=ngram")
    assert specdec("-m", *words, "tree.budget=2,3", f"out={tmp_path}/s")[0] == 0
    assert specdec(*words, "tree.budget=3", f"out={tmp_path}/o")[0] == 0
    (shared,) = (tmp_path / "s/baselines").iterdir()
    assert outputs(shared) == outputs(tmp_path / "o/baseline")
    job = jobs_by(tmp_path / "s", "tree.budget")[3]
    assert outputs(job) == outputs(tmp_path / "o")
    for name in ("speedup", "baseline", "mean_accepted_length", "acceptance_by_depth"):
        assert summary_of(job)[name] == summary_of(tmp_path / "o")[name]


@pytest.mark.parametrize("when", ["between", "within"])
def test_another_pace_needs_plain_decoding_of_its_own(specdec, tmp_path, clock, monkeypatch, when):
    """The machine is slower from the second of three jobs on, or from the middle of it."""
    words = ("-m", *SHORT, "drafter=ngram", "tree.budget=2,3,4", f"out={tmp_path}/s")
    measure, count = baselines.Anchor.measure, 0

    def measured(anchor: baselines.Anchor) -> float:
        nonlocal count
        count += 1  # two or three in the first job, which decodes it
        clock.pace = 1.05 if count > (3 if when == "between" else 4) else 1.0
        return measure(anchor)

    monkeypatch.setattr(baselines.Anchor, "measure", measured)
    code, printed, _ = specdec(*words)
    assert code == 0
    found = jobs_by(tmp_path / "s", "tree.budget")
    assert own(tmp_path / "s") == sorted(found[budget].name for budget in (3, 4))
    assert printed.count("this run decodes its own") == 2
    for budget in (3, 4):
        summary = summary_of(found[budget])
        assert not summary["anchor"]["used"]
        assert "baseline_from" not in summary
        if when == "between":
            assert summary["baseline"]["seconds"] == pytest.approx(
                1.05 * summary_of(found[2])["baseline"]["seconds"]
            )


def test_the_job_that_decodes_it_keeps_plain_decoding_of_an_unsteady_pace(
    specdec, tmp_path, clock, monkeypatch
):
    """As a run without a sweep does; for the others it has no pace."""
    measure, count = baselines.Anchor.measure, 0

    def measured(anchor: baselines.Anchor) -> float:
        nonlocal count
        count += 1
        clock.pace = 1.0 if count == 1 else 1.05
        return measure(anchor)

    monkeypatch.setattr(baselines.Anchor, "measure", measured)
    words = ("-m", *SHORT, "drafter=ngram", "tree.budget=2,3", f"out={tmp_path}/s")
    code, printed, _ = specdec(*words)
    found = jobs_by(tmp_path / "s", "tree.budget")
    assert (code, own(tmp_path / "s")) == (0, [found[3].name])
    assert printed.count("this run decodes its own") == 1
    assert summary_of(found[2])["anchor"]["used"]
    assert (found[2] / summary_of(found[2])["baseline_from"]).is_dir()


def test_the_jobs_of_a_sweep_load_their_target_once(specdec, tmp_path, monkeypatch):
    loaded: list[str] = []
    load_model = load.load_model

    def counted(path: str, *given: Any, **more: Any) -> Any:
        loaded.append(path)
        return load_model(path, *given, **more)

    monkeypatch.setattr(load, "load_model", counted)
    words = (*SHORT, "prompts.limit=1", "max_new_tokens=1", "baseline=false")
    assert specdec("-m", *words, "drafter=ngram,pld", f"out={tmp_path}/s")[0] == 0
    assert loaded == ["zoo:draft"]
    assert specdec(*words, "drafter=ngram", f"out={tmp_path}/o")[0] == 0
    assert loaded == ["zoo:draft"] * 2  # nothing outlives a command


def test_a_finished_run_is_extended_by_prompts_and_nothing_else(specdec, tmp_path):
    words = (*SHORT, "drafter=ngram", f"out={tmp_path}/o")
    assert specdec(*words)[0] == 0
    first = outputs(tmp_path / "o")
    code, printed, _ = specdec(*words, "prompts.limit=1")
    assert (code, printed.count(f"done already: {tmp_path}/o")) == (0, 1)
    code, printed, _ = specdec(f"resume={tmp_path}/o", "prompts.limit=3", "tracker=none")
    assert (code, "done already" in printed) == (0, False)
    assert outputs(tmp_path / "o").keys() == {(0, 0), (1, 0), (2, 0)}
    assert outputs(tmp_path / "o").items() >= first.items()
    assert summary_of(tmp_path / "o")["prompts"] == 3
    identity = json.loads((tmp_path / "o/identity.json").read_text())
    assert sorted(identity["prompts"]) == ["0", "1", "2"]
    for words_of, said in (
        ((*words, "seed=1"), f"out={tmp_path}/o: seed differs from the run there"),
        ((*words, "prompts.shuffle=1"), "prompts.shuffle"),
        ((f"resume={tmp_path}/o", "seed=1"), "seed=1: cannot stand beside resume="),
        ((f"resume={tmp_path}/x",), "/x: must be true, false, auto or the folder of a run"),
    ):
        code, _, error = specdec(*words_of)
        assert (code, error.count("\n")) == (2, 1)
        assert said in error


TURNS = ("-m", "hydra/launcher=turns")


def test_methods_in_turns_are_what_they_are_alone(specdec, tmp_path, monkeypatch):
    """Three drafters, one of which is refused, at two temperatures; prompt by prompt."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    run = Decoder.run

    def ran(self: Decoder, *given: Any, on_step: Any = None, **more: Any) -> Any:
        if on_step is not None and on_step.__qualname__.startswith("Lane."):
            asked = tuple(sorted(request.id for request in self.waiting))
            seen.append((type(self.drafter).__name__, asked))
        return run(self, *given, on_step=on_step, **more)

    monkeypatch.setattr(Decoder, "run", ran)
    words = (*SHORT, "drafter=ngram,rest,pld", "sampling=greedy,sample", "tree.budget=3")
    code, printed, error = specdec(*TURNS, *words, f"out={tmp_path}/s")
    assert code == 2
    assert error.count("drafter.datastore: must be given") == 2
    assert "in turns" in printed
    assert len(seen) == 2 * 3 * 2  # temperatures, plain and two drafters, prompts
    assert [asked for _, asked in seen[:6]] == [(0,)] * 3 + [(1000,)] * 3
    assert seen[0][0] != seen[3][0]  # another one begins
    for (drafter, cold), job in (
        ((one["choices"]["drafter"], one["sampling"]["temperature"] == 0), job)
        for job, one in configs(tmp_path / "s")
    ):
        out = tmp_path / f"{drafter}{cold}"
        sampling = "greedy" if cold else "sample"
        alone = (f"drafter={drafter}", f"sampling={sampling}", "tree.budget=3", f"out={out}")
        assert specdec(*SHORT, *alone)[0] == 0
        assert outputs(job) == outputs(out)
        summary = summary_of(job)
        assert (summary["in_turns"], summary["lossless"]["verdict"]) == (True, "passed")
        assert outputs(job / summary["baseline_from"]) == outputs(out / "baseline")
        assert summary["speedup"] > 0
        assert summary["shared_prefill"]["tokens"] % 16 == 0 < summary["shared_prefill"]["tokens"]
        assert summary["lossless"].get("identical") == (2 if cold else None)
    assert own(tmp_path / "s") == []
    assert not any(job.shared for job in jobs_of(tmp_path / "s"))


@pytest.mark.slow
def test_nobody_finds_prompts_read_beside_a_drafter_that_must_read_its_own(specdec, tmp_path):
    """Each reads them, shared by its own samples alone."""
    words = (*SHORT[:-1], "tree.budget=3", "cache.share=true", "sampling=sample")
    words += ("prompts.samples=2",)
    assert specdec(*TURNS, *words, "drafter=ngram,eagle3", f"out={tmp_path}/s")[0] == 0
    for drafter, job in ((one["choices"]["drafter"], job) for job, one in configs(tmp_path / "s")):
        out = tmp_path / drafter
        assert specdec(*words, f"drafter={drafter}", f"out={out}")[0] == 0
        assert outputs(job) == outputs(out)
        summary = summary_of(job)
        assert (summary["in_turns"], summary["lossless"]["verdict"]) == (True, "passed")
        assert "shared_prefill" not in summary


def test_methods_take_turns_without_plain_decoding(specdec, tmp_path):
    words = (*SHORT, "drafter=ngram,pld", "tree.budget=3", "baseline=false")
    assert specdec(*TURNS, *words, f"out={tmp_path}/s")[0] == 0
    found = jobs(tmp_path / "s")
    assert len(found) == 2
    for job in found:
        assert len(lines(job / "generations.jsonl")) == 2
        assert summary_of(job)["in_turns"]
        assert "baseline" not in summary_of(job)
    assert not list((tmp_path / "s").glob("**/baseline*"))


def configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for job in jobs(folder):
        yield job, yaml.safe_load((job / "config.yaml").read_text())


@pytest.mark.parametrize("good", [0, 17])  # calls that go well: it fails in the warm-up, or later
def test_one_of_several_in_turns_may_fail(specdec, tmp_path, monkeypatch, good):
    """Its finished texts stay, and the others go on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"failing_after_{good}.py").write_text(
        "calls = []\n\n\ndef guess(tokens):\n    calls.append(1)\n"
        f"    return [tokens[-2:]] if len(calls) <= {good} else [tokens[len(tokens)]]\n"
    )
    (tmp_path / "steady_in_turns.py").write_text("def guess(tokens):\n    return [tokens[-2:]]\n")
    words = (*SHORT, "drafter=user", "prompts.limit=4")
    both = f"drafter._target_=failing_after_{good}.guess,steady_in_turns.guess"
    code, _, error = specdec(*TURNS, *words, both, f"out={tmp_path}/s")
    assert code == 1
    assert error.count("IndexError") == 1
    found = jobs_by(tmp_path / "s", "drafter._target_")
    failed, steady = found[f"failing_after_{good}.guess"], found["steady_in_turns.guess"]
    if good == 17:
        assert summary_of(failed)["interrupted"]
        assert 0 < len(lines(failed / "generations.jsonl")) < 4
    assert len(lines(steady / "generations.jsonl")) == 4
    summary = summary_of(steady)
    assert summary["lossless"]["verdict"] == "passed"
    assert summary["lossless"]["identical"] == 4, "plain decoding went on as well"
