"""What does speculation gain on a CPU, and is our baseline honest?

    python experiments/studies/cpu_speed.py --out experiments/results/cpu_speed.json

Decodes the same prompts greedily, one at a time, with transformers' own `generate` (plain,
assisted, prompt lookup) and with ours (plain and every drafter and tree of a small grid), all in
one process. The methods take turns prompt by prompt, so that a slow spell of the machine meets all
of them. Every output has the same length; the stop token is ignored. Reported: median milliseconds
per token over repeats and prompts, tokens per second, and ratios with 95 % paired bootstrap
intervals over prompts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from specdec.decode import Decoder
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.lab.environment import describe_environment
from specdec.lab.prompts import encode, load_prompts
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, TreePolicy
from specdec.request import Request
from specdec.sampling import SamplingParams
from specdec.verifier.greedy import Greedy
from specdec.verifier.verifier import TreeVerifier

TREES: dict[str, TreePolicy] = {
    "chain 2": Chain(budget=2),
    "dynamic 12, width 3, depth 4": Dynamic(budget=12, width=3, depth=4),
}
NGRAM_TREES: dict[str, TreePolicy] = {
    "chain 16": Chain(budget=16),
    "dynamic 16, width 2, depth 16": Dynamic(budget=16, width=2, depth=16),
}
Generate = Callable[[list[int]], tuple[list[int], int]]  # ids to (new ids, passes of the target)


def ours(target: PagedLM, drafter: Drafter, tokens: int) -> Generate:
    decoder = Decoder(
        verifier=TreeVerifier(target),
        drafter=drafter,
        rule=Greedy(),
        sampling=SamplingParams(),
        max_context=target.max_context,
        device=target.device,
        max_tokens=1024,
    )

    def generate(ids: list[int]) -> tuple[list[int], int]:
        (done,) = decoder.run([Request(id=0, prompt_ids=ids, max_new_tokens=tokens)])
        return done.output_ids, done.steps

    return generate


def theirs(model: Any, tokens: int, **extra: Any) -> Generate:
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    def generate(ids: list[int]) -> tuple[list[int], int]:
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), generation_config=config, **extra)
        return out[0, len(ids) :].tolist(), 0

    return generate


def methods(tokens: int) -> dict[str, Generate]:
    def load(name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # every output gets its full length
        return model

    target = load_model("zoo:target")
    plain = load("target")
    found = {
        "transformers generate": theirs(plain, tokens),
        "transformers assisted": theirs(plain, tokens, assistant_model=load("draft")),
        "transformers prompt lookup": theirs(plain, tokens, prompt_lookup_num_tokens=10),
        "none": ours(target, NoDrafter(), tokens),
    }
    for name, tree in TREES.items():
        draft = SmallLlama(target=target, tree=tree, path="zoo:draft")
        found[f"small_llama, {name}"] = ours(target, draft, tokens)
    for name, tree in NGRAM_TREES.items():
        found[f"ngram, {name}"] = ours(target, NGram(tree=tree), tokens)
    return found


def measure(found: dict[str, Generate], prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """Milliseconds per token [repeats, prompts] and tokens per target pass of every method."""
    seconds = {name: np.zeros((repeats, len(prompts))) for name in found}
    passes = dict.fromkeys(found, 0)
    tokens = differing = 0
    for generate in found.values():
        generate(prompts[0])  # warm-up
    for repeat in range(repeats):
        for place, ids in enumerate(
            track(prompts, description=f"repeat {repeat + 1} of {repeats}")
        ):
            outputs = {}
            for name, generate in found.items():
                start = time.perf_counter()
                outputs[name], steps = generate(ids)
                seconds[name][repeat, place] = time.perf_counter() - start
                passes[name] += steps
            reference = outputs["transformers generate"]
            tokens += len(reference)
            differing += sum(out != reference for out in outputs.values())
    length = tokens / repeats / len(prompts)
    return {
        "tokens_per_output": length,
        "outputs_unlike_transformers_generate": differing,
        "methods": {
            name: {
                "ms_per_token": (np.median(seconds[name], axis=0) / length * 1e3).tolist(),
                "accepted_length": tokens / passes[name] if passes[name] else None,
            }
            for name in found
        },
    }


def ratio(slow: list[float], fast: list[float], rng: np.random.Generator) -> list[float]:
    """Total time over total time, and its 95 % paired bootstrap interval over prompts."""
    a, b = np.array(slow), np.array(fast)
    picks = rng.integers(len(a), size=(10_000, len(a)))
    low, high = np.quantile(a[picks].sum(1) / b[picks].sum(1), [0.025, 0.975])
    return [float(a.sum() / b.sum()), float(low), float(high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--prompts", type=int, default=40, help="of the built-in set, evenly spread"
    )
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()

    logging.set_verbosity_error()
    torch.manual_seed(0)
    found = methods(options.tokens)
    tokenizer = load_model("zoo:target").tokenizer
    every = load_prompts(path=None, field=None, limit=None)
    chosen = every[:: max(1, len(every) // options.prompts)][: options.prompts]
    ids = [encode(tokenizer, prompt, chat="auto") for prompt in chosen]
    result = measure(found, ids, options.repeats)

    rng = np.random.default_rng(0)
    times = {name: m["ms_per_token"] for name, m in result["methods"].items()}
    for name, method in result["methods"].items():
        method["tokens_per_second"] = 1e3 / float(np.mean(times[name]))
        method["speedup_over_none"] = ratio(times["none"], times[name], rng)
        method["speedup_over_generate"] = ratio(times["transformers generate"], times[name], rng)
    result["prompts"] = [prompt.id for prompt in chosen]
    result["command"] = " ".join(["python", *sys.argv])
    result.update(describe_environment(torch.device("cpu")))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")

    table = Table("method", "tok/s", "accepted length", "over none", "over generate")
    for name, method in result["methods"].items():
        length = method["accepted_length"]
        table.add_row(
            name,
            f"{method['tokens_per_second']:.1f}",
            f"{length:.2f}" if length else "-",
            "{:.2f} ({:.2f}-{:.2f})".format(*method["speedup_over_none"]),
            "{:.2f} ({:.2f}-{:.2f})".format(*method["speedup_over_generate"]),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
