"""The whole loop on a GPU, through the kernels and through the reference: equality with
transformers' own `generate` in float32, explained differences in bfloat16 and over quantised
pages, times.

The other tests of the loop run on the GPU as well where there is one; here are the cases that
differ there.
"""

import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.compare import compare
from specdec.decode import Decoder, Step
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.kernels.choose import Kernels
from specdec.model import PagedLM, zoo_path
from specdec.protocols import Drafter, Request
from specdec.sampling import SamplingParams
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.verifier import TreeVerifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# A beginning of many pages that the last two share, beside short texts.
COMMON = "".join(
    f"def step_{i}(state):\n    state.count += {i}\n    return state\n\n\n" for i in range(12)
)
TEXTS = (
    "def fibonacci(n):\n    ",
    "It was a dark night, and the old captain stood at the",
    COMMON + "def fibonacci(n):\n    ",
    COMMON + "class Stack:\n    def __init__(self",
)
NEW = 48
TREES = {
    "chain": Chain(budget=4),
    "static": Static(widths=[3, 2, 1]),
    "dynamic": Dynamic(budget=12),
}
PLANS = [
    ("none", "chain"),
    *((kind, tree) for kind in ("small_llama", "ngram") for tree in TREES),
]


def load(dtype: torch.dtype, **kernels: Any) -> PagedLM:
    return PagedLM.load("zoo:target", dtype=dtype, device="cuda", kernels=Kernels(**kernels))


@pytest.fixture(scope="module", params=["triton", "reference"])
def exact(request: pytest.FixtureRequest) -> PagedLM:
    return load(torch.float32, impl=request.param)


@pytest.fixture(scope="module")
def generated() -> list[list[int]]:
    """What transformers makes of TEXTS in float32."""
    model = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32).cuda()
    outputs = []
    for ids in prompts_of(load(torch.float32)):
        inputs = torch.tensor([ids], device="cuda")
        length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None}
        out = model.generate(inputs, do_sample=False, pad_token_id=0, **length)
        outputs.append(out[0, len(ids) :].tolist())
    return outputs


def prompts_of(target: PagedLM) -> list[list[int]]:
    return [target.tokenizer(text).input_ids for text in TEXTS]


def build(kind: str, tree: str, target: PagedLM) -> Drafter:
    if kind == "none":
        return NoDrafter()
    if kind == "ngram":
        return NGram(tree=TREES[tree])
    return SmallLlama(target=target, tree=TREES[tree], path="zoo:draft")


def decode(
    target: PagedLM,
    drafter: Drafter,
    *,
    batch_size: int,
    temperature: float = 0.0,
    kv_dtype: torch.dtype | None = None,
) -> tuple[list[dict[str, Any]], list[Step]]:
    """Records of the outputs, in the order of the prompts, and the steps."""
    steps: list[Step] = []
    decoder = Decoder(
        verifier=TreeVerifier(target),
        drafter=drafter,
        rule=RecursiveRejection() if temperature else Greedy(),
        sampling=SamplingParams(temperature=temperature, seed=1),
        max_context=target.max_context,
        device=target.device,
        kernels=target.kernels,
        batch_size=batch_size,
        max_tokens=1024,
        kv_dtype=kv_dtype,
    )
    prompts = prompts_of(target)
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=NEW) for i, ids in enumerate(prompts)]
    done = {s.request.id: s for s in decoder.run(requests, on_step=steps.append)}
    return [
        {"prompt": i, "turn": 0, "prompt_ids": ids, "output_ids": done[i].output_ids}
        for i, ids in enumerate(prompts)
    ], steps


def outputs_of(records: list[dict[str, Any]]) -> list[list[int]]:
    return [record["output_ids"] for record in records]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("kind", "tree"), PLANS)
def test_greedy_equals_generate(
    exact: PagedLM, generated: list[list[int]], kind: str, tree: str, batch_size: int
) -> None:
    records, steps = decode(exact, build(kind, tree, exact), batch_size=batch_size)
    assert outputs_of(records) == generated
    assert (sum(sum(step.accepted) for step in steps) > 0) == (kind != "none")


@pytest.mark.parametrize("settings", [{"fixed_splits": 3}, {"shared_prefix": True}], ids=str)
@pytest.mark.parametrize(("kind", "tree"), [("none", "chain"), ("small_llama", "dynamic")])
def test_however_the_work_is_divided(
    generated: list[list[int]], kind: str, tree: str, settings: dict[str, Any]
) -> None:
    target = load(torch.float32, impl="triton", **settings)
    records, _ = decode(target, build(kind, tree, target), batch_size=4)
    assert outputs_of(records) == generated


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_sampling_does_not_depend_on_the_batch(exact: PagedLM, children: Any) -> None:
    tree = Dynamic(budget=12, children=children)
    drafter = SmallLlama(target=exact, tree=tree, path="zoo:draft")
    alone, _ = decode(exact, drafter, batch_size=1, temperature=1.0)
    together, _ = decode(exact, drafter, batch_size=4, temperature=1.0)
    assert alone == together


# --- inexact


@pytest.fixture(scope="module", params=["triton", "reference"])
def rounded(request: pytest.FixtureRequest) -> PagedLM:
    return load(torch.bfloat16, impl=request.param)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("kind", "tree"), PLANS)
def test_bfloat16_differs_at_near_ties_only(
    rounded: PagedLM, kind: str, tree: str, batch_size: int
) -> None:
    records, _ = decode(rounded, build(kind, tree, rounded), batch_size=batch_size)
    plain, _ = decode(rounded, NoDrafter(), batch_size=1)
    divergences = compare(records, plain, rounded)["divergences"]
    # bfloat16 keeps 8 bits: of logits around 20, neighbours are an eighth apart.
    assert all(abs(d["logit_gap"]) <= 0.25 for d in divergences)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches_differ_at_near_ties_only(exact: PagedLM, kv_dtype: torch.dtype) -> None:
    """From plain decoding over the same cache. Where float32 rounds a key otherwise, it may fall
    on the other side of a tie between two numbers of the pages: a step of one of them."""
    drafter = build("small_llama", "dynamic", exact)
    records, steps = decode(exact, drafter, batch_size=4, kv_dtype=kv_dtype)
    plain, _ = decode(exact, NoDrafter(), batch_size=1, kv_dtype=kv_dtype)
    divergences = compare(records, plain, exact, kv_dtype=kv_dtype)["divergences"]
    assert all(abs(d["logit_gap"]) <= 0.05 for d in divergences)
    assert sum(sum(step.accepted) for step in steps) > 0


# --- times


def test_step_times_add_up_to_the_clock(exact: PagedLM) -> None:
    drafter = build("small_llama", "chain", exact)
    decode(exact, drafter, batch_size=1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _, steps = decode(exact, drafter, batch_size=1)
    elapsed = time.perf_counter() - start
    assert sum(sum(step.seconds.values()) for step in steps) == pytest.approx(elapsed, rel=0.1)
