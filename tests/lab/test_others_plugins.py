"""Sweeps by Hydra's own plugins that are no dependency of ours, where they are installed: joblib
launches jobs, optuna chooses what they are."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.running import QUICK, ROOT, SMALL_TARGET, jobs_by, summary_of

WORDS = {
    "launcher=joblib": ["tree.budget=4,-1"],
    "sweeper=optuna": [
        *("hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1"),
        *("hydra.sweeper.direction=maximize", "tree.budget=choice(4,-1)"),
    ],
}
PACKAGE = {"launcher=joblib": "hydra_joblib_launcher", "sweeper=optuna": "hydra_optuna_sweeper"}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", WORDS)
def test_jobs_are_done_or_refused_and_listed(plugin: str, tmp_path: Path) -> None:
    if find_spec(f"hydra_plugins.{PACKAGE[plugin]}") is None:
        pytest.skip(f"needs {PACKAGE[plugin].replace('_', '-')}")
    words = [f"hydra/{plugin}", *WORDS[plugin], "drafter=ngram", *QUICK, SMALL_TARGET]
    done = subprocess.run(
        [sys.executable, "-m", "specdec.run", "-m", *words, f"out={tmp_path}/s"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "tree.budget=-1: must be 0 (no drafting) or positive" in done.stdout
    (folder,) = jobs_by(tmp_path / "s", "tree.budget").values()
    assert summary_of(folder)["lossless"]["verdict"] == "passed"
