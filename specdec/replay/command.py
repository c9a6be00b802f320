"""Replay a record: what would other trees, budgets and rules have made of these texts?

    specdec record target=zoo drafter=small_llama sampling=sample out=records/zoo
    specdec replay records/zoo
    specdec replay records/zoo policies=[chain,optimal] budgets=[4,8,16] rules=[block,traversal]
    specdec replay records/zoo policies=[chain,optimal,cost_aware] costs=cpu oracle=true
    specdec replay records/plain drafter="ngram drafter.min_match=2" policies=[chain,dynamic]

Exact in expectation for every lossless rule and every tree of one shape (`docs/replay.md`), and
without a model. Policies whose trees follow the draft, and drafters that search, draft along the
texts: of those the accepted lengths are the very ones of a run. Prints the best, and writes
report.html, replay.csv, replay.json, which `specdec compare` sets beside runs, and
speculation_profile.json, of the best method, into the record's folder or `out`.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from specdec.costs import CostTable
from specdec.lab.build import build, group_of, imported, placement_of, sampling_of
from specdec.lab.command import Positive, option, run_main
from specdec.lab.lines import tell
from specdec.lab.settings import settings_of
from specdec.models.load import Models, load_tokenizer
from specdec.protocols import Drafter, TreePolicy, levels_of
from specdec.replay import results
from specdec.replay.configurations import Asked, Configuration
from specdec.replay.rates import RATES
from specdec.replay.record import Record, known_draws
from specdec.replay.recording import HEADS, RECORDED, SEARCHING
from specdec.replay.replaying import Outcome, Replayer
from specdec.replay.walk import Spoken, Walked, draft_widths, walk
from specdec.request import Request

TOGETHER = 16  # texts that a draft model walks along


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `--help`."""

    record: tuple[Path, ...] = option(about="folder of a record", free=True)
    drafter: str | None = option(None, "and its settings, in words; the record's")
    policies: tuple[str, ...] = option(("chain", "static", "optimal"), "tree policies")
    budgets: tuple[Positive, ...] = option((2, 4, 8, 16), "nodes of a tree at most")
    children: tuple[str, ...] = option(("all",), "top_k, sample, sample_with_replacement or all")
    rules: tuple[str, ...] = option(("all",), "acceptance rules, or all that are lossless")
    rates: str | None = option(None, "for policies that choose by rates, as tree.rates; its own")
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
        replayer.replay(one)
        if one.shape is not None and name in (*RECORDED, *HEADS)
        else walker.replay(one, replayer)
        for one in configurations
    ]
    rows = [{"drafter": name, **replayer.figures(one)} for one in outcomes]
    result = results.result_of(replayer, outcomes, rows, settings=settings, options=options)
    result["left_out"] = asked.left_out()
    if options.oracle:
        result["oracle"] = results.oracle(replayer, outcomes, rows)
    results.write(out, result, rows, results.profile_of(replayer, outcomes, rows, name))
    results.show(rows, result, console)
    if result["left_out"]:
        tell(console, f"left out: {'; '.join(map(_left_out, result['left_out']))}")
    tell(console, f"{len(rows)} configurations in {out / 'report.html'}")


def _left_out(found: Mapping[str, Any]) -> str:
    policies, rules = (", ".join(found[name]) for name in ("policies", "rules"))
    return f"{policies} with {rules} ({found['why']})"


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
    try:
        apart = shlex.split(f"drafter={words}")
    except ValueError as error:
        raise ValueError(f"drafter={words}: {error}; close it") from None
    given = settings_of([*apart, "tracker=none"])
    fixed = {k: v for k, v in given["drafter"].items() if k not in ("candidates", "depth")}
    before = settings["drafter"]
    if (
        name == own
        and name in (*RECORDED, *HEADS)
        and any(before.get(k) != v for k, v in fixed.items())
    ):
        raise ValueError(f"drafter={words}: not the drafter of the record; record it anew")
    return name, {**settings, "drafter": given["drafter"], "choices": given["choices"]}


def _asked(record: Record, options: Options, name: str) -> Asked:
    if name == "none":
        raise ValueError(f"drafter=none: nothing is drafted; give one of {', '.join(SEARCHING)}")
    searching = name in SEARCHING
    if searching and not {"all", "top_k"} & {*options.children}:
        raise ValueError(
            f"children={','.join(options.children)}: {name} has no probabilities to draw children "
            f"by; use children=top_k"
        )
    sampling = sampling_of(record.settings)
    # Of filters at another temperature than 1 a record does not say what children are drawn from.
    fixed = searching or ("all" in options.children and not known_draws(sampling))
    own = record.path / RATES
    rates = str(own) if own.is_file() and not searching else None
    return Asked(
        policies=options.policies,
        budgets=options.budgets,
        rules=options.rules,
        children=("top_k",) if fixed else options.children,
        sampling=sampling,
        rates=options.rates or rates,
        costs=options.costs,
        batch=options.batch,
        depth=None if searching else record.levels,
    )


class Walker:
    """Replays what is a function of the tokens. The drafter is loaded when it is first needed."""

    def __init__(self, record: Record, name: str, settings: dict[str, Any]) -> None:
        self.record, self.name, self.settings = record, name, settings
        self._drafter: Drafter | None = None

    def _loaded(self) -> Drafter:
        if self._drafter is None:
            if self.name in ("early_exit", *HEADS):
                raise ValueError(
                    f"drafter={self.name}: trees that follow the draft need the target; use "
                    f"policies of one shape, or run it"
                )
            placed = {**self.settings, "device": "cpu"}
            models = Models(placement_of(placed))
            path = self.settings["target"]["path"]
            target = Spoken(
                name=path,
                vocab_size=self.record.about["vocab_size"],
                tokenizer=load_tokenizer(path, setting="target.path"),
            )
            group = group_of(self.settings, "drafter")
            kind = imported("drafter", group["_target_"])
            drafter: Drafter = build(kind, "drafter", group)
            drafter.name = self.name
            drafter.find()
            drafter.load(target, models)  # type: ignore[arg-type]  # of it they read no more
            self._drafter = drafter
        return self._drafter

    def walked(self, configuration: Configuration, *, everywhere: bool = False) -> Walked:
        """Along the texts.

        Args:
            everywhere: as in `walk`.

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
        ]
        return walk(
            requests,
            record.outputs,
            drafter=drafter,
            tree=configuration.tree,
            sampling=sampling_of(record.settings),
            everywhere=everywhere,
            rows=TOGETHER if self.name in RECORDED else 1,
        )

    def replay(self, configuration: Configuration, replayer: Replayer) -> Outcome:
        """What comes of it, by the same chain as of trees of one shape."""
        walked = self.walked(configuration, everywhere=replayer.keep)
        return replayer.outcome(
            configuration,
            walked.survivals,
            nodes=walked.nodes,
            widths=self._widths(configuration.tree, replayer.table),
        )

    def _widths(self, tree: TreePolicy, table: CostTable | None) -> list[int]:
        """Of the passes of a draft. What a search takes is not known from a table of a draft
        model, and counts as nothing."""
        levels = levels_of(tree, self._loaded().depth)
        if self.name in RECORDED:
            return draft_widths(tree, levels)
        about = {} if table is None else table.about or {}
        own = about.get("models", {}).get("draft", "") is None
        return [1] * levels if own else []


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
