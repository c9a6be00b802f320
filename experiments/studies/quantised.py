"""Does it move acceptance that a target is quantised?

    python -m specdec.experiments.studies.quantised humaneval=code.jsonl mt_bench=chat.jsonl \\
        out=quantised.json
    python -m specdec.experiments.studies.quantised ... target=standin:llama3_8b \\
        draft=standin:llama_160m device=cuda dtype=bfloat16 out=quantised_8b.json

Weights: the target as its files have it and with weights in float8 (`target.quantize=fp8`), the
draft as it is. Each target writes texts with each drafter, losslessly; tokens over passes are the
accepted length. The texts of the first drafter are read again by transformers' own pass of both
targets and of the draft. *Overlap* is the chance that a token drawn from the draft is accepted: at
temperature 1 the sum of the smaller of the two probabilities, at 0 whether both have the same best
token. Overlap with both targets along the same texts shows what quantisation does, and no luck of
texts beside it. The divergence of Kullback and Leibler, fp8 from bf16, is along the texts of fp8.

Pages: a context is a prompt with others before it, cut to its last tokens. What the
target says then at temperature 1 is read over keys and values in pages of each type, and compared
with what it says over plain ones; overlap is with the draft over pages of the same type.

Sums are kept by conversation. The file is written anew after each part; `resume=true` goes on.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.experiments.figures.markdown import show
from specdec.experiments.figures.quantised import quantised
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.prompts import Asked
from specdec.lab.witness import own_logits
from specdec.lab.workshop import PLAIN, StudyOptions, tree, word
from specdec.models.paged import PagedLM
from specdec.request import KV_DTYPES

TARGETS = ("none", "fp8")  # values of target.quantize
PAGES = ("fp8_e4m3", "int8")
CHAIN = tree("chain", 4)
Sums = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    drafters: tuple[Literal["small_llama", "eagle3"], ...] = option(
        ("small_llama", "eagle3"), "whose accepted lengths are measured"
    )
    temperatures: tuple[Literal[0, 1], ...] = option((0, 1), "of sampling", varies=True)
    contexts: tuple[Positive, ...] = option((64, 256, 1024, 2048), "tokens", varies=True)
    pages: Positive = option(16, "conversations at each length of context")
    out: Path = option(about="result file")
    resume: bool = option(False, "what the file has stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none":
            raise ValueError(f"quantize={self.quantize}: both are compared; leave it out")


def said(
    lm: PagedLM, prompt: Sequence[int], output: Sequence[int], pages: str = "auto"
) -> Iterator[Tensor]:
    """[n, V] float64 logarithms of probabilities of the tokens of an output, by transformers' own
    pass over keys and values as pages of a type hold them."""
    for logits in own_logits(lm, prompt, output, kv_dtype=KV_DTYPES[pages]):
        yield logits.double().log_softmax(-1)


def overlap(target: Tensor, draft: Tensor, temperature: int) -> float:
    """Sum over tokens of the chance that one drawn from the draft is accepted.

    Args:
        target, draft: [n, V] logarithms of probabilities; one may have more tokens.
    """
    shared = min(target.shape[1], draft.shape[1])
    if not temperature:
        return float((target.argmax(-1) == draft.argmax(-1)).sum())
    return float(torch.minimum(target[:, :shared].exp(), draft[:, :shared].exp()).sum())


def divergence(mine: Tensor, other: Tensor) -> float:
    """Sum over tokens of the divergence of `mine` from `other`, in nats."""
    known = mine.exp() > 0
    return float((mine.exp() * (mine - other)).masked_fill(~known, 0.0).sum())


def agreement(mine: Tensor, other: Tensor) -> float:
    """How many tokens have the same best one."""
    return float((mine.argmax(-1) == other.argmax(-1)).sum())


class Bench:
    """The models and prompts of a run."""

    def __init__(self, options: Options) -> None:
        self.options, self.shop = options, options.workshop()
        shops = {name: self.shop.having(f"target.quantize={name}") for name in TARGETS}
        self.targets = {name: shop.target for name, shop in shops.items()}
        self.draft = self.shop.models.load(options.draft, setting="draft")
        self.asked = [one for of in options.read(self.shop).values() for one in of]

    def decode(
        self, words: str, asked: Sequence[Asked], temperature: int
    ) -> tuple[list[list[int]], list[int]]:
        """Outputs, and passes of the target."""
        shop = self.shop.having(f"{words} sampling.temperature={temperature}")
        longest = max(len(one.tokens) for one in asked) + self.options.tokens
        rows = self.options.batch
        session = shop.session("", rows=rows, longest=longest)
        outputs, passes = [], []
        for start in range(0, len(asked), rows):
            done = session.decode(asked[start : start + rows], self.options.tokens)
            outputs += done.outputs
            passes += done.passes
        return outputs, passes


def weights(bench: Bench, temperature: int) -> dict[str, Any]:
    """What quantised weights change, at a temperature."""
    options = bench.options
    texts: dict[str, list[list[int]]] = {}
    accepted: dict[str, dict[str, Any]] = {}
    for drafter in options.drafters:
        path = f" {word('drafter.path', options.draft)}" if drafter == "small_llama" else ""
        for name in TARGETS:
            words = f"target.quantize={name} drafter={drafter}{path} {CHAIN}"
            outputs, passes = bench.decode(words, bench.asked, temperature)
            lengths = [len(output) for output in outputs]
            accepted.setdefault(drafter, {})[name] = {"tokens": lengths, "passes": passes}
            texts.setdefault(name, outputs)
    found: dict[str, Any] = {"accepted": accepted, "texts": {}}
    for name, outputs in texts.items():
        pairs = zip(bench.asked, outputs, strict=True)
        found["texts"][name] = _columns(
            [read_by_all(bench, one.tokens, output, temperature) for one, output in pairs]
        )
    return found


def read_by_all(
    bench: Bench, prompt: Sequence[int], output: Sequence[int], temperature: int
) -> dict[str, float]:
    """Sums over the tokens of a text."""
    total = dict.fromkeys(("tokens", *TARGETS, "divergence", "agreement"), 0.0)
    models = (*bench.targets.values(), bench.draft)
    for plain, small, draft in zip(*(said(lm, prompt, output) for lm in models), strict=True):
        total["tokens"] += len(plain)
        total["none"] += overlap(plain, draft, temperature)
        total["fp8"] += overlap(small, draft, temperature)
        total["divergence"] += divergence(small, plain)
        total["agreement"] += agreement(small, plain)
    return total


def pages(bench: Bench, context: int) -> dict[str, Any]:
    """What quantised pages change, after so many tokens."""
    if context + bench.options.tokens > bench.targets["none"].max_context:
        raise ValueError(f"contexts={context}: exceeds what the target has positions for")
    asked = contexts(bench.asked, context, bench.options.pages)
    outputs, _ = bench.decode(PLAIN, asked, 1)
    found: dict[str, Any] = {}
    for name in ("auto", *PAGES):
        rows = []
        for one, output in zip(asked, outputs, strict=True):
            total = dict.fromkeys(("tokens", "overlap", "divergence", "agreement"), 0.0)
            target, text = bench.targets["none"], (one.tokens, output)
            for plain, small, draft in zip(
                said(target, *text),
                said(target, *text, name),
                said(bench.draft, *text, name),
                strict=True,
            ):
                total["tokens"] += len(plain)
                total["overlap"] += overlap(small, draft, 1)
                total["divergence"] += divergence(small, plain)
                total["agreement"] += agreement(small, plain)
            rows.append(total)
        found[name] = _columns(rows)
    return found


def contexts(asked: Sequence[Asked], length: int, count: int) -> list[Asked]:
    """Prompts, evenly spread, with others before them: the last `length` tokens of each.

    Raises:
        ValueError: all of them together have fewer tokens.
    """
    tokens = sum(len(one.tokens) for one in asked)
    if tokens < length:
        raise ValueError(f"contexts={length}: all prompts have {tokens} tokens; give more of them")
    found = []
    for number in range(min(count, len(asked))):
        place = number * len(asked) // count
        others = [*asked[place + 1 :], *asked[: place + 1]]  # the prompt itself comes last
        whole = [token for one in others for token in one.tokens]
        found.append(asked[place]._replace(tokens=whole[-length:]))
    return found


def _columns(rows: Sequence[dict[str, float]]) -> Sums:
    return {name: [round(row[name], 9) for row in rows] for name in rows[0]}


@torch.no_grad()
def work(options: Options) -> None:
    torch.manual_seed(0)
    bench = Bench(options)
    result = begin(options, bench.shop.models.placement.device)
    save = partial(write, options.out, result)
    result["conversations"] = [one.name for one in bench.asked]
    parts = [("weights", weights, options.temperatures), ("pages", pages, options.contexts)]
    for part, measure, values in parts:
        found = result.setdefault(part, {})
        for value in values:
            if str(value) not in found:
                found[str(value)] = measure(bench, value)
                save()
                print(f"{part} {value}", flush=True)
    save()
    show(quantised(result))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())
