"""What does speculation gain end to end, on a model of the shape of Llama-3-8B?

    python -m specdec.experiments.studies.end_to_end --humaneval humaneval.jsonl --mt-bench mt_bench.jsonl
    python -m specdec.experiments.studies.end_to_end ... --resume --temperatures 0 --batches 1 --parts llama_160m

The prompts are raw text without a chat template, the first ones of each file; the stop token is
ignored, so that all outputs have the same length. A *part* is what is compared in one go: the
trees of one drafter at a temperature and a batch, or what transformers offers, and always our own
`none`. Methods of a part take turns, job by job; a *job* is one prompt at batch 1, else the first
prompts of a file together.

The figure is that of decoding alone, the same for all: the time of a run of `--tokens` new tokens
minus that of a run of one, by the clock, after a wait for the device. A run of one token is the
prompt and one step, whose time is taken off with all the tokens it may yield but one: of S steps
that is 1 / S too fast, less one in `--tokens` (1.5 % at 128 tokens and 3 accepted; of plain
decoding nothing). `verbs`, the device seconds of each verb in all steps of the long runs, and
`step_tokens_per_second`, which follows from them, have no such bias.

The file is written anew after every round of a part. `--resume` goes on after the last round, also
with more `--repeats`, and measures a part again whose methods have changed.
"""

import argparse
import gc
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from specdec.costs import CostTable
from specdec.experiments.bench.clock import LostDevice, describe, recover
from specdec.experiments.figures import end_to_end_plot
from specdec.experiments.studies.agreement import agreement, noise
from specdec.experiments.studies.files import resume, write
from specdec.experiments.studies.methods import Build, Models, Setting, builders
from specdec.experiments.studies.sessions import (
    DTYPES,
    Asked,
    Decoded,
    Session,
    read_prompts,
)
from specdec.lab.environment import describe_environment
from specdec.models.paged import PagedLM

RESULTS = Path(__file__).parents[1] / "results"
DRAFTS = ("standin:llama_160m", "standin:llama3_1b")
SEEDS_APART = 1000  # of the repeats of a prompt


def jobs_of(sets: dict[str, list[Asked]], batch: int, prompts: int) -> dict[str, list[Asked]]:
    """What is decoded in one go, by name."""
    if batch == 1:
        return {asked.name: [asked] for asked_of in sets.values() for asked in asked_of[:prompts]}
    return {f"{name}/{batch}": asked[:batch] for name, asked in sets.items()}


def measure(
    part: dict[str, Any],
    build: dict[str, Build],
    jobs: dict[str, list[Asked]],
    *,
    target: PagedLM,
    repeats: int,
    save: Callable[[], None],
) -> None:
    """Fill a part: rounds of all methods, repeat by repeat and job by job.

    Raises:
        LostDevice: nothing more can be measured in this process.
    """
    rounds = [(repeat, name) for repeat in range(repeats) for name in jobs]
    if part["rounds"] >= len(rounds):
        return
    sessions: dict[str, Session] = {}
    longest = max((asked.tokens for job in jobs.values() for asked in job), key=len)
    for name, make in build.items():
        method = part["methods"].setdefault(name, {"runs": {}})
        if "fault" in method:
            continue
        begun = time.perf_counter()
        try:
            sessions[name] = make()
            sessions[name].warm_up(longest)
            method["warm_up_seconds"] = time.perf_counter() - begun
        except Exception as fault:
            _fault(method, fault)
            sessions.pop(name, None)
    for number, (repeat, job) in enumerate(rounds):
        if number < part["rounds"]:
            continue
        batch = [asked._replace(id=asked.id + SEEDS_APART * repeat) for asked in jobs[job]]
        names = list(sessions)
        turn = number % len(names) if names else 0
        decoded: dict[str, Decoded] = {}
        for name in names[turn:] + names[:turn]:  # nobody is always the first
            try:
                decoded[name] = _round(sessions[name], batch, part, name, job)
            except Exception as fault:
                _fault(part["methods"][name], fault)
                del sessions[name]
        if part["temperature"] == 0 and repeat == 0 and "none" in decoded:
            for name, one in decoded.items():
                if name != "none":
                    found = agreement(batch, one.outputs, decoded["none"].outputs, target)
                    _add(part["methods"][name], found)
        for name, session in sessions.items():
            part["methods"][name].update(session.notes())
        part["rounds"] = number + 1
        plain = part["methods"]["none"]
        for name in decoded:
            if name in sessions and "fault" not in plain:
                method = part["methods"][name]
                method["figures"] = end_to_end_plot.figures(method, plain, part)
        save()


def _round(
    session: Session, batch: list[Asked], part: dict[str, Any], name: str, job: str
) -> Decoded:
    """A short and a long run, whose seconds go to the part."""
    method, new = part["methods"][name], part["new_tokens"]
    session.decode(batch, 1)  # a prompt of a new length may compile something
    short = session.decode(batch, 1)
    long = session.decode(batch, new)
    if any(len(output) != new for output in long.outputs):
        raise ArithmeticError(f"outputs of {sorted({len(o) for o in long.outputs})} tokens")
    runs = method["runs"].setdefault(job, {"short": [], "long": [], "passes": []})
    runs["short"].append(short.seconds)
    runs["long"].append(long.seconds)
    runs["passes"].append(long.passes)
    verbs = method.setdefault("verbs", {})
    for verb, seconds in long.verbs.items():
        verbs[verb] = verbs.get(verb, 0.0) + seconds
    return long


