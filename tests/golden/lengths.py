"""Accepted lengths of every drafter and every tree policy, pinned to 1 %.

    python -m tests.golden.lengths --write "why they had to change"

Driven and observed as the trace is; a length is the mean of what `rule.accept` keeps of a step,
the target's own token included, over all steps of all prompts.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.golden import trace

LENGTHS = trace.HERE / "lengths.json"
TOLERANCE = 0.01
NEW = 24
SETTINGS = f"prompts.limit=4 batch_size=4 max_new_tokens={NEW} {trace.FIXED}"
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


def measured(cases: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Each case with its accepted length."""
    models = trace.Models()
    for case in cases:
        kept: list[int] = []

        def count(context: Any, tree: Any, acceptance: Any, again: Any, kept: Any = kept) -> None:
            if context.sequences[0].request.max_new_tokens == NEW:
                kept += acceptance.length.tolist()

        code = trace.run(f"{case} {SETTINGS}", count, models)
        assert code == 0, f"{case}: exit code {code}"
        yield case, round(sum(kept) / len(kept), 4)


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
