"""What tests of the whole loop share: transformers' own `generate`, and a run of ours in which
every cache is checked after each step.

The reference is another instance of the same weights with transformers' own attention and cache,
one prompt at a time. All of it runs on the GPU where there is one, and so through its kernels.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.flight import Step
from specdec.models.paged import PagedLM
from specdec.protocols import AcceptanceRule, Drafter, TreePolicy
from specdec.request import Decoding, Request
from specdec.tree import Children
from specdec.verifier.greedy import Greedy
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded
from tests.models.tiny import VOCABULARY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Small pages and chunks, so that every prompt spans several of each and ends inside one.
PAGE_SIZE = 4
PREFILL_CHUNK = 5

DEPTH = 4  # of the chain
TREES: dict[str, Callable[[Children], TreePolicy]] = {
    "chain": lambda children: Chain(budget=DEPTH, children=children),
    "static": lambda children: Static(widths=[3, 2, 1], children=children),
    "dynamic": lambda children: Dynamic(budget=10, width=3, depth=4, children=children),
}
# (drafter, tree); `none` has no tree.
PLANS = [("none", "chain"), *itertools.product(("small_llama", "ngram"), TREES)]

ZOO_NEW = 22
LONG = 48  # tokens, for effects that add up


@dataclass
class Outcome:
    """What a run gave: finished sequences in the order of the prompts, and its steps."""

    sequences: list[Decoding]
    steps: list[Step] = field(default_factory=list)

    @property
    def outputs(self) -> list[list[int]]:
        return [sequence.output_ids for sequence in self.sequences]


def drafter_of(name: str, draft: Path) -> Drafter:
    if name == "none":
        return NoDrafter()
    return NGram() if name == "ngram" else SmallLlama(path=str(draft))


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    *,
    rule: AcceptanceRule | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    stop: Sequence[int] = (),
    pages: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Outcome:
    """Run the loop; every invariant of every cache is checked after each step and at the end."""
    limits = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    requests = [
        Request(id=i, prompt_ids=prompt, max_new_tokens=limit)
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    verifier = TreeVerifier(target, prefill_chunk=PREFILL_CHUNK)
    loaded(drafter, target)
    decoder = decoder_of(
        verifier,
        drafter,
        tree,
        rule or Greedy(),
        temperature=temperature,
        seed=seed,
        rows=batch_size,
        max_tokens=max(request.max_tokens for request in requests),
        stop_tokens=stop,
        page_size=PAGE_SIZE,
        pages=pages,
        kv_dtype=kv_dtype,
    )
    caches = [verifier.target.cache]
    if isinstance(drafter, SmallLlama):
        caches.append(drafter.model.cache)
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        for cache in caches:
            cache.check()

    finished = sorted(decoder.run(requests, on_step=on_step), key=lambda s: s.request.id)
    for cache in caches:
        cache.check()
        assert cache.free_pages == cache.pages
    assert [sequence.request.id for sequence in finished] == list(range(len(prompts)))
    return Outcome(finished, steps)


def generate(
    model: Any, prompt: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
) -> list[int]:
    """transformers' greedy output, after a check that no choice was so close that rounding could
    turn it."""
    # On the model too: what is unset in the argument would be filled in from there.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(stop) or None, pad_token_id=0
    )
    done = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(done.logits).double().topk(2).values[:, 0]  # [T, 2]
    spread = torch.stack(done.logits).std()
    assert ((best[:, 0] - best[:, 1]) / spread).min() > 1e-4, "a near tie: choose another seed"
    output: list[int] = done.sequences[0, len(prompt) :].tolist()
    return output


def middle_token(outputs: Sequence[Sequence[int]]) -> int:
    """A token that some outputs hold in the middle, to stop at."""
    return outputs[0][len(outputs[0]) // 2]


@dataclass(frozen=True)
class Pair:
    """A target, the folder of its draft, prompts, and what transformers makes of them."""

    target: PagedLM
    draft: Path
    prompts: list[list[int]]
    outputs: list[list[int]]  # stop tokens ignored
    stop: int
    stopped: list[list[int]]  # stopping at `stop`


def family_prompts() -> list[list[int]]:
    """For `tiny` models: longer than a window, of different lengths, two with a common beginning
    of several pages."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, VOCABULARY, (40,), generator=generator).tolist()
    return [text[:19], [*text[:13], *text[30:33]], text[20:24] * 3, text[25:33]]
