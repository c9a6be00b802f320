"""Does replay say what runs say? Records a drafter along the target's texts, replays hundreds of
configurations, runs some of them, and compares.

    python -m specdec.experiments.studies.replay out=replay.json record=records/zoo_t1

Each configuration that is run is compared with its replay conversation by conversation, in tokens
a step; p-values are corrected for their number (Holm). Texts of the runs are others than those of
the record: both follow the target's law.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from specdec.lab.build import sampling_of
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.prompts import Asked as Prompt
from specdec.lab.prompts import ask
from specdec.lab.session import OurSession
from specdec.lab.settings import settings_of
from specdec.lab.statistics import holm, product, ratio
from specdec.lab.workshop import Workshop, word
from specdec.record import make
from specdec.replay.configurations import Asked, Configuration
from specdec.replay.rates import RATES
from specdec.replay.record import CANDIDATES, Record
from specdec.replay.replaying import Replayer

SEEDS_APART = 100_000  # of the runs and the record
RUN = (  # policy, budget, children, rule
    ("chain", 4, "sample", "tokenwise"),
    ("chain", 4, "sample", "block"),
    ("static", 8, "sample", "recursive_rejection"),
    ("optimal", 8, "sample", "traversal"),
    ("optimal", 8, "sample", "target_only"),
    ("optimal", 8, "top_k", "target_only"),
    ("static", 8, "sample_with_replacement", "recursive_rejection"),
    ("optimal", 8, "sample_with_replacement", "traversal"),
    ("optimal", 8, "sample_with_replacement", "k_seq"),
    ("static", 8, "sample_with_replacement", "multi_path"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    target: str = option("zoo:target", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("zoo:draft", "likewise")
    device: str = option("cpu", "of everything", varies=True)
    prompts: Positive = option(24, "built-in ones")
    samples: Positive = option(2, "of each")
    tokens: Positive = option(48, "new ones")
    temperature: float = option(1.0, "of sampling")
    budgets: tuple[Positive, ...] = option(
        (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32), "replayed"
    )
    record: Path = option(Path("replay_record"), "folder of the record, made if there is none")
    run: bool = option(True, "also run some of the configurations")
    out: Path = option(about="result file")

    @property
    def words(self) -> str:
        models = f"{word('target.path', self.target)} {word('drafter.path', self.draft)}"
        return (
            f"{models} drafter=small_llama sampling=sample ignore_eos=true tracker=none "
            f"sampling.temperature={self.temperature} device={self.device}"
        )


def work(options: Options) -> None:
    record = _record(options)
    asked = Asked(
        policies=("chain", "static", "optimal", "accuracy"),
        budgets=options.budgets,
        rules=("all",),
        children=("all",),
        sampling=sampling_of(record.settings),
        rates=str(record.path / RATES),
        costs=None,
        batch=1,
    )
    replayer = Replayer(record=record, sampling=asked.sampling, candidates=CANDIDATES)
    shop = Workshop(options.words)
    result = begin(options, shop.target.device)
    begun = time.perf_counter()
    configurations = asked.configurations()
    rows = [
        replayer.figures(replayer.replay(one))
        for one in track(configurations, description="replayed")
    ]
    result["replay"] = {
        "seconds": time.perf_counter() - begun,
        "configurations": len(rows),
        "tokens": int(replayer.count.sum()),
        "rows": rows,
    }
    write(options.out, result)
    wanted = [one for one in configurations if key(one) in RUN] if options.run else []
    found = [_compared(one, replayer, shop, options) for one in track(wanted, description="run")]
    for one, corrected in zip(found, holm([one["p"] for one in found]), strict=True):
        one["holm"] = corrected
    result["run"] = found
    write(options.out, result)
    show(found, result, Console())


def key(one: Configuration) -> tuple[str, int, str, str]:
    return one.policy, one.budget, one.children, one.rule


def _record(options: Options) -> Record:
    words = (
        f"{options.words} prompts.limit={options.prompts} prompts.samples={options.samples} "
        f"prompts.turns=1 max_new_tokens={options.tokens} batch_size=8 resume=auto"
    )
    settings = settings_of(f"{words} {word('out', str(options.record))}")
    return make(settings, options.record, Console())


def _compared(
    one: Configuration, replayer: Replayer, shop: Workshop, options: Options
) -> dict[str, Any]:
    """What a run of a configuration says, and its replay, prompt by prompt."""
    prompts = ask(shop.target.tokenizer, {"builtin": None}, limit=options.prompts)["builtin"]
    group = [tuple(text) for text in replayer.record.prompts]
    places = {tuple(prompt.tokens): i for i, prompt in enumerate(prompts)}
    outcome = replayer.replay(one)
    index = np.array([places[text] for text in group])
    told_tokens = np.bincount(index, replayer.count.astype(float)).tolist()
    told_steps = np.bincount(index, outcome.steps).tolist()
    begun = time.perf_counter()
    steps = _steps(one, shop, prompts, options)
    tokens = [float(options.tokens * options.samples)] * len(prompts)
    apart = product([tokens, told_steps], [steps, told_tokens])
    real, told = ratio(tokens, steps), ratio(told_tokens, told_steps)
    return {
        **one.labels,
        "run": real.around,
        "replay": told.around,
        "ratio": apart.around,
        "p": apart.p,
        "seconds": time.perf_counter() - begun,
    }


def _steps(
    one: Configuration, shop: Workshop, prompts: Sequence[Prompt], options: Options
) -> list[float]:
    """[prompts], of all samples."""
    paths = [list(node) for node in sorted(one.shape or (), key=lambda n: (len(n), n))]
    chain = f"tree=chain tree.budget={one.budget}"
    shape = chain if one.policy == "chain" else f"tree=paths {word('tree.paths', paths)}"
    method = shop.method(f"{shape} tree.children={one.children} acceptance={one.rule}")
    longest = max(len(prompt.tokens) for prompt in prompts) + options.tokens
    session: OurSession = shop.session(method, rows=8, longest=longest)
    total = np.zeros(len(prompts))
    for sample in range(options.samples):
        batch = [p._replace(id=i + SEEDS_APART * (1 + sample)) for i, p in enumerate(prompts)]
        total += session.decode(batch, options.tokens).passes
    found: list[float] = total.tolist()
    return found


def show(found: Sequence[dict[str, Any]], result: dict[str, Any], console: Console) -> None:
    replay = result["replay"]
    console.print(
        f"{replay['configurations']} configurations over {replay['tokens']} tokens replayed in "
        f"{replay['seconds']:.1f} s"
    )
    for one in found:
        name = f"{one['tree']} {one['budget']} {one['children']} {one['acceptance']}"
        run, told = one["run"], one["replay"]
        console.print(
            f"{name}: run {run[0]:.3f} ({run[1]:.3f} to {run[2]:.3f}), replay {told[0]:.3f} "
            f"({told[1]:.3f} to {told[2]:.3f}), p {one['p']:.3f}, Holm {one['holm']:.3f}"
        )


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
