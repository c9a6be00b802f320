"""Programs refuse in one line what they cannot use, before they measure."""

import shlex
from importlib import import_module
from pathlib import Path

import pytest

REFUSED = {
    "tools.contract": "nothing to check: choose drafter=, tree=, acceptance=",
    "tools.contract drafter=unheard_of": "drafter=unheard_of: no such option",
    "tools.calibrate batches=0": "batches=[0]: must be greater than or equal to 1",
    "tools.measure_acceptance out=x temperatures=[]": "temperatures=0: children are the most",
    "tools.measure_acceptance out=x drafter=ngram prompts=1": "prompts=1: does not say how much",
    "tools.measure_acceptance out=x device=cpu gsm8k=no.jsonl": "gsm8k=no.jsonl: prompts.path='no",
    "studies.drafters out=x grid=speed humaneval=tests/golden/prompts.jsonl drafters=rest "
    "datastore=/no/store": "datastore=/no/store: no such folder",
    "studies.cpu_speed out=x repeats=0": "repeats=0: must be greater than or equal to 1",
    "studies.acceptance_bounds worlds=0": "worlds=0: must be greater than or equal to 1",
    "studies.faults worlds=0": "worlds=0: must be greater than or equal to 1",
    "bench.run rules device=cpu batches=0": "batches=[0]: must be greater than or equal to 1",
    "bench.run anatomy device=cpu batches=0": "batches=[0]: must be greater than or equal to 1",
    "figures.draw README.md": "README.md: not JSON",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_ends_in_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *rest = shlex.split(words)
    assert import_module(f"specdec.experiments.{program}").main(rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert REFUSED[words] in error
    assert error.count("\n") == 1
    assert not Path("x").exists()
