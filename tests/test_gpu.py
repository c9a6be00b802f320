"""The same loop on a GPU: equality in float32, explained differences in bfloat16, times."""

import time

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
TEXTS = (
    "def fibonacci(n):\n    ",
    "It was a dark night, and the old captain stood at the",
    "class Stack:\n    def __init__(self",
    "The function returns a list of",
)
TREES = {
    "chain": Chain(budget=4),
    "static": Static(widths=[3, 2, 1]),
    "dynamic": Dynamic(budget=12),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def target(request: pytest.FixtureRequest) -> PagedLM:
    torch.backends.cuda.matmul.allow_tf32 = False
    return PagedLM.load("zoo:target", dtype=getattr(torch, request.param), device="cuda")


def decode(target: PagedLM, drafter: Drafter, *, batch_size: int, temperature: float = 0.0):
    steps: list[Step] = []
    decoder = Decoder(
        verifier=TreeVerifier(target),
        drafter=drafter,
        rule=RecursiveRejection() if temperature else Greedy(),
        sampling=SamplingParams(temperature=temperature, seed=1),
        max_context=target.max_context,
        device=target.device,
        batch_size=batch_size,
        max_tokens=256,
    )
    prompts = [target.tokenizer(text).input_ids for text in TEXTS]
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=48) for i, ids in enumerate(prompts)]
    done = {s.request.id: s for s in decoder.run(requests, on_step=steps.append)}
    return [
        {"prompt": i, "turn": 0, "prompt_ids": prompts[i], "output_ids": done[i].output_ids}
        for i in range(len(prompts))
    ], steps


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", ["none", "small_llama", "ngram"])
def test_greedy_equals_the_baseline(target, kind, tree, batch_size):
    drafters = {
        "none": NoDrafter,
        "small_llama": lambda: SmallLlama(target=target, tree=TREES[tree], path="zoo:draft"),
        "ngram": lambda: NGram(tree=TREES[tree]),
    }
    mine, _ = decode(target, drafters[kind](), batch_size=batch_size)
    plain, _ = decode(target, NoDrafter(), batch_size=1)
    report = compare(mine, plain, target)
    if target.dtype == torch.float32:
        assert report["identical"] == 4
    # bfloat16 keeps 8 bits: of logits around 20, neighbours are an eighth apart.
    assert all(abs(d["logit_gap"]) <= 0.25 for d in report["divergences"])


def test_plain_decoding_equals_generate(target):
    if target.dtype != torch.float32:
        pytest.skip("equality is a matter of float32")
    own = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32).cuda()
    mine, _ = decode(target, NoDrafter(), batch_size=4)
    for text, record in zip(TEXTS, mine, strict=True):
        ids = torch.tensor([target.tokenizer(text).input_ids], device="cuda")
        out = own.generate(
            ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, eos_token_id=None
        )
        assert record["output_ids"] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_sampling_does_not_depend_on_the_batch(target, children):
    if target.dtype != torch.float32:
        pytest.skip("equality is a matter of float32")
    tree = Dynamic(budget=12, children=children)
    drafter = SmallLlama(target=target, tree=tree, path="zoo:draft")
    alone, _ = decode(target, drafter, batch_size=1, temperature=1.0)
    together, _ = decode(target, drafter, batch_size=4, temperature=1.0)
    assert alone == together


def test_step_times_add_up_to_the_clock(target):
    drafter = SmallLlama(target=target, tree=TREES["chain"], path="zoo:draft")
    decode(target, drafter, batch_size=1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _, steps = decode(target, drafter, batch_size=1)
    elapsed = time.perf_counter() - start
    assert sum(sum(step.seconds.values()) for step in steps) == pytest.approx(elapsed, rel=0.1)
