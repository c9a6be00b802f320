"""Does replay say what runs say? Records a drafter along the target's texts, replays hundreds of
configurations, runs some of them, and compares.

    python -m specdec.experiments.studies.replay out=replay.json page=replay.html
    python -m specdec.experiments.studies.replay out=every.json run=every batch=8
    python -m specdec.experiments.studies.replay out=replay_gpu.json device=cuda dtype=bfloat16 \\
        target=standin:llama3_8b draft=standin:llama_160m prompts=12 samples=1 budgets=[4,8]

Each configuration that is run is compared with its replay conversation by conversation, in tokens
a step; p-values are corrected for their number (Holm). Texts of the runs are others than those of
the record, and each run has random numbers of its own: all follow the target's law, and only the
record is common to all comparisons.

With batch=1 speeds are compared as well. So many samples as `timed` are decoded one at a time and
say how long a step takes; how many tokens it yields is said by all, of which the others are
decoded together. (Chance moves tokens a step of 48 texts by 3 %, seconds hardly.) Costs of passes
and of the loop are measured beside the timed ones: before them and, on a CPU, where other programs
come and go, between and after them. `gap` is by how much the replay's tokens per second are above
the run's; `parts` says why: the number of steps; in a median step the draft, the pass of the
target and the rest of the loop; and `uneven`, by how much a step takes less at the median, which
costs are, than in the mean. Each is a share of the run's seconds by which replay has more, so that
one above 0 makes replay slower. `alone` is the speed of the timed samples by themselves.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from specdec.calibration import costs_of
from specdec.costs import CostTable
from specdec.drafters.trees.static import Static
from specdec.experiments.figures.markdown import show
from specdec.experiments.figures.replay import beside_runs, runs_table
from specdec.lab.build import sampling_of
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.method import Method
from specdec.lab.prompts import Asked as Prompt
from specdec.lab.prompts import ask
from specdec.lab.running import forget_models
from specdec.lab.session import Decoded, OurSession
from specdec.lab.settings import settings_of
from specdec.lab.statistics import holm, product, ratio
from specdec.lab.workshop import Workshop, word
from specdec.protocols import Loaded
from specdec.record import make
from specdec.replay import command
from specdec.replay.configurations import Asked, Configuration
from specdec.replay.rates import RATES
from specdec.replay.record import CANDIDATES, Record
from specdec.replay.replaying import Replayer, widths_by_level

SEEDS_APART = 100_000  # of the runs and the record
TOGETHER = 16  # texts that nobody times
SIX = (  # policy, budget, children, rule
    ("chain", 4, "sample", "tokenwise"),
    ("chain", 4, "sample", "block"),
    ("static", 8, "sample", "recursive_rejection"),
    ("static", 8, "sample", "traversal"),
    ("static", 8, "top_k", "target_only"),
    ("static", 8, "sample_with_replacement", "multi_path"),
)
POLICIES = ("chain", "static", "optimal", "accuracy")
EVERY = (*POLICIES, "cost_aware", "dynamic", "threshold")
BUDGET = 8  # of the trees that are run
PARTS = ("draft",), ("verify",), ("accept", "commit", "other")  # verbs of each part of a step


@dataclass(frozen=True, kw_only=True)
class Options:
    target: str = option("zoo:target", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("zoo:draft", "likewise")
    device: str = option("cpu", "of everything", varies=True)
    dtype: str = option("float32", "of both models")
    path: str | None = option(None, "prompts, as in prompts.path; the built-in ones")
    prompts: Positive = option(24, "of them")
    samples: Positive = option(6, "of each")
    timed: Positive = option(2, "of them, where batch=1")
    tokens: Positive = option(48, "new ones")
    temperature: float = option(1.0, "of sampling")
    budgets: tuple[Positive, ...] = option((1, 2, 4, 6, 8, 12, 16), "replayed")
    record: Path = option(Path("replay_record"), "folder of the record, made if there is none")
    run: Literal["six", "every", "none"] = option("six", "of the configurations: every pair of a")
    batch: Positive = option(1, "sequences together in runs; speeds are compared at 1")
    page: Path | None = option(
        None, "HTML file of what is replayed, as of specdec replay, and of the runs"
    )
    out: Path = option(about="result file")

    @property
    def words(self) -> str:
        models = f"{word('target.path', self.target)} {word('drafter.path', self.draft)}"
        return (
            f"{models} drafter=small_llama sampling=sample ignore_eos=true tracker=none "
            f"sampling.temperature={self.temperature} device={self.device} dtype={self.dtype}"
        )


class Runs:
    """Runs of configurations, each with random numbers of its own.

    Args:
        shop: makes their methods.
        prompts: each is asked `samples` times.
        timed: of these, where they are decoded one at a time.
        tokens: new ones of each text.
        batch: sequences together.
    """

    def __init__(
        self,
        shop: Workshop,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        timed: int,
        tokens: int,
        batch: int,
    ) -> None:
        self.shop, self.prompts, self.tokens, self.batch = shop, prompts, tokens, batch
        self.samples, self.timed = samples, min(timed, samples)
        self.longest = max(len(prompt.tokens) for prompt in prompts) + tokens
        self._texts = 0  # of all runs so far

    def method(self, one: Configuration) -> Method:
        made = self.shop.method(f"tree.children={one.children} acceptance={one.rule}")
        return replace(made, tree=one.tree, tree_name=one.policy)

    def session(self, method: Method, rows: int) -> OurSession:
        return self.shop.session(method, rows=rows, longest=self.longest)

    def run(self, method: Method, samples: int, *, warm: bool, rows: int | None = None) -> Decoded:
        """So many samples of all prompts, one after the other.

        Args:
            rows: sequences together; None for those of the batch.
        """
        session = self.session(method, rows or self.batch)
        if warm:
            session.warm_up(self.prompts[0].tokens)
        first = SEEDS_APART + self._texts
        asked = [prompt for _ in range(samples) for prompt in self.prompts]
        self._texts += len(asked)
        return session.decode([p._replace(id=first + i) for i, p in enumerate(asked)], self.tokens)

    def beside(self, method: Method) -> tuple[list[Decoded], list[CostTable]]:
        """The timed samples, with costs measured beside them."""
        if self.shop.target.device.type != "cpu":
            table = self.costs(method)
            return [self.run(method, self.timed, warm=True)], [table]
        done, tables = [], [self.costs(method)]
        for _ in range(self.timed):
            done.append(self.run(method, 1, warm=True))
            tables.append(self.costs(method))
        return done, tables

    def costs(self, method: Method) -> CostTable:
        """Measured now."""
        target, tree = self.shop.target, method.tree

        def chain(levels: int) -> Static:  # grown as the trees of one shape that are run
            return Static(widths=[1] * levels, children=tree.children)

        loaded = Loaded(
            target=target,
            drafter=method.drafter,
            capacity=self.session(method, self.batch).decoder.capacity,
            decoder=lambda tree, room: replace(method, tree=tree).decoder(target, room),
        )
        given = {"batch": self.batch, "context": None, "budget": max(2, tree.budget)}
        return costs_of(loaded, "measure", **given, chain=chain)[0]  # type: ignore[arg-type]


def work(options: Options) -> None:
    if not options.budgets:
        raise ValueError("budgets=[]: must be one number at least")
    record = record_of(options)
    runs = runs_of(options)
    result = begin(options, runs.shop.target.device)
    chain = asked(record, ("chain",), (max(options.budgets),)).configurations()[0]
    table = runs.costs(runs.method(chain))
    result["replay"] = replayed(record, options.budgets, table, options.batch)
    if options.page is not None:
        given = command.Options(record=(record.path,), policies=POLICIES, budgets=options.budgets)
        command.work(given)
    result["run"] = []
    write(options.out, result)
    told, found = Foretelling(record), list[dict[str, Any]]()
    for one in track(wanted(options.run, record), description="run"):
        found.append(compared(one, told, runs))
        result["run"] = corrected(found)
        write(options.out, result)
    if options.page is not None:
        page = (record.path / "report.html").read_text(encoding="utf-8")
        options.page.write_text(beside_runs(page, result), encoding="utf-8")
    show(runs_table(result))


def record_of(options: Options) -> Record:
    words = (
        f"{options.words} {word('prompts.path', options.path)} prompts.limit={options.prompts} "
        f"prompts.samples={options.samples} prompts.turns=1 max_new_tokens={options.tokens} "
        f"batch_size={max(8, options.batch)} resume=auto kernels.graphs=false"
    )
    settings = settings_of(f"{words} {word('out', str(options.record))}")
    try:
        record = make(settings, options.record, Console())
    except ValueError as error:  # where the record is, is another option here
        raise ValueError(re.sub("^out=", "record=", str(error))) from error
    forget_models()  # which may be large
    return record


def runs_of(options: Options) -> Runs:
    shop = Workshop(options.words)
    sets = ask(shop.target.tokenizer, {"set": options.path}, limit=options.prompts)
    sizes = {name: getattr(options, name) for name in ("samples", "timed", "tokens", "batch")}
    return Runs(shop, sets["set"], **sizes)


def asked(record: Record, policies: Sequence[str], budgets: Sequence[int]) -> Asked:
    return Asked(
        policies=policies,
        budgets=budgets,
        rules=("all",),
        children=("all",),
        sampling=sampling_of(record.settings),
        rates=str(record.path / RATES),
        costs="cpu" if "cost_aware" in policies else None,
        batch=1,
    )


def replayer_of(record: Record, table: CostTable | None = None, batch: int = 1) -> Replayer:
    given = {"sampling": sampling_of(record.settings), "candidates": CANDIDATES}
    return Replayer(record=record, table=table, batch=batch, **given)  # type: ignore[arg-type]


def replayed(
    record: Record, budgets: Sequence[int], table: CostTable, batch: int
) -> dict[str, Any]:
    """All configurations of one shape, and what that took."""
    begun, used = time.perf_counter(), time.process_time()
    replayer = replayer_of(record, table, batch)
    rows = [
        replayer.figures(replayer.replay(one))
        for one in track(asked(record, POLICIES, budgets).configurations(), description="replayed")
    ]
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - used,
        "configurations": len(rows),
        "tokens": int(replayer.count.sum()),
        "rows": rows,
    }


def wanted(which: str, record: Record) -> list[Configuration]:
    """What is run. Of policies that agree on a shape the first is."""
    if which == "every":
        every = asked(record, EVERY, (BUDGET,)).configurations()
        shapes = {(one.rule, one.children, one.shape or one.policy): one for one in every[::-1]}
        return list(shapes.values())[::-1]
    if which == "none":
        return []
    budgets = sorted({budget for _, budget, _, _ in SIX})
    known = asked(record, POLICIES, budgets).configurations()
    return [one for one in known if tuple(one.labels.values()) in SIX]


class Foretelling:
    """Replays of a record, one after the other, which have much in common."""

    def __init__(self, record: Record) -> None:
        self.record, self._replayer = record, replayer_of(record)
        self._walker = command.Walker(record, "small_llama", record.settings)

    def sums(
        self, one: Configuration, prompts: Sequence[Prompt]
    ) -> tuple[list[float], list[float]]:
        """Tokens and expected steps of the texts of each prompt."""
        replayer = self._replayer
        if one.shape is not None:
            outcome = replayer.replay(one)
        else:
            outcome = self._walker.replay(one, replayer)
        places = {tuple(prompt.tokens): i for i, prompt in enumerate(prompts)}
        index = np.array([places[tuple(text)] for text in self.record.prompts])
        tokens = np.bincount(index, replayer.count.astype(float)).tolist()
        return tokens, np.bincount(index, outcome.steps).tolist()


def compared(one: Configuration, told: Foretelling, runs: Runs) -> dict[str, Any]:
    """What a run of a configuration says, and its replay, prompt by prompt."""
    method = runs.method(one)
    alone, tables = list[Decoded](), list[CostTable]()
    rest, rows = runs.samples, None
    if runs.batch == 1 and one.shape is not None:
        alone, tables = runs.beside(method)
        rest, rows = rest - runs.timed, TOGETHER
    together = [runs.run(method, rest, warm=False, rows=rows)] if rest else []
    done = [*alone, *together]
    steps = np.concatenate([d.passes for d in done]).reshape(runs.samples, -1).sum(0)
    told_tokens, told_steps = told.sums(one, runs.prompts)
    tokens = [float(runs.tokens * runs.samples)] * len(runs.prompts)
    apart = product([tokens, told_steps], [steps.tolist(), told_tokens])
    found = {
        **one.labels,
        "run": ratio(tokens, steps.tolist()).around,
        "replay": ratio(told_tokens, told_steps).around,
        "ratio": apart.around,
        "p": apart.p,
        "prompts": apart.singles,
        "seconds": sum(d.seconds for d in done),
    }
    if alone:
        found["speed"] = speed(one, alone, sum(tokens) / steps.sum(), told.record, tables)
    return found


def speed(
    one: Configuration,
    alone: Sequence[Decoded],
    length: float,
    record: Record,
    tables: Sequence[CostTable],
) -> dict[str, Any]:
    """Tokens per second of a run at a batch of 1 and as foretold, and what sets them apart.

    Args:
        alone: texts that were decoded one at a time.
        length: tokens of a step.
        tables: costs, each of which counts as much.
    """
    steps = [step.seconds for decoded in alone for step in decoded.steps]
    tokens = sum(len(text) for decoded in alone for text in decoded.outputs)
    verbs = np.array([[sum(step.get(verb, 0.0) for verb in of) for of in PARTS] for step in steps])
    median, mean = np.median(verbs, axis=0), float(verbs.sum(1).mean())
    replayers = [replayer_of(record, table) for table in tables]
    rows = [replayer.figures(replayer.replay(one)) for replayer in replayers]
    predicted = float(np.mean([row["tokens_per_second"] for row in rows]))
    measured = length / mean
    told = np.mean([step_costs(one, table) for table in tables], axis=0)
    shares = [*((told - median) / mean).tolist(), float(median.sum() / mean - 1.0)]
    return {
        "measured": measured,
        "predicted": predicted,
        "gap": predicted / measured - 1.0,
        "alone": tokens / len(steps) / mean,
        "parts": {
            "steps": length / rows[0]["tokens_per_step"] - 1.0,
            **dict(zip(("draft", "verify", "loop", "uneven"), shares, strict=True)),
        },
    }


def step_costs(one: Configuration, table: CostTable) -> NDArray[np.float64]:
    """Seconds of draft, verification and loop in a step, by a table of a single context."""
    shape = one.shape or frozenset()
    levels = [table.draft(1, width, 1.0) + table.level(1) for width in widths_by_level(shape)]
    verify = table.verify(1, len(shape) + 1, 1.0)
    return np.array([table.start(1) + sum(levels), verify, table.step(1, len(levels))])


def corrected(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With Holm's correction."""
    chances = holm([one["p"] for one in found])
    return [{**one, "holm": p} for one, p in zip(found, chances, strict=True)]


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
