"""Write the pages of measured tables, and the README's few lines of them, from the JSON files.

python -m specdec.experiments.figures.pages
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import specdec
from specdec.experiments.figures import kernels
from specdec.experiments.figures.comparison import comparison, verdict
from specdec.experiments.figures.decoding import calibrate, cpu_speed
from specdec.experiments.figures.drafters import (
    drafter_lengths,
    drafter_speed,
    drafter_texts,
    drafter_wide,
    levels,
    lookup_speed,
)
from specdec.experiments.figures.end_to_end_plot import best, end_to_end, gain
from specdec.experiments.figures.faults import faults
from specdec.experiments.figures.learned import further, learned, learned_summary
from specdec.experiments.figures.markdown import Result, device, interval, number, table
from specdec.experiments.figures.quantised import quantised
from specdec.experiments.figures.replay import runs_table
from specdec.experiments.figures.scale import ranks
from specdec.experiments.figures.trees_and_rules_plot import tree_lengths, tree_speed
from specdec.lab.command import run_main

ROOT = Path(specdec.__file__).parents[1]  # of a checkout, which has the results
RESULTS = ROOT / "experiments" / "results"
FP8_PASSES = "bf16", "fp8", "70b"
FP8_SPEEDS = "weights_speed_none", "weights_speed_fp8"
WIDE = "drafter_wide", "drafter_wide_sampled"
WIDE_H200 = [f"drafter_wide_h200{of}" for of in ("", "_sampled", "_exit", "_blocks_sampled")]
WIDE_BATCHES = [
    f"drafter_wide_batch{n}{heads}{sampled}"
    for n in (8, 32)
    for sampled in ("", "_sampled")
    for heads in ("", "_blocks")
] + ["drafter_wide_batch8_exit", "drafter_wide_batch32_exit"]
EXACT_PAGES = "exact_pages_fp8", "exact_pages_int8"
GENERATED = "Generated from the JSON files by `python -m specdec.experiments.figures.pages`."


Table = tuple[str, Callable[[Result], str], dict[str, str]]
"""JSON file, what describes it, and the plots below it, by what they show."""

PAGES: dict[str, tuple[str, str, list[Table]]] = {  # title, what it is, tables
    "cpu": (
        "Speed on a CPU",
        "What speculation gains with the built-in pair of models, beside transformers.",
        [("cpu_speed", cpu_speed, {})],
    ),
    "end_to_end": (
        "Speed on a GPU",
        "Whole decoding beside plain decoding and transformers, where a step goes, and what a "
        "pass over a tree costs.",
        [
            (
                "end_to_end",
                lambda _: variants("end_to_end", end_to_end),
                {"Tokens per second by method and batch": "end_to_end"},
            ),
            ("step_anatomy", kernels.anatomy, {"Where a step goes": "step_anatomy"}),
            ("calibrate", calibrate, {}),
        ],
    ),
    "drafters": (
        "Drafters compared",
        "Accepted lengths and speed of every drafter, and what a look-up of `retriever` takes. "
        "`early_exit anew` verifies the trees of `early_exit` from the first layer: what going on "
        "is worth. `rest` needs a datastore that resembles what is asked for; this one is small "
        "and holds library code. In tables of wide trees `dspark` has seen 172 M tokens, and "
        "its rates of learning had not yet fallen; `dspark fp8` is that of the package, 437 M, "
        "`mtp fp8` has seen 322 M, and `dflash` and `peagle` 40 M; `eagle3 before` is the head "
        "that the package had before, and no `eagle3` there has a window.",
        [
            ("drafter_lengths", drafter_lengths, {}),
            ("drafter_speed", drafter_speed, {}),
            ("learned_speed", lambda _: variants("learned_speed", drafter_speed), {}),
            ("drafter_wide", lambda _: several(drafter_wide, *WIDE), {}),
            ("drafter_wide_h200", lambda _: several(drafter_wide, *WIDE_H200), {}),
            ("drafter_wide_blocks", lambda _: several(drafter_wide, "drafter_wide_blocks"), {}),
            ("drafter_wide_batch8", lambda _: several(drafter_wide, *WIDE_BATCHES), {}),
            ("levels", levels, {}),
            ("learned", learned, {}),
            *(
                (file, partial(learned, file=file), {})
                for file in (
                    "learned_package",
                    "learned_trees",
                    "learned_seeds",
                    "learned_windows",
                    "learned_windows_eagle3",
                )
            ),
            ("learned_further", further, {}),
            ("lookup_speed", lookup_speed, {}),
        ],
    ),
    "trees_and_rules": (
        "Trees and rules compared",
        "What tree policies and acceptance rules are worth over a tuned chain with token-wise "
        "sampling, how often children are accepted, which `optimal`, `accuracy` and `cost_aware` "
        "choose by ([JSON](../../specdec/data/acceptance/zoo.json)), and what the rules cost.",
        [
            (
                "tree_lengths",
                tree_lengths,
                {
                    "What tree policies are worth over a tuned chain": "trees",
                    "What acceptance rules are worth over token-wise sampling": "rules",
                },
            ),
            ("tree_speed", tree_speed, {}),
            ("tree_speed_batch8", tree_speed, {"Acceptance by rank": "acceptance_rates"}),
            ("rule_steps", kernels.rules, {}),
        ],
    ),
    "replay": (
        "Replay beside runs",
        "What `specdec replay` says of texts that were recorded once, beside runs of the same "
        "methods; [all that was replayed](replay.html).",
        [("replay", runs_table, {})],
    ),
    "by_category": (
        "Which drafter wins where",
        "Six drafters on the built-in pair of models: two budgets, two temperatures, the first "
        "turns of six conversations of each of Spec-Bench's categories, by `python -m specdec.run "
        "-m experiment=by_category prompts.path=question.jsonl` and `specdec compare`.",
        [("by_category", comparison, {})],
    ),
    "audit": (
        "What bets find, and how soon",
        "The check of runs above temperature 0 ([bets](../outputs.md#bets)), of acceptance rules "
        "with faults.",
        [("faults", faults, {})],
    ),
    "quantised": (
        "Quantised targets and caches",
        "Whether acceptance moves when weights or pages are quantised, beside how far "
        "probabilities move; and what weights in fp8 are worth.",
        [
            ("quantised", quantised, {}),
            *((f"pass_{of}", partial(calibrate, name=f"pass_{of}"), {}) for of in FP8_PASSES),
            ("weights_speed_fp8", lambda _: several(drafter_speed, *FP8_SPEEDS), {}),
            ("products_fp8", partial(kernels.products, name="products_fp8"), {}),
        ],
    ),
    "scale": (
        "Past one GPU and past 8k tokens",
        "What GPUs gain that share a target, and what long contexts cost: passes by part, drafts "
        "of `own_cache` accepted at a stated rate, and a prompt that is read beside other rows.",
        [
            *((file, partial(ranks, file=file), {}) for file in ("ranks", "ranks_fp8")),
            ("long_32k", partial(kernels.long, file="long_32k"), {}),
            ("long_128k", partial(kernels.long, file="long_128k"), {}),
        ],
    ),
    "kernels": (
        "Kernels",
        "Tree attention beside its peers and the roof, and the other operations of a step.",
        [
            (
                "kernel_attention",
                kernels.attention,
                {"Fraction of the roof by shape": "kernel_attention"},
            ),
            ("kernel_grid", kernels.grid, {"By batch, context, tree and heads": "kernel_grid"}),
            ("kernel_steps", kernels.steps, {}),
            ("kernel_elementwise", kernels.elementwise, {}),
            ("exact", lambda _: several(kernels.exact, "exact", "exact_bits"), {}),
            ("products", kernels.products, {}),
            ("taps", kernels.taps, {}),
            ("exact_texts", lambda _: variants("exact_texts", drafter_texts), {}),
            *((file, partial(drafter_texts, files=(file,)), {}) for file in EXACT_PAGES),
        ],
    ),
}


def variants(name: str, show: Callable[..., str]) -> str:
    """A table of every file whose name begins so, by batch if each is of one."""
    files = sorted(path.stem for path in RESULTS.glob(f"{name}*.json"))
    files.sort(key=lambda file: int(read(file)["settings"].get("batch", 0)))
    return several(show, *files)


def several(show: Callable[..., str], *files: str) -> str:
    """A table of several files."""
    return show(*map(read, files), files=files)


@cache
def read(file: str) -> Result:
    result: Result = json.loads((RESULTS / f"{file}.json").read_text())
    return result


def written(title: str, about: str, tables: list[Table]) -> str:
    """A whole page."""
    pieces = [f"# {title}", about, GENERATED]
    for file, describe, plots in tables:
        pieces.append(describe(read(file)))
        for shown, plot in plots.items():
            pieces.append(f"![{shown}](../../experiments/results/{plot}.png)")
    return "\n\n".join(pieces) + "\n"


def summary() -> str:
    """The README's table: none and the best of two drafters on a CPU, and the best trees of a
    draft model on a GPU by batch, without sampling."""
    rows = [*_on_a_cpu(read("cpu_speed")), *_on_a_gpu(read("end_to_end"))]
    heads = ["model and machine, batch", "method", "tokens/s", "accepted length", "over `none`"]
    return "\n".join(table(heads, rows))


def _on_a_cpu(result: Result) -> Iterator[list[str]]:
    for beginning in ("none", "small_llama", "ngram"):
        able = [one for one in result["methods"].items() if one[0].startswith(beginning)]
        name, method = max(able, key=lambda one: one[1]["tokens_per_second"])
        yield [
            f"`zoo:target` on {result['hardware']['threads']} threads of an {device(result)}, 1",
            f"`{beginning}`{name.removeprefix(beginning)}",
            number(method["tokens_per_second"], 0),
            number(method["accepted_length"]),
            "" if name == "none" else interval(*method["speedup_over_none"]),
        ]


def _on_a_gpu(result: Result) -> Iterator[list[str]]:
    parts = [part for part in result["parts"].values() if part["temperature"] == 0]
    for batch in sorted({part["batch"] for part in parts}):
        able = [
            (method["figures"]["all"], f"{part['part']}:{name.removeprefix('small_llama')}")
            for part in parts
            if part["batch"] == batch
            for name, method in [best(part, "small_llama") or ("", {})]
            if name
        ]
        found, tree = max(able, key=lambda one: one[0]["tokens_per_second"])
        yield [
            f"`{result['settings']['target']}` on an {device(result)}, {batch}",
            f"`small_llama`, {tree}",
            number(found["tokens_per_second"], 0),
            number(found["accepted_length"]),
            gain(found),
        ]


def documents() -> dict[Path, str]:
    """Every generated page, and the README with its blocks, by path."""
    found = {
        ROOT / "docs" / "results" / f"{name}.md": written(*page) for name, page in PAGES.items()
    }
    readme = ROOT / "README.md"
    text = readme.read_text()
    blocks = {
        "results": summary(),
        "verdict": verdict(read("by_category")),
        "learned": learned_summary(read("learned")),
    }
    for name, lines in blocks.items():
        pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        text = re.sub(pattern, rf"\g<1>\n{lines}\n\g<2>", text, flags=re.DOTALL)
    return found | {readme: text}


@dataclass(frozen=True)
class Options:
    pass


def work(options: Options) -> None:
    if not RESULTS.is_dir():
        raise ValueError(f"{RESULTS}: no such folder; run it in a checkout of the repository")
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
