"""Where does a step go?

    python -m specdec.experiments.bench.step_anatomy --cases none chain:4 dynamic:12,3,4 --batches 1 8

A case is `none`, or the tree of a drafting model: chain:BUDGET, dynamic:BUDGET,WIDTH,DEPTH or
static:WIDTHS. For each, batch and temperature, means over steady steps, after a warm-up:

- milliseconds of each verb, by device events, and their sum over a whole run against the clock,
  which must agree within 3 %;
- on a GPU, from torch.profiler, of kernels by group (`timeline.py`), and the share of the time in
  which the device had nothing to do. Profiling slows the host, so that there are two such shares:
  of the profiled steps, and of the busy time against steps that were not profiled.

The file is written anew after every case; `--resume` leaves out what it holds, faults excepted. A
plot is drawn beside it.
"""

import argparse
import gc
import json
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from specdec.decode import Step
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.experiments.bench.gpu_clock import LostDevice, describe, recover
from specdec.experiments.bench.timeline import GROUPS, OTHER, anatomy, read_profile
from specdec.experiments.figures.kernel_plot import number
from specdec.experiments.studies.files import resume, write
from specdec.experiments.studies.methods import make_tree
from specdec.experiments.studies.sessions import DTYPES, Asked, Ours, read_prompts, wait, with_tree
from specdec.lab.environment import describe_environment
from specdec.lab.metrics import VERBS
from specdec.models.paged import PagedLM
from specdec.protocols import AcceptanceRule, Drafter, Request, TreePolicy
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection

RESULTS = Path(__file__).parents[1] / "results"
CASES = ("none", "chain:4", "dynamic:12,3,4")
SKIPPED = 4  # steps before the steady ones
TOLERANCE = 0.03
COLOURS = {
    "weights": "#0072b2",
    "attention": "#d55e00",
    "layers": "#56b4e9",
    "rules, top tokens": "#009e73",
    "trees": "#e69f00",
    "cache": "#cc79a7",
    "copies": "#999999",
    OTHER: "#f0e442",
    "idle": "#dddddd",
    "prefill": "#117733",
    "draft": "#e69f00",
    "verify": "#0072b2",
    "accept": "#009e73",
    "commit": "#cc79a7",
    "other": "#999999",
}


def parse_case(text: str, temperature: float) -> TreePolicy | None:
    """The tree of a case, None for plain decoding.

    Raises:
        ValueError: not a case.
    """
    if text == "none":
        return None
    kind, _, sizes = text.partition(":")
    numbers = tuple(int(size) for size in sizes.split(",") if size.isdigit())
    wanted = {"chain": 1, "dynamic": 3, "static": max(1, len(numbers))}
    if len(numbers) != wanted.get(kind) or len(numbers) != len(sizes.split(",")):
        raise ValueError(
            f"--cases {text}: none, chain:BUDGET, dynamic:BUDGET,WIDTH,DEPTH or static:WIDTHS"
        )
    return make_tree(kind, numbers, "sample" if temperature else "top_k")


def steady(steps: Sequence[Step], batch: int) -> list[Step]:
    """Those with a whole batch, without the first ones."""
    return [s for s in steps[SKIPPED:] if len(s.requests) == batch and "prefill" not in s.seconds]


def by_verbs(session: Ours, batch: Sequence[Asked], tokens: int) -> dict[str, Any]:
    """Milliseconds of each verb, and the sum of all steps against the clock."""
    session.decode(batch, tokens)
    done = session.decode(batch, tokens)
    inside = steady(done.steps, len(batch))
    if not inside:
        raise ValueError(f"--tokens {tokens}: too few for a steady step")
    total = sum(sum(step.seconds.values()) for step in done.steps)
    verbs = {verb: sum(step.seconds.get(verb, 0.0) for step in inside) for verb in VERBS}
    ratio = total / done.seconds
    return {
        "steps": len(inside),
        "wall_ms": sum(verbs.values()) / len(inside) * 1e3,
        "verbs_ms": {
            verb: seconds / len(inside) * 1e3 for verb, seconds in verbs.items() if seconds
        },
        "accepted_length": sum(map(len, done.outputs)) / done.passes,
        "sum_over_clock": ratio,
        "adds_up": abs(ratio - 1) <= TOLERANCE,
    }


