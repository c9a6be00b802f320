"""Audit finished runs: was each token what the target alone would have said?

    specdec run drafter=small_llama record.evidence=true out=runs/one
    specdec audit runs/one

Reads the texts again by transformers' own pass of the target, compares what was recorded of the
verifying pass with it, bets on tokens above temperature 0, and writes audit.json into the folder.
Ends with exit code 3 if something is wrong, 0 if nothing is, with a warning if something may be.

Where bets are best placed depends on what the drafter says of each token. A draft model of the
target's vocabulary is asked; of any other drafter that can be recorded, a record says it:

    specdec record run=runs/two out=records/two
    specdec audit runs/two record=records/two
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

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
from specdec.lab.witness import CHUNK, Drafts, Witness, drafts_of
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.replay.record import Record
from specdec.replay.recording import HEADS, RECORDED
from specdec.request import KV_DTYPES

FOUND = "audit.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    runs: tuple[Path, ...] = option(about="folders of runs", free=True)
    tokens: Positive = option(100_000, "read of each, prompts included")
    record: Path | None = option(None, "folder of a record of the run's texts")


def work(options: Options) -> int:
    for folder in options.runs:
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: must be the folder of a run, with a {CONFIG}")
    record = None if options.record is None else Record.open(options.record)
    if record is not None and len(options.runs) > 1:
        raise ValueError(f"record={options.record}: is of one run; audit that alone")
    console = Console()
    results = [audited(folder, options.tokens, console, record) for folder in options.runs]
    return 3 if any(found["verdict"] == "failed" for found in results) else 0


def audited(
    folder: Path, tokens: int, console: Console, record: Record | None = None
) -> dict[str, Any]:
    """What is found in a folder, which gets it as `FOUND`.

    Raises:
        ValueError: files that cannot be read, a record of other texts, or a method that takes no
            audit.
    """
    config = read_config(folder / CONFIG)
    resolved = config["resolved"]
    settings = {name: v for name, v in config.items() if name not in ("schema", "resolved")}
    method, models = method_of(settings), Models(placement_of(settings))
    if method.rule.synthetic:
        raise ValueError(f"{folder}: acceptance is synthetic, its texts are nobody's")
    target = replace(target_of(settings), tp=1).load(models)  # however many decoded with it
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
    witness = _witness(settings, method, target, ends, record)
    found = verdict(
        side.generations.records,
        witness,
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
    name = method.drafter_name
    if found["bets"] and witness.drafts is None and name in (*RECORDED, *HEADS):
        tell(console, f"{folder}: bets do not know what {name} says; record=FOLDER tells")
    tell(console, f"{folder}: {found['verdict']}; {found['reason']}")
    return found


def _witness(
    settings: Mapping[str, Any],
    method: Method,
    target: PagedLM,
    ends: list[int],
    record: Record | None,
) -> Witness:
    drafts: Drafts | None = None
    if record is not None:
        drafts = Recorded(record, target)
    elif not method.sampling.greedy:
        drafts = drafts_of(method.drafter.own_model, target)
    kv_dtype = KV_DTYPES[cache_of(settings).dtype]
    return Witness(target, kv_dtype, method.processors(target, ends), drafts)


class Recorded:
    """What a record says that a drafter says of texts, as `Drafts`: logits of the tokens that are
    recorded, minus infinity for all others; of a learned head what it says of the next token.

    Raises:
        ValueError: a record without a drafter's distributions.
    """

    def __init__(self, record: Record, target: PagedLM) -> None:
        if not record.drafts:
            raise ValueError(
                f"record={record.path}: holds no distributions of a drafter; audit without record"
            )
        self._path, self._target = record.path, target
        firsts, requests = record.offsets[:-1].tolist(), record.read("request").tolist()
        places = zip(firsts, record.outputs, strict=True)
        self._texts = dict(zip(requests, places, strict=True))
        ids, logs = (record.read(f"draft_{name}") for name in ("ids", "logs"))
        self._ids, self._logs = (x[:, 0] if x.ndim == 3 else x for x in (ids, logs))  # [t, K]

    def __call__(self, text: Mapping[str, Any]) -> Iterator[Tensor]:
        first, output = self._texts.get(text["request"], (0, []))
        if output and output != text["output_ids"]:
            raise ValueError(
                f"record={self._path}: holds another text of request {text['request']}; make it "
                f"by specdec record run=FOLDER"
            )
        for start in range(first, first + len(output), CHUNK):
            part = slice(start, min(start + CHUNK, first + len(output)))
            ids, logs = (torch.from_numpy(x[part]) for x in (self._ids, self._logs))
            whole = torch.full((len(ids), self._target.vocab_size), -torch.inf).double()
            whole.scatter_reduce_(1, ids.long(), logs.double(), "amax")  # void ids are 0
            yield whole.to(self._target.device)


def _baseline(folder: Path) -> Side:
    """Plain decoding, which may have left nothing."""
    summary = read_object(folder / "summary.json") or {}
    side = Side(folder / str(summary.get("baseline_from") or "baseline"))
    side.read()
    return side


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
