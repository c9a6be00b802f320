"""Replay against real runs of the built-in models."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from specdec.lab.build import sampling_of
from specdec.lab.running import run
from specdec.lab.settings import settings_of
from specdec.record import make
from specdec.replay.chain import starts
from specdec.replay.command import Walker
from specdec.replay.configurations import Asked
from specdec.replay.rates import RATES
from specdec.replay.record import CANDIDATES, Record
from specdec.replay.recording import RECORDED
from specdec.replay.replaying import Replayer

WORK = "device=cpu dtype=float32 kernels=reference tracker=none ignore_eos=true baseline=false"
SMALL = f"{WORK} prompts.limit=2 max_new_tokens=24"
QUIET = partial(Console, quiet=True)


def settings(words: str) -> Any:
    return settings_of(words)


def recorded(folder: Path, words: str) -> Record:
    return make(settings(f"{words} out={folder}"), folder, QUIET())


def real(folder: Path, words: str) -> list[dict[str, Any]]:
    """Generations of a run, in order."""
    run(settings(f"{words} out={folder}"), folder, QUIET())
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda one: one["request"])


def replayed(record: Record, name: str, policy: str, budget: int) -> list[list[int]]:
    """Tokens of every step of every text, of deterministic trees."""
    sampling = sampling_of(record.settings)
    asked = Asked(
        policies=[policy],
        budgets=[budget],
        rules=["all"],
        children=["top_k"],
        sampling=sampling,
        rates=str(record.path / RATES) if name in RECORDED else None,
        costs=None,
        batch=1,
    )
    (one,) = asked.configurations()
    if one.shape is None or name not in RECORDED:
        survivals = Walker(record, name, record.settings).walked(one).survivals
        replayer = Replayer(record=record, sampling=sampling, candidates=CANDIDATES)
    else:
        replayer = Replayer(record=record, sampling=sampling, candidates=CANDIDATES, keep=True)
        survivals = replayer.replay(one).survivals
    assert survivals is not None
    begun = starts(survivals, replayer.count)
    assert np.isin(begun, (0.0, 1.0)).all()
    return [
        np.diff([*np.flatnonzero(row), count]).tolist()
        for row, count in zip(begun, replayer.count, strict=True)
    ]


CASES: list[Any] = [
    ("small_llama", ("static", "dynamic")),
    ("ngram", ("dynamic",)),
    pytest.param("small_llama", ("chain", "optimal"), marks=pytest.mark.slow),
    pytest.param("early_exit", ("chain", "static", "optimal"), marks=pytest.mark.slow),
    pytest.param("pld", ("chain",), marks=pytest.mark.slow),
    pytest.param("suffix_decoding", ("dynamic",), marks=pytest.mark.slow),
]


def words_of(record: Record, policy: str, budget: int) -> str:
    """As the command line has it."""
    if policy == "static":
        sampling = sampling_of(record.settings)
        asked = Asked(
            policies=["static"],
            budgets=[budget],
            rules=["all"],
            children=["top_k"],
            sampling=sampling,
            rates=str(record.path / RATES),
            costs=None,
            batch=1,
        )
        widths = asked.configurations()[0].tree.widths  # type: ignore[attr-defined]
        return f"tree=static tree.widths={json.dumps(widths, separators=(',', ':'))}"
    own = f" tree.rates={record.path / RATES}" if policy == "optimal" else ""
    return f"tree={policy} tree.budget={budget}{own}"


@pytest.mark.parametrize(("drafter", "policies"), CASES)
def test_greedy_accepted_lengths_entry_by_entry(
    drafter: str, policies: tuple[str, ...], tmp_path: Path
) -> None:
    base = f"{SMALL} drafter={drafter}"
    record = recorded(tmp_path / "record", base)
    for policy in policies:
        shape = words_of(record, policy, 8)
        texts = real(tmp_path / policy, f"{base} {shape}")
        assert [text["output_ids"] for text in texts] == record.outputs
        expected = [text["accepted_lengths"] for text in texts]
        assert replayed(record, drafter, policy, 8) == expected, policy