def by_kernels(session: Ours, batch: Sequence[Asked], tokens: int, steps: int) -> dict[str, Any]:
    """`anatomy` of some steady steps. At the report of a step the same number of later ones is
    queued, in steady state; so between the waits at two reports lies the work of as many steps as
    were reported."""
    requests = [Request(id=a.id, prompt_ids=a.tokens, max_new_tokens=tokens) for a in batch]
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    seen: list[Step] = []

    def on_step(step: Step) -> None:
        seen.append(step)
        if len(seen) == SKIPPED:
            wait(session.device)
            profile.start()
        elif len(seen) == SKIPPED + steps:
            wait(session.device)
            profile.stop()

    for _ in session.decoder.run(requests, on_step=on_step):
        pass
    wait(session.device)
    if len(seen) < SKIPPED + steps:
        if len(seen) >= SKIPPED:
            profile.stop()
        raise ValueError(f"{len(seen)} steps: raise --tokens or lower --profiled")
    return anatomy(read_profile(profile), steps)


def measure(
    target: PagedLM, drafter: Drafter, sampled: bool, batch: Sequence[Asked], options: Any
) -> dict[str, Any]:
    """One case at a temperature and a batch."""
    rule: AcceptanceRule = RecursiveRejection() if sampled else Greedy()
    session = Ours(
        target,
        drafter,
        rule,
        temperature=float(sampled),
        batch=len(batch),
        longest=max(len(asked.tokens) for asked in batch) + options.tokens,
    )
    session.warm_up(batch[0].tokens)
    found = by_verbs(session, batch, options.tokens) | session.notes()
    if target.device.type == "cuda":
        try:
            found["kernels"] = by_kernels(session, batch, options.tokens, options.profiled)
            found["host_gap"] = max(0.0, 1 - found["kernels"]["busy_ms"] / found["wall_ms"])
        except (RuntimeError, ValueError) as fault:  # the verbs are worth keeping
            traceback.print_exc()
            found["profile_fault"] = describe(fault)
            recover()
    return found


