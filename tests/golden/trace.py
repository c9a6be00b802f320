"""The golden trace: what every drafter drafts and what is kept of it, step by step.

    python -m tests.golden.trace --write "why it had to change"

Runs are driven by settings strings alone, as typed after `python -m specdec.run`, and observed at
`rule.accept` alone, so the trace outlives any move of code between the two. It is made in float64
on a CPU with one thread. For each case trace.txt holds a line for every prompt and step:

    PROMPT.STEP  accepted nodes  new tokens  hash of the tree's tokens and parents

Nothing of it may hang on rounding, which `--write` makes sure of in two ways. The `margin` of a
case is the largest change tried, at least 1e-4, that leaves the accepted nodes and the next token
of all its steps as they are: each logit is moved by up to that much, and each draft probability
by up to that share of it, at random, 8 times over. And the whole trace is made once more, three
prompts at a time, with every weight of both models changed by about one part in a million; that
covers what the rule does not see, such as the order of drafted tokens and which of them became
nodes. What remains are exact ties between counts of drafters that look up texts.

A case is refused where the run ends with a `ValueError` before its first step. The datastore is
that of `python -m specdec.experiments.tools.build_datastore tokenizer=zoo:target
out=tests/golden/store tests/golden/store.txt`. suffix_decoding forgets after each prompt here,
because what it learns from earlier ones depends on which of them run side by side.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import pkgutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec.verifier
from specdec.lab import lane, running
from specdec.lab.settings import settings_of

HERE = Path(__file__).parent
TRACE, PROMPTS = HERE / "trace.txt", HERE / "prompts.jsonl"
COUNT = len(PROMPTS.read_text().splitlines())
STEPS, NEW = 6, 12  # recorded of each prompt at most, tokens decoded; more than warming up takes
FIXED = (
    "prompts=file prompts.path=HERE/prompts.jsonl ignore_eos=true dtype=float64 device=cpu "
    "tracker=none baseline=false max_new_tokens="
)
DRAFTERS = (
    "none",
    "small_llama",
    "early_exit",
    "translated",
    "ngram",
    "retriever",
    "pld",
    "rest drafter.datastore=HERE/store",
    "suffix_decoding drafter.reset=prompt",
    "token_recycling",
    "lookahead",
    "compose",
    "user drafter._target_=tests.golden.repeat.repeat",
    "synthetic",
)
TREES = ("chain tree.budget=6", "dynamic tree.budget=12")
SAMPLINGS = ("greedy", "sample")
UNDRAWN = [  # refused
    f"drafter={drafter} tree={TREES[1]} sampling=sample tree.children=sample"
    for drafter in ("lookahead", "synthetic")
]
CASES = [
    f"drafter={drafter} tree={tree} sampling={sampling}"
    for drafter in DRAFTERS
    for tree in TREES
    for sampling in SAMPLINGS
    if (drafter, tree) != ("none", TREES[1])  # no tree at all
] + UNDRAWN
LEAST, TRIES, WEIGHTS = 1e-4, 8, 1e-6

Observer = Callable[[Any, Any, Any, Callable[..., Any]], None]
"""Given context, tree and acceptance of a step, and the rule, which can be asked again with noise
on what it judges."""


class EnoughError(BaseException):
    """Ends a run early: nothing between a rule and the command may handle it."""


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Every rule reports what it does, once, however many rules it calls for it."""
    busy = False

    def wrapped(accept: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(accept)
        def outermost(rule: Any, context: Any, tree: Any, logits: Tensor) -> Any:
            nonlocal busy
            if busy:
                return accept(rule, context, tree, logits)
            busy = True
            try:
                acceptance = accept(rule, context, tree, logits)

                def again(noise: Callable[[Tensor], Tensor]) -> Any:
                    proposal = tree.proposal
                    if proposal is not None:
                        probs = proposal.probs * (1 + noise(proposal.probs))
                        proposal = replace(proposal, probs=probs)
                    moved = replace(tree, proposal=proposal)
                    return accept(rule, context, moved, logits + noise(logits))

                observer(context, tree, acceptance, again)
            finally:
                busy = False
            return acceptance

        return outermost

    with contextlib.ExitStack() as patches:
        for found in pkgutil.iter_modules(specdec.verifier.__path__, "specdec.verifier."):
            for kind in vars(importlib.import_module(found.name)).values():
                own = isinstance(kind, type) and kind.__module__ == found.name
                if own and "accept" in vars(kind):
                    patches.enter_context(
                        mock.patch.object(kind, "accept", wrapped(vars(kind)["accept"]))
                    )
        yield


class Models:
    """Models and tokenizers read from disk once for many runs; no run gets the same object twice.

    Args:
        noise: every weight is changed by about this share of it.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.known: dict[Any, Any] = {}

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Of one run."""
        asked: Counter[Any] = Counter()

        def cached(load: Callable[..., Any]) -> Callable[..., Any]:
            def once(path: Any, **options: Any) -> Any:
                role = load.__self__, str(path), options.get("dtype")
                asked[role] += 1
                key = role, asked[role]
                if key not in self.known:
                    self.known[key] = load(path, **options)
                    if self.noise and isinstance(self.known[key], torch.nn.Module):
                        changed(self.known[key], self.noise)
                return self.known[key]

            return once

        with contextlib.ExitStack() as patches:
            for kind in (AutoModelForCausalLM, AutoTokenizer):
                patch = mock.patch.object(kind, "from_pretrained", cached(kind.from_pretrained))
                patches.enter_context(patch)
            yield


@torch.no_grad()
def changed(model: torch.nn.Module, noise: float) -> None:
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight *= 1 + noise * torch.randn(weight.shape, generator=random, dtype=weight.dtype)


def run(settings: str, observer: Observer, models: Models) -> str | None:
    """Why `python -m specdec.run SETTINGS` would be refused, None if it was not."""
    with tempfile.TemporaryDirectory() as out, observed(observer), models.loaded():
        words = f"{settings.replace('HERE', str(HERE))} out={out}/run"
        # One token warms up as well as several for what is observed here.
        with mock.patch.object(lane, "WARM_UP_TOKENS", 1):
            try:
                running.run(settings_of(words), Path(out, "run"), Console(file=io.StringIO()))
            except EnoughError:
                return None
            except ValueError as error:
                return str(error)
    return None


class Recorder:
    """Writes down the first steps of every prompt.

    Args:
        prompts: how many there are.
        steps: of each prompt at most.
        new: tokens that are decoded of each.
        margins: also look for `margin`.
    """

    def __init__(
        self, prompts: int, *, steps: int = STEPS, new: int = NEW, margins: bool = False
    ) -> None:
        self.prompts, self.steps, self.new = prompts, steps, new
        self.margin = 0.1 if margins else 0.0
        self.lines: dict[int, list[str]] = defaultdict(list)  # by request
        self.tokens: Counter[int] = Counter()

    def __call__(self, context: Any, tree: Any, acceptance: Any, again: Any) -> None:
        if any(s.request.max_new_tokens != self.new for s in context.sequences):
            return  # warming up
        every = acceptance.new_tokens(tree).tolist()
        parts = (tree.tokens, tree.parents, tree.size, acceptance.path, acceptance.length)
        rows = zip(context.sequences, every, *(part.tolist() for part in parts), strict=True)
        for sequence, gained, tokens, parents, size, path, length in rows:
            lines = self.lines[sequence.request.id]
            self.tokens[sequence.request.id] += length
            if len(lines) < self.steps:
                shape = json.dumps([tokens[:size], parents[:size]]).encode()
                kept, new = (",".join(map(str, part[:length])) for part in (path, gained))
                lines.append(f"{kept} {new} {hashlib.sha256(shape).hexdigest()[:12]}")
        while self.margin and not stable(acceptance, again, self.margin):
            self.margin /= 2
        ended = [
            len(self.lines[request]) == self.steps or tokens >= self.new
            for request, tokens in self.tokens.items()
        ]
        if len(ended) == self.prompts and all(ended):
            raise EnoughError

    def text(self) -> list[str]:
        ordered = enumerate(lines for _, lines in sorted(self.lines.items()))
        return [f"{p}.{step} {line}" for p, lines in ordered for step, line in enumerate(lines)]


def stable(acceptance: Any, again: Any, size: float) -> bool:
    """Whether a rule keeps the same, whatever of this size happens to its inputs."""

    def kept(of: Any) -> list[Any]:
        rows = zip(of.path.tolist(), of.length.tolist(), of.next_token.tolist(), strict=True)
        return [(path[:length], token) for path, length, token in rows]

    random = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(-size, size, generator=random)

    return all(kept(again(noise)) == kept(acceptance) for _ in range(TRIES))


def replay(
    cases: Sequence[str],
    batch: int,
    prompts: int = COUNT,
    *,
    margins: bool = False,
    models: Models | None = None,
) -> Iterator[tuple[str, float, list[str]]]:
    """Each case with its margin (0.0 unless asked for) and its lines of the first prompts."""
    models = models or Models()
    for case in cases:
        recorder = Recorder(prompts, margins=margins)
        shared = f"batch_size={batch} prompts.limit={prompts} {FIXED}{NEW}"
        reason = run(f"{case} {shared}", recorder, models)
        lines = recorder.text()
        if reason is not None:
            lines = [*lines, f"failed: {reason}"] if lines else ["refused"]
        yield case, recorder.margin, lines


def recorded(prompts: int = COUNT) -> dict[str, list[str]]:
    """The lines of every case in trace.txt, of the first prompts."""
    others = ("margin", *(f"{prompt}." for prompt in range(prompts, COUNT)))
    blocks = [block.splitlines() for block in TRACE.read_text().split("\n\n")[1:]]
    return {
        case: [line for line in lines if not line.startswith(others)] for case, *lines in blocks
    }


def difference(case: str, expected: list[str], found: list[str]) -> str | None:
    """The first line that differs, None if there is none."""
    for old, new in zip([*expected, "the end"], [*found, "the end"], strict=False):
        if old != new:
            return f"{case}\n  expected {old}\n  found    {new}"
    return None


def write(reason: str) -> None:
    """Remake trace.txt.

    Raises:
        SystemExit: it would hang on rounding, or on the batch.
    """
    blocks = [f"last made: {reason}\nall cases: {FIXED}{NEW}"]
    faults = []
    made = replay(CASES, 1, margins=True), replay(CASES, 3, models=Models(WEIGHTS))
    for (case, margin, lines), (_, _, others) in zip(*made, strict=True):
        print(f"{margin:.1g} {case}", flush=True)
        blocks.append("\n".join([case, f"margin {margin:.1g}", *lines]))
        if margin < LEAST:
            faults.append(f"margin {margin:.1g}: {case}")
        wrong = difference(case, lines, others)
        if wrong:
            faults.append(f"batch 3 and weights changed by {WEIGHTS}: {wrong}")
            print(wrong, flush=True)
    if faults:
        sys.exit("\n".join(["not fit for a trace; change prompts or seed:", *faults]))
    TRACE.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", metavar="REASON", required=True)
    torch.set_num_threads(1)
    write(parser.parse_args().write)
