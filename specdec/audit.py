"""Audit finished runs: was each token what the target alone would have said?

    specdec run drafter=small_llama record.evidence=true out=runs/one
    specdec audit runs/one

Reads the texts again by transformers' own pass of the target, compares what was recorded of the
verifying pass with it, bets on tokens above temperature 0, and writes audit.json into the folder.
Ends with exit code 3 if something is wrong, 0 if nothing is, with a warning if something may be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.lab.audit import Evidence
from specdec.lab.build import cache_of, method_of, placement_of
from specdec.lab.command import Positive, option, run_main
from specdec.lab.experiment import stop_tokens
from specdec.lab.files import read_object, replace_file, to_json
from specdec.lab.lines import tell
from specdec.lab.lossless import verdict
from specdec.lab.method import Method
from specdec.lab.runs import CONFIG, Side, read_config
from specdec.lab.setup import general_of, target_of
from specdec.lab.witness import Witness
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.request import KV_DTYPES

FOUND = "audit.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    runs: tuple[Path, ...] = option(about="folders of runs", free=True)
    tokens: Positive = option(100_000, "read of each, prompts included")


def work(options: Options) -> int:
    for folder in options.runs:
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: must be the folder of a run, with a {CONFIG}")
    console = Console()
    results = [audited(folder, options.tokens, console) for folder in options.runs]
    return 3 if any(found["verdict"] == "failed" for found in results) else 0


def audited(folder: Path, tokens: int, console: Console) -> dict[str, Any]:
    """What is found in a folder, which gets it as `FOUND`.

    Raises:
        ValueError: files that cannot be read, or a method that takes no audit.
    """
    config = read_config(folder / CONFIG)
    resolved = config["resolved"]
    settings = {name: v for name, v in config.items() if name not in ("schema", "resolved")}
    method, models = method_of(settings), Models(placement_of(settings))
    if method.rule.synthetic:
        raise ValueError(f"{folder}: acceptance is synthetic, its texts are nobody's")
    target = models.load(target_of(settings), setting="target.path")
    method.load(target, models)
    side, plain = Side(folder), _baseline(folder)
    side.read()
    ends = stop_tokens(target, ignore_eos=general_of(settings).ignore_eos)
    evidence = Evidence(
        lines=side.evidence.records,
        page_size=resolved["cache.page_size"],
        stop_tokens=ends,
        baseline=plain.evidence.records,
    )
    found = verdict(
        side.generations.records,
        _witness(settings, method, target, ends),
        method.sampling,
        baseline=plain.generations.records or None,
        lossy=method.rule.lossy(method.tree.children, method.sampling),
        exact=target.kernels.exact,
        evidence=evidence,
        sample=tokens,
    )
    replace_file(folder / FOUND, to_json(found, indent=1) + "\n")
    if not side.evidence.records:
        tell(console, f"{folder}: has no evidence; record.evidence=true keeps it")
    tell(console, f"{folder}: {found['verdict']}; {found['reason']}")
    return found


def _witness(
    settings: Mapping[str, Any], method: Method, target: PagedLM, ends: list[int]
) -> Witness:
    draft = None if method.sampling.greedy else method.drafter.own_model
    kv_dtype = KV_DTYPES[cache_of(settings).dtype]
    return Witness(target, kv_dtype, method.processors(target, ends), draft)


def _baseline(folder: Path) -> Side:
    """Plain decoding, which may have left nothing."""
    summary = read_object(folder / "summary.json") or {}
    side = Side(folder / str(summary.get("baseline_from") or "baseline"))
    side.read()
    return side


main = partial(run_main, Options, work, doc=__doc__)