def table(result: Mapping[str, Any]) -> Group:
    """Two lines of milliseconds for each case: of verbs, and of kernels by group."""
    one = Table("case", "step ms", *VERBS[1:], "accepted", "sum / clock")
    one.title = "verbs, ms of a step"
    two = Table("case", "wall ms", "busy", "sum", *GROUPS, OTHER, "idle", "gap")
    two.title = "kernels, ms of a step (own time; idle of profiled steps, gap of others)"
    faults = []
    for name, case in result["cases"].items():
        if "fault" in case:
            faults.append(f"{name}: {case['fault']}")
            continue
        one.add_row(
            name,
            number(case["wall_ms"], 3),
            *(number(case["verbs_ms"].get(verb), 3) for verb in VERBS[1:]),
            number(case["accepted_length"], 2),
            f"{case['sum_over_clock']:.3f}{'' if case['adds_up'] else ' (off)'}",
        )
        if "profile_fault" in case:
            faults.append(f"{name}: not profiled: {case['profile_fault']}")
        if "kernels" in case:
            kernels = case["kernels"]
            groups = [kernels["groups"].get(group, {}) for group in (*GROUPS, OTHER)]
            two.add_row(
                name,
                *(number(kernels[key], 3) for key in ("wall_ms", "busy_ms", "sum_ms")),
                *(number(group.get("own_ms"), 3) for group in groups),
                f"{kernels['idle']:.1%}",
                f"{case['host_gap']:.1%}",
            )
    return Group(one, *([two] if two.row_count else []), *map(Text, faults))


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each case, of what its step consists of: kernels, or verbs if there are none."""
    from matplotlib.figure import Figure

    cases = {name: case for name, case in result["cases"].items() if "wall_ms" in case}
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for place, case in enumerate(cases.values()):
        parts = case["verbs_ms"]
        if "kernels" in case:
            kernels = case["kernels"]
            parts = {name: group["own_ms"] for name, group in kernels["groups"].items()}
            parts["idle"] = max(0.0, case["wall_ms"] - kernels["busy_ms"])
        left = 0.0
        for name, ms in parts.items():
            axes.barh(place, ms, left=left, color=COLOURS[name], label=name)
            left += ms
        axes.annotate(
            f"{left:.2f}", (left, place), (3, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds of a step")
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False)
    device = result["hardware"].get("gpu", result["hardware"]["cpu"])
    axes.set_title(f"{result['settings']['target']} on {device}", fontsize="medium")
    figure.savefig(path, dpi=150)


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0,))
    parser.add_argument("--target", default="standin:llama3_8b")
    parser.add_argument("--draft", default="standin:llama_160m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prompts", metavar="JSONL", help="the built-in set by default")
    parser.add_argument("--tokens", type=int, default=256, help="new ones, for each prompt")
    parser.add_argument("--profiled", type=int, default=16, help="steps under torch.profiler")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_anatomy.json")
    parser.add_argument("--resume", action="store_true", help="what the file has stays")
    parser.add_argument("--draw", action="store_true", help="table and plot of the file alone")
    options = parser.parse_args(arguments)
    for temperature in options.temperatures:
        if temperature not in (0.0, 1.0):
            parser.error(f"--temperatures {temperature:g}: 0 or 1")
        for case in options.cases:
            try:
                parse_case(case, temperature)
            except ValueError as fault:
                parser.error(str(fault))
    if options.device == "cuda" and not options.draw and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU; --device cpu --target zoo:target --draft zoo:draft")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = settings_of(arguments)
    if options.draw:
        result = json.loads(options.out.read_text())
        return _show(result, options.out)
    torch.manual_seed(0)
    if options.device == "cuda":
        # The profiler has to see the first CUDA graph being made, and must not leave in between.
        os.environ["TEARDOWN_CUPTI"] = "0"
        os.environ["DISABLE_CUPTI_LAZY_REINIT"] = "1"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()
    names = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "specdec.experiments.bench.step_anatomy", *names])
    same = ("target", "draft", "dtype", "prompts", "tokens", "profiled")
    settings = {name: getattr(options, name) for name in same}
    found = resume(options.out, settings, command) if options.resume else None
    result = found or {"command": command, "settings": settings, "cases": {}}
    result |= describe_environment(torch.device(options.device))
    target = PagedLM.load(options.target, dtype=DTYPES[options.dtype], device=options.device)
    prompts = read_prompts(target.tokenizer, options.prompts, "prompt", max(options.batches))
    model: SmallLlama | None = None
    lost = False
    for batch in options.batches:
        for temperature in options.temperatures:
            for case in options.cases:
                name = f"{case}, batch {batch}" + (f", T={temperature:g}" if temperature else "")
                if lost or "wall_ms" in result["cases"].get(name, {}):
                    continue
                tree = parse_case(case, temperature)
                drafter: Drafter = NoDrafter()
                try:
                    if tree is not None:
                        if model is None:
                            model = SmallLlama(target=target, tree=tree, path=options.draft)
                        drafter = with_tree(model, tree)
                    sampled, asked = bool(temperature), prompts[:batch]
                    result["cases"][name] = measure(target, drafter, sampled, asked, options)
                except Exception as fault:
                    traceback.print_exc()
                    result["cases"][name] = {"fault": describe(fault)}
                    try:
                        recover()
                    except LostDevice:
                        lost = True
                write(options.out, result)
                del drafter
                gc.collect()
                if options.device == "cuda" and not lost:
                    torch.cuda.empty_cache()
    return _show(result, options.out) or int(lost)


def _show(result: Mapping[str, Any], out: Path) -> int:
    Console(width=150).print(table(result))
    if any("wall_ms" in case for case in result["cases"].values()):
        plot(result, out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
