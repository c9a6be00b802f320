"""Accepted lengths of every drafter and every tree policy, pinned to 1 %.

    python -m tests.golden.lengths --write "why they had to change"

Driven and observed as the trace is; a length is the mean of what `rule.accept` keeps of a step,
the target's own token included, over all steps of all prompts.
"""

import argparse
import json
from collections.abc import Iterator, Sequence

import torch

from tests.golden import trace

LENGTHS = trace.HERE / "lengths.json"
TOLERANCE = 0.01
NEW = 24
SETTINGS = f"batch_size=4 {trace.FIXED}{NEW}"
TREES = (
    "chain tree.budget=4",
    "static tree.widths=[3,2,1]",
    "paths",
    "dynamic",
    "threshold",
    "optimal",
    "accuracy",
    "cost_aware tree.costs=cpu",
)
DRAFTERS = [d.replace(" drafter.reset=prompt", "") for d in trace.DRAFTERS if d != "none"]
DRAWN = ("small_llama", "early_exit", "translated", "compose drafter.mode=union", "synthetic")
GROUPS = {
    "drafters": [f"drafter={drafter} tree=dynamic" for drafter in DRAFTERS],
    "trees": [f"drafter=small_llama tree={tree}" for tree in TREES if tree != "dynamic"]
    + [f"drafter={drafter} tree=dynamic sampling=sample" for drafter in DRAWN],
}


def measured(
    cases: Sequence[str], models: trace.Models | None = None
) -> Iterator[tuple[str, float]]:
    """Each case with its accepted length."""
    models = models or trace.Models()
    for case in cases:
        recorder = trace.Recorder(trace.COUNT, steps=NEW, new=NEW)
        reason = trace.run(f"{case} {SETTINGS}", recorder, models)
        assert reason is None, f"{case}: {reason}"
        steps = sum(map(len, recorder.lines.values()))
        yield case, round(recorder.tokens.total() / steps, 4)


def recorded() -> dict[str, float]:
    """The length of every case in lengths.json."""
    lengths: dict[str, float] = json.loads(LENGTHS.read_text())["lengths"]
    return lengths


def write(reason: str) -> None:
    """Remake lengths.json."""
    cases = [case for group in GROUPS.values() for case in group]
    lengths = dict(measured(cases))
    content = {"last made": reason, "settings": SETTINGS, "lengths": lengths}
    LENGTHS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", metavar="REASON", required=True)
    torch.set_num_threads(1)
    write(parser.parse_args().write)
