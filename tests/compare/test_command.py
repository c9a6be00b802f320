"""`specdec compare` as it is typed: its table, its files, its refusals and its haste."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specdec import __main__, __version__
from tests.compare.folders import run, texts

LENGTHS = [2.0, 2.4, 3.0, 1.5, 2.0, 4.0, 3.0, 2.0]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Type `specdec WORDS`: exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdec", *words])
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def sweep(folder: Path, count: int = 8) -> Path:
    plain = texts([1.0] * count, millis=9.0)
    for name, less in (("a", 0.0), ("b", 0.4)):
        lengths = [LENGTHS[i % 8] - less for i in range(count)]
        run(folder / name, texts(lengths), plain=plain, drafter=("ngram", "pld")[name == "b"])
    return folder


def test_a_sweep_gets_its_table_and_its_files(tmp_path: Path, typed) -> None:
    code, out, err = typed("compare", str(sweep(tmp_path)))
    assert (code, err) == (0, "")
    assert "Of 2 methods ngram is the fastest: " in out
    assert "2 of 2 runs passed the check of losslessness" in out
    assert f"report in {tmp_path / 'report.html'}" in out.replace("\n", "")
    assert "<svg" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "compare.json").read_text())
    (group,) = found["groups"]
    assert found["schema"] == 1
    assert [one["name"] for one in group["entries"]] == ["ngram", "pld"]
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(row["method"], row["category"]) for row in rows] == [("ngram", "all"), ("pld", "all")]
    for row, one in zip(rows, group["entries"], strict=True):
        assert float(row["accepted_length"]) == one["accepted_length"]["value"]
        assert float(row["speedup_low"]) == one["speedup"]["low"]
        assert float(row["ms_verify"]) == one["anatomy"]["verify"]
    assert float(rows[1]["best_over_this_accepted_length"]) == pytest.approx(
        float(rows[0]["accepted_length"]) / float(rows[1]["accepted_length"])
    )


def test_files_go_where_they_are_wanted(
    tmp_path: Path, typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path / "runs")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    runs = str(tmp_path / "runs" / "a"), str(tmp_path / "runs" / "b")
    assert typed("compare", *runs)[0] == 0
    assert (tmp_path / "here" / "compare" / "compare.csv").exists()
    assert typed("compare", *runs, f"out={tmp_path / 'there'}")[0] == 0
    assert (tmp_path / "there" / "report.html").exists()
    assert not (tmp_path / "runs" / "report.html").exists()


def test_what_cannot_be_compared_ends_with_a_line(tmp_path: Path, typed) -> None:
    run(tmp_path / "a", texts(LENGTHS))
    run(tmp_path / "b", texts(LENGTHS), settings={"sampling.temperature": 1.0})
    code, _, err = typed("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 2
    assert "differ in sampling.temperature (0.0 and 1.0)" in err
    assert len(err.splitlines()) == 1
    for words, said in (
        ((), "runs: must be given"),
        ((str(tmp_path / "c"),), "no such folder"),
        ((str(tmp_path), f"out={tmp_path / 'a' / 'summary.json'}"), "must be a folder"),
        ((str(tmp_path), "seed=1"), "no such option"),
    ):
        code, _, err = typed("compare", *words)
        assert (code, said in err) == (2, True), err
    nowhere = tmp_path / "a" / "summary.json" / "x"
    code, out, err = typed("compare", str(tmp_path / "a"), f"out={nowhere}")
    assert (code, out) == (2, "")  # before it prints tables
    assert err == f"error: out={nowhere}: cannot be made, Not a directory; choose another\n"


def test_trees_are_spelled(tmp_path: Path, typed) -> None:
    sweep(tmp_path)
    tree = {"parents": [-1, 0, 0], "draft": [None, 0.5, 0.25], "target": [None, 0.5, 0.1]}
    tree |= {"tokens": [300, 301, 302], "path": [0, 1], "next_token": 303}
    poor = {**tree, "path": [0]}
    lines = [
        {"request": 1000 * n, "step": s, **(tree if s else poor)} for n in range(5) for s in (0, 1)
    ]
    (tmp_path / "a" / "trees.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert typed("compare", str(tmp_path))[0] == 0
    found = json.loads((tmp_path / "compare.json").read_text())["groups"][0]["trees"]
    assert [(one["prompt"], one["step"]) for one in found] == [(f"math/{n}", 1) for n in range(3)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("specdec/zoo/target")
    assert found[0]["tokens"] == [tokenizer.decode([token]) for token in (300, 301, 302)]
    assert found[0]["next_token"] == tokenizer.decode([303])


@pytest.mark.parametrize("words", [("--version",), ("run", "--version")])
def test_the_version_is_told(words: tuple[str, ...], typed) -> None:
    assert typed(*words)[:2] == (0, f"specdec {__version__}\n")


def test_without_a_command_it_is_run(typed) -> None:
    for words in (("--help",), ("run", "--help")):
        code, out, _ = typed(*words)
        assert code == 0
        assert out.startswith("python -m specdec.run ")
    assert "specdec compare" in typed("compare", "--help")[1]
    code, _, err = typed("drafter=ngarm")
    assert code == 2
    assert "drafter=ngarm: no such option" in err


def test_a_misspelled_command_is_named(typed) -> None:
    code, _, err = typed("comapre", "runs")
    assert code == 2
    assert err == (
        "error: comapre: no such command; the nearest is compare; there are run, compare, audit, "
        "sync, train, record, replay, and settings are name=value\n"
    )


def test_a_comparison_needs_no_torch() -> None:
    code = "import sys, specdec.__main__, specdec.compare.command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_twenty_runs_of_a_hundred_prompts_take_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for budget in range(1, 21):
        lengths = rng.uniform(1.5, 4.0, size=100).tolist()
        side = texts(lengths, tokens=128)
        for one in side[0]:
            one["prompt_ids"] = [7] * 500
            one["category"] = f"category {one['prompt'] % 13}"
        plain = texts([1.0] * 100, tokens=128)
        run(tmp_path / str(budget), side, plain=plain, budget=budget)
    words = [sys.executable, "-m", "specdec", "compare", str(tmp_path)]
    before = os.times()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = os.times()  # of the processor, whatever else it is doing
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 10.0
