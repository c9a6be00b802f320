"""Replay against real runs of the built-in models."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from specdec.compare.read import read
from specdec.experiments.tools import build_datastore
from specdec.experiments.tools.retokenize import retokenize
from specdec.lab.build import sampling_of
from specdec.lab.running import run
from specdec.lab.settings import settings_of
from specdec.models.load import load_model
from specdec.record import make
from specdec.replay.chain import starts
from specdec.replay.command import Walker
from specdec.replay.configurations import Asked
from specdec.replay.finished import Finished
from specdec.replay.rates import RATES
from specdec.replay.record import CANDIDATES, Record, drawn_from
from specdec.replay.recording import HEADS, RECORDED
from specdec.replay.replaying import Replayer
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.mtp import MTP
from specdec.training.methods.peagle import PEagle
from tests.compare import folders
from tests.drafters.retokenized import KEPT
from tests.heads import made
from tests.heads.blocks import dflash
from tests.running import ROOT

WORK = "device=cpu dtype=float32 kernels=reference tracker=none ignore_eos=true baseline=false"
SMALL = f"{WORK} prompts.limit=2 max_new_tokens=16"
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


def asked(record: Record, name: str, policy: str, budget: int) -> Asked:
    return Asked(
        policies=[policy],
        budgets=[budget],
        rules=["all"],
        children=["top_k"],
        sampling=sampling_of(record.settings),
        rates=rates_for(record, name),
        costs=None,
        batch=1,
    )


def rates_for(record: Record, name: str) -> str:
    """Of the record; of drafters that search, which have none, any will do."""
    return str(record.path / RATES) if name in (*RECORDED, *HEADS) else "zoo"


def replayed(record: Record, name: str, policy: str, budget: int) -> list[list[int]]:
    """Tokens of every step of every text, of deterministic trees."""
    (one,) = asked(record, name, policy, budget).configurations()
    sampling = sampling_of(record.settings)
    if one.shape is None or name not in (*RECORDED, *HEADS):
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


# Drafters by policies; what is marked slow differs from others by names and numbers alone.
POLICIES = {
    "small_llama": ("chain", "static", "optimal", "dynamic"),
    "early_exit": ("chain", "static", "optimal", "accuracy"),
    "eagle3": ("chain", "static", "optimal"),
    "ngram": ("chain", "optimal", "dynamic", "threshold"),
    "pld": ("chain", "static", "optimal", "threshold"),
    "suffix_decoding": ("chain", "static", "dynamic", "threshold"),
    "translated": ("chain", "static", "optimal", "dynamic"),
    "retriever": ("chain", "static", "dynamic", "threshold"),
    "rest": ("chain", "static", "dynamic", "threshold"),
}
QUICK: dict[str, tuple[str, ...]] = {
    "small_llama": ("static", "dynamic"),
    "ngram": ("dynamic",),
}


def cases() -> Iterator[Any]:
    for drafter, policies in POLICIES.items():
        quick = QUICK.get(drafter, ())
        if quick:
            yield drafter, quick
        rest = tuple(policy for policy in policies if policy not in quick)
        yield pytest.param(drafter, rest, marks=pytest.mark.slow)


def words_of(record: Record, name: str, policy: str, budget: int) -> str:
    """As the command line has it."""
    if policy == "static":
        (one,) = asked(record, name, policy, budget).configurations()
        widths = one.tree.widths  # type: ignore[attr-defined]
        return f"tree=static tree.widths={json.dumps(widths, separators=(',', ':'))}"
    by_rates = policy in ("optimal", "accuracy")
    own = f" tree.rates={rates_for(record, name)}" if by_rates else ""
    return f"tree={policy} tree.budget={budget}{own}"


@pytest.mark.parametrize(("drafter", "policies"), list(cases()))
def test_greedy_accepted_lengths_entry_by_entry(
    drafter: str, policies: tuple[str, ...], tmp_path: Path
) -> None:
    base = f"{SMALL} drafter={drafter} {files_of(drafter, tmp_path / 'files')}"
    record = recorded(tmp_path / "record", base)
    longest = 0
    for policy in policies:
        shape = words_of(record, drafter, policy, 8)
        texts = real(tmp_path / policy, f"{base} {shape}")
        assert [text["output_ids"] for text in texts] == record.outputs
        expected = [text["accepted_lengths"] for text in texts]
        assert replayed(record, drafter, policy, 8) == expected, policy
        longest = max(longest, *map(max, expected))
    assert longest > 2


def files_of(drafter: str, folder: Path) -> str:
    """Words for what a drafter reads: a draft with fewer tokens, a datastore."""
    folder.mkdir()
    if drafter == "translated":
        retokenize("zoo:draft", folder / "draft", keep=KEPT, seed=0)
        return f"drafter.path={folder / 'draft'}"
    if drafter == "rest":
        pages = [str(path) for path in sorted((ROOT / "docs").glob("*.md"))]
        build_datastore.main(["tokenizer=zoo:target", f"out={folder / 'built'}", *pages])
        return f"drafter.datastore={folder / 'built'}"
    return ""


TRAINED = {"eagle": Eagle, "mtp": MTP, "peagle": PEagle}  # by methods that begin a head


def head(name: str, folder: Path) -> str:
    """Words of a drafter with a head."""
    if name == "eagle3":
        return "drafter=eagle3"
    target = load_model("zoo:target")
    if name in TRAINED:
        made.begun(folder, target, TRAINED[name]())
    elif name == "medusa":
        made.medusa(folder, target)
    elif name == "dflash":
        dflash(folder, target.model, layout="speculators")
    else:  # what it says of its own chances is not among the probabilities
        dflash(folder, target.model, layout="speculators", markov="rnn", confidence="slot")
        return f"drafter=dspark drafter.path={folder} drafter.confidence=true"
    return f"drafter={name} drafter.path={folder}"


CHAIN = "tree=chain tree.budget=3 tree.children=sample"


def every_draft_kept(folder: Path, words: str) -> tuple[list[dict[str, Any]], Finished]:
    """A run that keeps all that is drafted, whose texts are recorded although they are not the
    target's: heads that were never trained then have long paths, too."""
    rule = "acceptance=relaxed acceptance.allow_lossy=true acceptance.top_n=8192"
    texts = real(folder, f"{words} {rule} acceptance.delta=1 {CHAIN}")
    outputs = {text["request"]: text["output_ids"] for text in texts}
    return texts, Finished(run=read(folder, str(folder), None, {}), texts=outputs)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("eagle", "peagle", "medusa", "mtp", "dflash", "early_exit")
]


