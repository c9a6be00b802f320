"""What is each drafter worth: accepted length at equal budgets, and tokens per second?

    python -m specdec.experiments.studies.drafters --grid budgets --out experiments/results/drafter_lengths.json
    python -m specdec.experiments.studies.drafters --grid speed --target standin:llama3_8b \\
        --draft standin:llama_160m --exit-layer 10 --out experiments/results/drafter_speed.json

Prompts are the first ones of each set (of each category of Spec-Bench); the stop token is
ignored, so that all outputs have the same length. `budgets` gives every drafter trees of at most
the same number of nodes. `speed` gives each the trees that suit it; its methods take turns prompt
by prompt, and the figure is that of decoding: the time of all steps, prefill left out, by device
events on a GPU. `early_exit anew` is an ablation: the same trees, verified from the first layer.
Online state is that of the drafter's YAML: prompts come in the order of the file, and drafters
that never forget learn from those before. At temperature 0 outputs are compared with those of
plain decoding, and divergences explained as in `agreement.py`. The file is written anew after
every prompt.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.drafters.compose import Compose
from specdec.drafters.datastore import METADATA
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.lookahead import Lookahead
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.retriever import Retriever
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.translated import Translated
from specdec.experiments.studies.agreement import agreement
from specdec.experiments.studies.files import write
from specdec.experiments.studies.methods import make_tree
from specdec.experiments.studies.sessions import DTYPES, Asked, Ours, with_tree
from specdec.lab.environment import describe_environment
from specdec.lab.metrics import by_source
from specdec.lab.prompts import encode, load_prompts
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy
from specdec.tree import TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly

ROOT = Path(__file__).parents[2]
SETS = ("humaneval", "gsm8k", "mt_bench", "spec_bench")
MODELS = ("small_llama", "early_exit", "translated")  # their children may be sampled
SEARCHING = ("ngram", "pld", "rest", "retriever", "suffix_decoding")
LONGEST_CHAIN = 16
Shape = tuple[str, tuple[int, ...]]

# The trees of a budget, for all drafters; and for models above temperature 0.
DYNAMIC: dict[int, Shape] = {
    8: ("dynamic", (8, 3, 4)),
    16: ("dynamic", (16, 4, 6)),
    32: ("dynamic", (32, 6, 7)),
    64: ("dynamic", (64, 8, 8)),
}
SAMPLED: dict[int, tuple[Shape, ...]] = {
    8: (("static", (2, 1, 1)), ("static", (4, 1))),
    16: (("static", (3, 2, 1)), ("static", (4, 2))),
    32: (("static", (4, 2, 2)), ("static", (3, 2, 1, 1, 1))),
    64: (("static", (4, 2, 2, 1)), ("static", (6, 3, 2))),
}
# What suits each at batch 1 on a GPU, at temperature 0 and above.
FAST: dict[str, tuple[tuple[Shape, ...], tuple[Shape, ...]]] = {
    "small_llama": (
        (("dynamic", (63, 8, 8)), ("dynamic", (32, 8, 6))),
        (("static", (4, 2, 2, 1)), ("static", (3, 2, 1))),
    ),
    "early_exit": (
        (("dynamic", (24, 6, 3)), ("dynamic", (48, 8, 4))),
        (("static", (6, 3)), ("static", (4, 2, 1))),
    ),
    "early_exit anew": ((("dynamic", (24, 6, 3)), ("dynamic", (48, 8, 4))), ()),
    "translated": ((("dynamic", (63, 8, 8)),), (("static", (4, 2, 2, 1)),)),
    "token_recycling": (
        (("dynamic", (48, 6, 5)), ("dynamic", (63, 8, 6))),
        (("dynamic", (24, 6, 3)),),
    ),
    "lookahead": ((("dynamic", (63, 8, 4)),), (("dynamic", (16, 4, 3)),)),
    "ngram": ((("chain", (16,)),), (("chain", (4,)),)),
    "pld": ((("chain", (16,)),), (("chain", (4,)),)),
    "retriever": ((("chain", (16,)), ("dynamic", (32, 4, 12))), (("chain", (4,)),)),
    "rest": ((("dynamic", (32, 4, 6)),), (("dynamic", (16, 4, 3)),)),
    "suffix_decoding": ((("chain", (16,)), ("dynamic", (32, 4, 12))), (("chain", (4,)),)),
    "compose cascade": ((("dynamic", (63, 8, 8)), ("dynamic", (63, 8, 16))), ()),
    "compose bandit": ((("dynamic", (63, 8, 8)), ("dynamic", (63, 8, 16))), ()),
    "compose union": ((("dynamic", (63, 8, 8)),), ()),
}
TIMED = ("early_exit anew", "compose bandit")  # say something about time alone
MODEL_DEPTH = 8  # of the model in a composition


class Method(NamedTuple):
    """A drafter with a tree."""

    drafter: str
    tree: Shape
    children: str

    @property
    def name(self) -> str:
        kind, sizes = self.tree
        sampled = ", sample" if self.children != "top_k" else ""
        return f"{self.drafter}: {kind} {','.join(map(str, sizes))}{sampled}"


def methods(grid: str, temperature: float, drafters: list[str]) -> Iterator[tuple[int, Method]]:
    """(the budget, or 0; a method) of a grid."""
    for drafter in drafters:
        sampled = "sample" if temperature and drafter in MODELS else "top_k"
        if grid == "speed":
            for tree in FAST[drafter][bool(temperature)]:
                yield 0, Method(drafter, tree, sampled)
            continue
        for budget, dynamic in DYNAMIC.items() if drafter not in TIMED else ():
            for tree in SAMPLED[budget] if sampled == "sample" else (dynamic,):
                yield budget, Method(drafter, tree, sampled)
            if drafter in SEARCHING and budget <= LONGEST_CHAIN:
                yield budget, Method(drafter, ("chain", (budget,)), sampled)


class Anew(EarlyExit):
    """What resuming is worth: the same trees, verified from the first layer on."""

    def end(self, context: StepContext, tree: TokenTree, expanded: torch.Tensor) -> TokenTree:
        return replace(super().end(context, tree, expanded), begun=None)


class Makers:
    """Makes drafters; models are loaded once, when they are first needed."""

    def __init__(self, target: PagedLM, options: argparse.Namespace) -> None:
        self.target, self.options = target, options
        self._loaded: dict[str, SmallLlama] = {}

    def __call__(self, name: str, tree: TreePolicy) -> Drafter:
        given: dict[str, Any] = {"target": self.target, "tree": tree}
        if name == "none":
            return NoDrafter()
        if name == "small_llama":
            return self._model(SmallLlama, self.options.draft, tree)
        if name == "translated":
            return self._model(Translated, self.options.other_draft, tree)
        if name.startswith("early_exit"):
            kind = EarlyExit if name == "early_exit" else Anew
            return kind(**given, exit_layer=self.options.exit_layer)
        if name.startswith("compose"):
            small = self._model(SmallLlama, self.options.draft, tree)
            small.levels = min(small.levels, MODEL_DEPTH)
            parts: dict[str, Drafter] = {
                "retriever": Retriever(**given, **yaml_settings("retriever")),
                "small_llama": small,
            }
            return Compose(**given, parts=parts, mode=name.removeprefix("compose "))
        kinds: dict[str, Callable[..., Drafter]] = {
            "ngram": NGram,
            "token_recycling": TokenRecycling,
            "lookahead": Lookahead,
        }
        settings = yaml_settings(name)
        if name == "rest":
            settings["datastore"] = self.options.datastore
        return kinds.get(name, Retriever)(**given, **settings)

    def _model(self, kind: type[SmallLlama], path: str, tree: TreePolicy) -> SmallLlama:
        name = kind.__name__
        if name not in self._loaded:
            self._loaded[name] = kind(target=self.target, tree=tree, path=path)
        return with_tree(self._loaded[name], tree)


def yaml_settings(name: str) -> dict[str, Any]:
    """What a drafter's file says, that of its default included."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / f"configs/drafter/{name}.yaml").read_text())
    base = settings.pop("defaults", [])[:1]
    settings = {**(yaml_settings(base[0]) if base else {}), **settings}
    settings.pop("_target_", None)
    return settings


