"""Replay a record: what would other trees, budgets and rules have made of these texts?

    specdec record target=zoo drafter=small_llama sampling=sample out=records/zoo
    specdec replay records/zoo
    specdec replay records/zoo policies=[chain,optimal] budgets=[4,8,16] rules=[block,traversal]
    specdec replay records/zoo policies=[chain,optimal,cost_aware] costs=cpu oracle=true
    specdec replay records/plain drafter="ngram drafter.min_match=2" policies=[chain,dynamic]

Exact in expectation for every lossless rule and every tree of one shape (`docs/replay.md`), and
without a model. Policies whose trees follow the draft, and drafters that search, draft along the
texts: of those the accepted lengths are the very ones of a run. Prints the best, and writes
replay.csv, replay.json and speculation_profile.json, of the best method, into the record's folder
or `out`.
"""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from specdec.costs import CostTable
from specdec.lab.build import build, group_of, imported, placement_of, sampling_of
from specdec.lab.command import Positive, option, run_main
from specdec.lab.files import replace_file
from specdec.lab.lines import tell
from specdec.lab.settings import settings_of
from specdec.models.load import Models
from specdec.protocols import Drafter
from specdec.replay.configurations import Asked, Configuration
from specdec.replay.profile import Profile
from specdec.replay.rates import RATES
from specdec.replay.record import Record, write_json
from specdec.replay.recording import RECORDED, SEARCHING
from specdec.replay.replaying import Outcome, Replayer
from specdec.replay.survival import BY_PATH
from specdec.replay.walk import Walked, walk
from specdec.request import Request

SHOWN = 20  # rows of the table


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    record: tuple[Path, ...] = option(about="folder of a record", free=True)
    drafter: str | None = option(None, "and its settings, in words; the record's")
    policies: tuple[str, ...] = option(("chain", "static", "optimal"), "tree policies")
    budgets: tuple[Positive, ...] = option((2, 4, 8, 16), "nodes of a tree at most")
    children: tuple[str, ...] = option(("all",), "top_k, sample, sample_with_replacement or all")
    rules: tuple[str, ...] = option(("all",), "acceptance rules, or all that are lossless")
    costs: str | None = option(None, "name or file of a cost table, for tokens per second")
    batch: Positive = option(1, "sequences together, for costs")
    oracle: bool = option(False, "also the best choice among these at every place")
    histories: Annotated[int, Field(ge=1)] = option(8, "draws that stand for rejected siblings")
    out: Path | None = option(None, "folder of the files; the record's")


def work(options: Options) -> None:
    if len(options.record) != 1:
        raise ValueError(f"record={list(map(str, options.record))}: must be one folder")
    if options.oracle and options.costs is None:
        raise ValueError("oracle=true: needs costs=NAME or a file of a cost table")
    record, console = Record.open(options.record[0]), Console()
    out = options.out or record.path
    name, settings = _drafter_settings(record, options.drafter)
    asked = _asked(record, options, name)
    configurations = asked.configurations()
    table = None if options.costs is None else CostTable.load(options.costs, setting="costs")
    replayer = Replayer(
        record=record,
        sampling=asked.sampling,
        candidates=int(group_of(settings, "drafter").get("candidates") or 64),
        table=table,
        batch=options.batch,
        histories=options.histories,
        keep=options.oracle,
    )
    walker = Walker(record, name, settings)
    outcomes = [
        replayer.replay(one) if one.shape is not None and name in RECORDED else walker.replay(one)
        for one in configurations
    ]
    rows = [{"drafter": name, **replayer.figures(one)} for one in outcomes]
    result: dict[str, Any] = {
        "schema": 1,
        "record": str(record.path),
        "tokens": int(replayer.count.sum()),
        "costs": options.costs,
        "rows": rows,
    }
    if options.oracle:
        result["oracle"] = _oracle(replayer, outcomes, rows)
    _write(out, result, rows, _profile(replayer, outcomes, rows, name))
    _show(rows, result, console)
    tell(console, f"{len(rows)} configurations in {out / 'replay.csv'}")


def _drafter_settings(record: Record, words: str | None) -> tuple[str, dict[str, Any]]:
    """The drafter's name, and settings with it.

    Raises:
        ValueError: one that a record cannot answer for.
    """
    settings, own = record.settings, record.settings["choices"]["drafter"]
    if words is None:
        return own, settings
    name = words.partition(" ")[0]
    if name not in SEARCHING and name != own:
        raise ValueError(
            f"drafter={name}: the record is of {own}; replay that, one of "
            f"{', '.join(SEARCHING)}, or record {name}"
        )
    given = settings_of([*shlex.split(f"drafter={words}"), "tracker=none"])
    fixed = {k: v for k, v in given["drafter"].items() if k not in ("candidates", "depth")}
    before = settings["drafter"]
    if name == own and name in RECORDED and any(before.get(k) != v for k, v in fixed.items()):
        raise ValueError(f"drafter={words}: not the drafter of the record; record it anew")
    return name, {**settings, "drafter": given["drafter"], "choices": given["choices"]}


def _asked(record: Record, options: Options, name: str) -> Asked:
    if name == "none":
        raise ValueError(f"drafter=none: nothing is drafted; give one of {', '.join(SEARCHING)}")
    searching = name in SEARCHING
    rates = record.path / RATES
    return Asked(
        policies=options.policies,
        budgets=options.budgets,
        rules=options.rules,
        children=("top_k",) if searching else options.children,
        sampling=sampling_of(record.settings),
        rates=str(rates) if rates.is_file() and not searching else None,
        costs=options.costs,
        batch=options.batch,
    )