@pytest.mark.parametrize("name", ["eagle3", "dspark", *SLOW])
def test_drafts_are_recorded_as_they_are_in_a_run(name: str, tmp_path: Path) -> None:
    """A run with sampled chains, and the record of its own texts: what the drafter gave to each
    token that it drew, at each depth after what it drew before, and the target, is what the
    record has."""
    words = head(name, tmp_path / "head") if name != "early_exit" else f"drafter={name}"
    words = f"{SMALL} {words} sampling=sample max_new_tokens=12"
    folder = tmp_path / "run"
    texts, finished = every_draft_kept(folder, f"{words} record.trees=99")
    given = settings(" ".join(finished.words([*words.split()[-3:], f"out={tmp_path / 'record'}"])))
    record = make(given, tmp_path / "record", QUIET(), finished)
    assert record.outputs == [text["output_ids"] for text in texts]
    names = ("draft_ids", "draft_logs", "draft_target_logs")
    ids, logs, target = (record.read(one) for one in names)
    draft = drawn_from(logs.astype(float), sampling_of(record.settings), CANDIDATES)
    starts_of = {
        text["request"]: np.cumsum([first, *text["accepted_lengths"]])
        for text, first in zip(texts, record.offsets.tolist(), strict=False)
    }
    seen = 0
    for line in (folder / "trees.jsonl").read_text().splitlines():
        tree = json.loads(line)
        place, end = (int(starts_of[tree["request"]][step]) for step in (tree["step"], -1))
        for depth in range(min(len(tree["path"]) - 1, end - place)):
            here = (place, depth) if record.levels else (place + depth,)
            (rank,) = np.flatnonzero(ids[here] == tree["tokens"][depth + 1])
            assert draft[(*here, rank)] == pytest.approx(tree["draft"][depth + 1], abs=2e-5)
            told = np.exp(target[(*here, rank)])
            assert told == pytest.approx(tree["target"][depth + 1], abs=2e-5)
            seen += 1
    assert seen >= 2 * 3 * 3  # texts, steps and drafts of a step


def test_texts_of_a_run_are_recorded_as_those_of_plain_decoding(tmp_path: Path) -> None:
    base = f"{SMALL} max_new_tokens=8 drafter=pld"
    real(tmp_path / "run", base)
    finished = Finished.read(tmp_path / "run")
    words = ["drafter=small_llama", f"out={tmp_path / 'told'}"]
    told = make(settings(finished.words(words)), tmp_path / "told", QUIET(), finished)
    plain = recorded(tmp_path / "plain", f"{SMALL} max_new_tokens=8 drafter=small_llama")
    for name in ("output_ids", "prompt_ids", "request", "target_ids", "draft_ids"):
        np.testing.assert_array_equal(told.read(name), plain.read(name), name)
    for name in ("own_log", "draft_logs", "draft_target_logs"):
        np.testing.assert_allclose(told.read(name), plain.read(name), atol=1e-4, err_msg=name)
    other = settings(finished.words([*words, "max_new_tokens=9"]))
    more = settings(finished.words([*words, "prompts.limit=3"]))
    for wrong, said in ((other, "differs in max_new_tokens"), (more, "1 of 3 texts are missing")):
        with pytest.raises(ValueError, match=said):
            make(wrong, tmp_path / "other", QUIET(), finished)


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"lossy": True}, "is LOSSY"),
        ({"synthetic": True}, "is SYNTHETIC"),
        ({"lossless": {"verdict": "failed", "reason": "x"}}, "is FAILED"),
    ],
)
def test_runs_of_other_laws_are_not_recorded(
    summary: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = folders.run(tmp_path / "run", folders.texts([2.0] * 3), **summary)
    with pytest.raises(ValueError, match=f"run=.*{said}"):
        Finished.read(folder)
    with pytest.raises(ValueError, match="holds no run"):
        Finished.read(tmp_path)