def read_prompts(target: PagedLM, options: argparse.Namespace) -> dict[str, list[Asked]]:
    """By set, or category of Spec-Bench; those of MT-Bench are a set already."""
    found: dict[str, list[Asked]] = defaultdict(list)
    number = 0
    for name in SETS:
        path = getattr(options, name)
        if path is None:
            continue
        known = {asked.name.partition("/")[0] for asked in found.get("mt_bench", [])}
        for prompt in load_prompts(path=path, field=None, limit=None):
            group = name if name in ("humaneval", "gsm8k") else prompt.category or name
            most = options.prompts
            if name == "mt_bench":
                most = max(1, options.prompts // 8)  # of each of its eight categories
            if group in known or sum(a.name.startswith(f"{group}/") for a in found[name]) >= most:
                continue
            tokens = encode(target.tokenizer, prompt, chat="auto")
            found[name].append(Asked(number, f"{group}/{prompt.id}", tokens))
            number += 1
    return dict(found)


def rule_of(method: Method, temperature: float) -> AcceptanceRule:
    if not temperature:
        return Greedy()
    return TargetOnly() if method.children == "top_k" else RecursiveRejection()


def measure(session: Ours, batch: list[Asked], new: int, into: dict[str, Any]) -> list[list[int]]:
    """Decode a batch; what each prompt took goes to `into`."""
    done = session.decode(batch, new)
    spent = sum(s for step in done.steps for verb, s in step.seconds.items() if verb != "prefill")
    for verb, seconds in done.verbs.items():
        into["verbs"][verb] = into["verbs"].get(verb, 0.0) + seconds
    passes: dict[int, int] = defaultdict(int)
    for step in done.steps:
        for request in step.requests:
            passes[request] += 1
    for asked, output in zip(batch, done.outputs, strict=True):
        into["prompts"][asked.name] = {
            "tokens": len(output),
            "steps": passes[asked.id],
            "seconds": spent / len(batch),
        }
    for name, total in by_source(step.record() for step in done.steps).items():
        before = into["sources"].get(name, (0, 0))
        into["sources"][name] = [before[0] + total["drafted"], before[1] + total["accepted"]]
    return done.outputs


def run(options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    torch.manual_seed(0)
    target = load_model(
        options.target,
        Placement(device=torch.device(options.device), dtype=DTYPES[options.dtype]),
        setting="--target",
    )
    sets = read_prompts(target, options)
    asked = [one for of in sets.values() for one in of]
    result["sets"] = {name: [one.name for one in of] for name, of in sets.items()}
    longest = max(len(one.tokens) for one in asked) + options.tokens
    batches = [
        of[i : i + options.batch] for of in sets.values() for i in range(0, len(of), options.batch)
    ]
    make = Makers(target, options)
    for temperature in options.temperatures:
        plain = Method("none", ("chain", (1,)), "top_k")
        wanted = [(0, plain), *methods(options.grid, temperature, options.drafters)]
        part = result["parts"].setdefault(f"T={temperature:g}", {})
        reference: dict[str, list[int]] = {}
        # At equal budgets one method after the other, else all in turns.
        groups = [wanted] if options.grid == "speed" else [[one] for one in wanted]
        for group in track(groups, description=f"T={temperature:g}"):
            sessions: dict[str, Ours] = {}
            for budget, method in group:
                tree = make_tree(*method.tree, method.children)
                drafter = make(method.drafter, tree)
                sessions[method.name] = session = Ours(
                    target,
                    drafter,
                    rule_of(method, temperature),
                    temperature=temperature,
                    batch=options.batch,
                    longest=longest,
                )
                if options.grid == "speed":
                    session.warm_up(max((one.tokens for one in asked), key=len))
                part[method.name] = {
                    "drafter": method.drafter,
                    "budget": budget,
                    "state": drafter.reset,
                    "prompts": {},
                    "sources": {},
                    "verbs": {},
                    "agreement": {"checked": 0, "identical": 0, "divergences": []},
                }
            for number, batch in enumerate(batches):
                names = list(sessions)
                turn = number % len(names)
                outputs = {
                    name: measure(sessions[name], batch, options.tokens, part[name])
                    for name in names[turn:] + names[:turn]
                }
                for one, output in zip(batch, outputs.get(plain.name, []), strict=False):
                    reference[one.name] = output
                for name, mine in outputs.items():
                    if temperature == 0 and name != plain.name:
                        theirs = [reference[one.name] for one in batch]
                        for key, value in agreement(batch, mine, theirs, target).items():
                            part[name]["agreement"][key] += value
                for name, session in sessions.items():
                    part[name]["obstacle"] = session.decoder.graphs.obstacle
                save()  # whatever happens later, this much is known


def summary(entry: dict[str, Any], plain: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Accepted length, tokens per second and speedup of an entry over some prompts."""
    mine, theirs = ([of["prompts"][name] for name in names] for of in (entry, plain))
    tokens, steps, seconds = (
        sum(one[key] for one in mine) for key in ("tokens", "steps", "seconds")
    )
    return {
        "accepted_length": tokens / steps,
        "tokens_per_second": tokens / seconds,
        "speedup": sum(one["seconds"] for one in theirs) / seconds,
    }


def groups_of(result: dict[str, Any]) -> dict[str, list[str]]:
    """Prompts by set, Spec-Bench's by category."""
    groups: dict[str, list[str]] = {}
    for name, prompts in result["sets"].items():
        for prompt in prompts:
            group = prompt.partition("/")[0] if name == "spec_bench" else name
            groups.setdefault(group, []).append(prompt)
    return groups


def best(part: dict[str, Any], key: str, **wanted: Any) -> tuple[str, dict[str, Any]] | None:
    """The entry with the largest figure over all prompts among those with these properties."""
    plain = next(entry for entry in part.values() if entry["drafter"] == "none")
    able = [
        (name, entry)
        for name, entry in part.items()
        if all(entry[field] == value for field, value in wanted.items())
    ]
    every = list(plain["prompts"])
    return max(able, key=lambda one: summary(one[1], plain, every)[key], default=None)


def show(result: dict[str, Any], grid: str) -> Table:
    table = Table(title=f"{result['settings']['target']}, {grid}")
    groups = groups_of(result)
    for column in ("T", "method", "tok/s", "speedup", "length", *groups, "same"):
        table.add_column(column)
    for temperature, part in result["parts"].items():
        plain = next(entry for entry in part.values() if entry["drafter"] == "none")
        figure = "speedup" if grid == "speed" else "accepted_length"
        for name, entry in part.items():
            if set(entry["prompts"]) != set(plain["prompts"]):
                continue
            total = summary(entry, plain, list(plain["prompts"]))
            own = [f"{summary(entry, plain, of)[figure]:.2f}" for of in groups.values()]
            checked = entry["agreement"]
            table.add_row(
                temperature,
                name,
                *(f"{value:.4g}" for value in (total["tokens_per_second"], total["speedup"])),
                f"{total['accepted_length']:.2f}",
                *own,
                f"{checked['identical']}/{checked['checked']}",
            )
    return table


def contents(datastore: Path) -> dict[str, Any]:
    """What a datastore was made of."""
    known = json.loads((datastore / METADATA).read_text())
    sources = ["/".join(Path(source).parts[-2:]) for source in known["sources"]]
    return {"tokens": known["tokens"], "documents": known["documents"], "sources": sources}


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", choices=("budgets", "speed"), required=True)
    for name in SETS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="JSONL")
    parser.add_argument("--target", default="zoo:target")
    parser.add_argument("--draft", default="zoo:draft")
    parser.add_argument("--other-draft", metavar="FOLDER", help="a draft of another tokenizer")
    parser.add_argument("--datastore", metavar="FOLDER", help="for rest")
    parser.add_argument("--exit-layer", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="new ones, for each prompt")
    parser.add_argument("--prompts", type=int, default=8, help="of each set or category")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0, 1.0))
    parser.add_argument("--drafters", nargs="+", choices=list(FAST), default=list(FAST))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not any(getattr(options, name) for name in SETS):
        parser.error("no prompts: give at least one of --humaneval, --gsm8k, --mt-bench, ...")
    for drafter, needed in {"rest": "datastore", "translated": "other_draft"}.items():
        if drafter in options.drafters and getattr(options, needed) is None:
            parser.error(f"--drafters {drafter}: needs --{needed.replace('_', '-')}")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = settings_of(arguments)
    names = sys.argv[1:] if arguments is None else arguments
    same = ("grid", "target", "draft", "exit_layer", "dtype", "tokens", "prompts", "batch")
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "specdec.experiments.studies.drafters", *names]),
        "settings": {name: getattr(options, name) for name in same},
        "parts": {},
        **describe_environment(torch.device(options.device)),
    }
    if options.datastore is not None:
        result["datastore"] = contents(Path(options.datastore))
    run(options, result, lambda: write(options.out, result))
    Console(width=160).print(show(result, options.grid))
    return 0


if __name__ == "__main__":
    sys.exit(main())