class Walker:
    """Replays what is a function of the tokens. The drafter is loaded when it is first needed."""

    def __init__(self, record: Record, name: str, settings: dict[str, Any]) -> None:
        self.record, self.name, self.settings = record, name, settings
        self._drafter: Drafter | None = None

    def _loaded(self) -> Drafter:
        if self._drafter is None:
            if self.name == "early_exit":
                raise ValueError(
                    "drafter=early_exit: trees that follow the draft need the target; use "
                    "policies of one shape, or run it"
                )
            placed = {**self.settings, "device": "cpu"}
            models = Models(placement_of(placed))
            target = models.load(self.settings["target"]["path"], setting="target.path")
            group = group_of(self.settings, "drafter")
            kind = imported("drafter", group["_target_"])
            drafter: Drafter = build(kind, "drafter", group)
            drafter.name = self.name
            drafter.find()
            drafter.load(target, models)
            self._drafter = drafter
        return self._drafter

    def walked(self, configuration: Configuration) -> Walked:
        """Along the texts that have tokens.

        Raises:
            ValueError: trees that the drafter cannot draft.
        """
        drafter, record = self._loaded(), self.record
        drafter.check(configuration.tree)
        ids, categories = record.read("request"), record.about["categories"]
        requests = [
            Request(id=int(i), prompt_ids=prompt, max_new_tokens=len(output), category=category)
            for i, prompt, output, category in zip(
                ids, record.prompts, record.outputs, categories, strict=True
            )
            if output
        ]
        return walk(
            requests,
            [output for output in record.outputs if output],
            drafter=drafter,
            tree=configuration.tree,
            sampling=sampling_of(record.settings),
        )

    def replay(self, configuration: Configuration) -> Outcome:
        record, walked = self.record, self.walked(configuration)
        ids = record.read("request")
        steps, nodes = np.zeros(len(ids)), np.zeros(len(ids))
        some = np.array([bool(output) for output in record.outputs])
        steps[some] = [len(lengths) for lengths in walked.lengths]
        nodes[some] = walked.nodes
        every = [n for lengths in walked.lengths for n in lengths]
        kept = [sum(n > depth for n in every) for depth in range(max(every))]
        return Outcome(
            configuration=configuration,
            steps=steps,
            nodes=nodes,
            seconds=None,
            kept=np.array(kept, float),
        )


def _oracle(
    replayer: Replayer, outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Beside it by how much every policy's best falls short of it."""
    known = [one for one in outcomes if one.survivals is not None]
    if not known:
        raise ValueError("oracle=true: none of these trees has one shape")
    best = replayer.oracle(known)
    pace: dict[str, float] = {}
    for row in rows:
        if "tokens_per_second" in row:
            policy = row["tree"]
            pace[policy] = max(pace.get(policy, 0.0), row["tokens_per_second"])
    regret = {policy: 1.0 - found / best for policy, found in pace.items()}
    return {"tokens_per_second": best, "regret": regret}


def _best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    name = "tokens_per_second" if "tokens_per_second" in rows[0] else "tokens_per_step"
    return sorted(rows, key=lambda row: -row.get(name, 0.0))


def _profile(
    replayer: Replayer,
    outcomes: Sequence[Outcome],
    rows: Sequence[dict[str, Any]],
    name: str,
) -> dict[str, Any]:
    place = [id(row) for row in rows].index(id(_best(rows)[0]))
    outcome, row = outcomes[place], rows[place]
    marginal = outcome.kept[1:] / outcome.kept[0]
    tokens = replayer.count.astype(float)
    some = outcome.steps > 0
    profile = Profile(
        marginal=tuple(np.minimum.accumulate(marginal.clip(0.0, 1.0)).tolist()),
        mean=float(tokens.sum() / outcome.steps.sum()),
        mean_per_request=float((tokens[some] / outcome.steps[some]).mean()),
    )
    settings = replayer.record.settings
    shape = outcome.configuration.shape
    return profile.write(
        method="draft_model" if name == "small_llama" else name,
        target=settings["target"]["path"],
        draft=settings["drafter"].get("path"),
        tree=shape is None or any(node[-1] for node in shape),
        blockwise=outcome.configuration.rule in BY_PATH,
        conditions={"replayed_from": replayer.record.path.name, **row},
    )


def _write(
    out: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]], profile: dict[str, Any]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(out / "replay.csv", text.getvalue())
    write_json(out / "replay.json", result)
    write_json(out / "speculation_profile.json", profile)


def _show(rows: Sequence[dict[str, Any]], result: dict[str, Any], console: Console) -> None:
    timed = "tokens_per_second" in rows[0]
    columns = ["tree", "budget", "children", "acceptance", "tokens/step", "95 %", "nodes/step"]
    table = Table(*columns, *(["tokens/s"] if timed else []))
    for row in _best(rows)[:SHOWN]:
        ends = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        cells = [row["tree"], row["budget"], row["children"], row["acceptance"]]
        cells += [f"{row['tokens_per_step']:.3f}", ends, f"{row['nodes_per_step']:.1f}"]
        if timed:
            cells.append(f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else "")
        table.add_row(*map(str, cells))
    console.print(table)
    if len(rows) > SHOWN:
        tell(console, f"the best {SHOWN} of {len(rows)}")
    if "oracle" in result:
        oracle = result["oracle"]
        regret = ", ".join(f"{name} {share:.1%}" for name, share in oracle["regret"].items())
        tell(console, f"best choice at every place: {oracle['tokens_per_second']:.1f} tokens/s")
        tell(console, f"short of it: {regret}")


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
