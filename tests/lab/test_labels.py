"""What stands beside the figures of a run: LOSSY, and what really ran."""

import sys
from pathlib import Path

import pytest

from specdec.lab.build import method_of, own_parts
from specdec.lab.method import mark_of
from specdec.lab.settings import settings_of
from specdec.lab.tracking import NoTracker
from tests.running import QUICK, lines, summary_of

SMALL = ("prompts.limit=1", "max_new_tokens=3", *QUICK[:1], *QUICK[3:])
TYPICAL = ("acceptance=typical", "acceptance.allow_lossy=true")


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        ((*TYPICAL, "sampling=sample"), {"lossy": True}),
        (TYPICAL, {}),  # at temperature 0 it is greedy
        (("acceptance=relaxed", "acceptance.allow_lossy=true"), {"lossy": True}),
        (("acceptance=greedy", "acceptance.allow_lossy=true", "sampling=sample"), {"lossy": True}),
        (("acceptance.allow_lossy=true", "sampling=sample"), {}),
        (("drafter=synthetic", "sampling=sample"), {"synthetic": True}),
    ],
)
def test_the_rule_and_the_sampling_say_what_is_marked(words, marks):
    method = method_of(settings_of(words))
    assert method.marks == marks
    assert mark_of(method.marks) == "".join(marks).upper()


def test_lossy_outputs_are_marked_wherever_they_go(specdec, tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(NoTracker, "start", lambda self, run: started.update(vars(run)))
    words = ("drafter=ngram", *TYPICAL, "sampling=sample")
    code, printed, _ = specdec(*words, f"out={tmp_path}/o", *SMALL)
    summary = summary_of(tmp_path / "o")
    assert code == 0
    assert (summary["lossy"], summary["synthetic"]) == (True, False)
    assert [g["lossy"] for g in lines(tmp_path / "o/generations.jsonl")] == [True]
    assert "lossy" not in lines(tmp_path / "o/baseline/generations.jsonl")[0]
    assert started["config"]["lossy"]
    assert started["name"].startswith("LOSSY ")
    assert printed.count("LOSSY") == 3  # progress, the title, beside the check


def test_a_sweep_marks_the_row_of_a_lossy_run(specdec, tmp_path):
    words = ("drafter=ngram", "acceptance=auto,relaxed", "acceptance.allow_lossy=true")
    code, printed, _ = specdec("-m", *words, "baseline=false", f"out={tmp_path}/s", *SMALL)
    assert code == 0
    table = [line for line in printed.splitlines() if line.startswith("│ acceptance=")]
    assert ["LOSSY" in row for row in table] == [False, True]


OWN = """
from specdec.drafters.trees.chain import Chain
from specdec.verifier.target_only import TargetOnly

class Tree(Chain):
    pass

class Rule(TargetOnly):
    pass

def guess(tokens):
    return [tokens[-4:]]
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "labelled", raising=False)
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("labelled.py").write_text(OWN)
    return tmp_path


def test_what_really_ran_is_named(specdec, own_folder):
    words = ("drafter=user", "drafter._target_=labelled.guess", "tree._target_=labelled.Tree")
    code, printed, _ = specdec(
        *words, "acceptance=greedy", "acceptance._target_=labelled.Rule", "out=o", *SMALL
    )
    assert code == 0
    names = {"drafter": "guess", "tree": "Tree", "acceptance": "Rule"}
    own = {group: f"labelled.{name} (labelled.py)" for group, name in names.items()}
    summary = summary_of(own_folder / "o")
    assert summary["own"] == own
    assert (summary["drafter"], summary["tree"]) == ("user", "chain")
    assert all(name in " ".join(printed.split()) for name in own.values())


def test_another_class_than_the_options_own_is_named_too(own_folder):
    tree = "specdec.drafters.trees.threshold.Threshold"
    part = "drafter.parts.first._target_=labelled.guess"
    own = own_parts(settings_of(f"drafter=compose {part} tree._target_={tree}"))
    assert own.pop("drafter.parts.first") == "labelled.guess (labelled.py)"
    assert own.pop("tree").startswith(f"{tree} (")
    assert not own
    assert not own_parts(settings_of("drafter=suffix_decoding tree=threshold acceptance=block"))