def _fault(method: dict[str, Any], fault: Exception) -> None:
    traceback.print_exception(fault)
    method["fault"] = describe(fault)
    method.pop("figures", None)
    recover()


def _add(method: dict[str, Any], found: dict[str, Any]) -> None:
    total = method.setdefault("agreement", {"checked": 0, "identical": 0, "divergences": []})
    for key, value in found.items():
        total[key] += value


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def verify_cost(path: Path) -> dict[str, Any]:
    """What verifying 64 nodes costs in plain steps at a context of 1024, by `calibrate.py`."""
    costs = CostTable.load(path)
    return {
        "file": path.name,
        "context": 1024,
        "ratios": [
            {
                "batch": batch,
                "nodes": 64,
                "ms": costs.verify(batch, 64, 1024) * 1e3,
                "plain_ms": costs.verify(batch, 1, 1024) * 1e3,
                "ratio": costs.verify(batch, 64, 1024) / costs.verify(batch, 1, 1024),
            }
            for batch in costs.verify_batches
        ],
    }


def settings_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--humaneval", required=True, metavar="JSONL")
    parser.add_argument("--mt-bench", required=True, metavar="JSONL")
    parser.add_argument("--target", default="standin:llama3_8b")
    parser.add_argument("--draft", nargs="+", default=DRAFTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=128, help="new ones, for each prompt")
    parser.add_argument("--prompts", type=int, default=6, help="of each file, at batch 1")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0, 1.0))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--parts", nargs="+", help="drafts, ngram, transformers; all by default")
    parser.add_argument(
        "--only", nargs="+", default=[], help="methods whose name has one of these"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.json")
    parser.add_argument("--calibrated", type=Path, default=RESULTS / "calibrate.json")
    parser.add_argument("--resume", action="store_true", help="what the file has stays")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error("--tokens: must be at least 2")
    known = [path.rpartition(":")[2] for path in options.draft] + ["ngram", "transformers"]
    options.parts = options.parts or known
    for part in options.parts:
        if part not in known:
            parser.error(f"--parts {part}: there are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU; --device cpu --target zoo:target --draft zoo:draft")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = settings_of(arguments)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    names = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "specdec.experiments.studies.end_to_end", *names])
    same = ("target", "draft", "dtype", "tokens", "prompts")
    settings = {name: getattr(options, name) for name in same}
    settings["draft"] = list(settings["draft"])
    found = resume(options.out, settings, command) if options.resume else None
    result: dict[str, Any] = found or {"command": command, "settings": settings, "parts": {}}
    result |= describe_environment(torch.device(options.device))
    if options.calibrated.exists():
        try:
            result["verify_cost"] = verify_cost(options.calibrated)
        except ValueError as fault:  # perhaps unfinished; everything else can be measured
            print(fault)

    def save() -> None:
        write(options.out, result)

    models = Models(options)
    most = max(options.prompts, *options.batches)
    files = {"humaneval": options.humaneval, "mt_bench": options.mt_bench}
    sets = {
        name: read_prompts(models.target.tokenizer, path, name, most)
        for name, path in files.items()
    }
    lengths = [len(asked.tokens) for asked_of in sets.values() for asked in asked_of]
    models.longest = max(lengths) + options.tokens
    if "noise" not in result:
        result["noise"] = {
            name: noise(models.target, asked[0].tokens) for name, asked in sets.items()
        }
    lost = False
    for setting in plan_parts(options):
        build = builders(setting, models)
        chosen = {
            name: make
            for name, make in build.items()
            if name == "none" or not options.only or any(text in name for text in options.only)
        }
        part = result["parts"].get(setting.name)
        if part is None or list(part["methods"]) != list(chosen):
            part = result["parts"][setting.name] = {
                **setting._asdict(),
                "new_tokens": options.tokens,
                "rounds": 0,
                "methods": {},
            }
        begun = time.perf_counter()
        try:
            measure(
                part,
                chosen,
                jobs_of(sets, setting.batch, options.prompts),
                target=models.target,
                repeats=1 if setting.part == "transformers" else options.repeats,
                save=save,
            )
        except LostDevice as fault:
            result["fault"] = str(fault)
            lost = True
        part["seconds"] = part.get("seconds", 0.0) + time.perf_counter() - begun
        print(f"{setting.name}: {time.perf_counter() - begun:.0f} s", flush=True)
        save()
        if lost:
            break
        if setting.part == "transformers":
            models.forget_plain()
        free(models.device)
    Console(width=130).print(end_to_end_plot.table(result))
    if any(end_to_end_plot.measured(part) for part in result["parts"].values()):
        end_to_end_plot.plot(result, options.out.with_suffix(".png"))
    return int(lost)


def plan_parts(options: argparse.Namespace) -> Iterator[Setting]:
    """The parts asked for; transformers decodes one prompt at a time."""
    for batch in options.batches:
        for temperature in options.temperatures:
            for part in options.parts:
                if part != "transformers" or batch == 1:
                    yield Setting(part, temperature, batch)


if __name__ == "__main__":
    sys.exit(main())
