"""The whole loop on a GPU, through the kernels and through the reference: equality with
transformers' own `generate` in float32, explained differences in bfloat16 and over quantised
pages, times.

The other tests of the loop run on the GPU as well where there is one; here are the cases that
differ there.
"""

import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.decode import Decoder, Step
from specdec.drafters.compose import Compose
from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.eagle import Eagle3, PEagle
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.mtp import MTP
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.own_cache import OwnCache
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.kernels.choose import Kernels
from specdec.lab.lossless import compare
from specdec.lab.witness import Witness
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy
from specdec.request import Request
from specdec.training.methods import mtp
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from tests.decoding import decoder_of
from tests.heads import blocks, made

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():  # here, for its hundreds of cases need not be put together
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
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
GROWN = (  # on the device
    "small_llama",
    "early_exit",
    "own_cache",
    "token_recycling",
    "eagle3",
    "compose union",
    "compose cascade",
    "cascade eagle3",
    "cascade dflash",
)
UNTRAINED = ("dflash", "dflash 2", "dspark", "mtp", "peagle")  # random: nothing is kept
PLANS = [
    ("none", "chain"),
    *((kind, tree) for kind in (*GROWN, "ngram") for tree in TREES),
    *((kind, "dynamic") for kind in UNTRAINED),
]


@cache
def random_head(kind: str) -> str:
    """The folder of a random head for the built-in target."""
    folder = Path(mkdtemp())
    if kind == "mtp":
        made.begun(folder, load_model("zoo:target"), mtp.MTP())
        return str(folder)
    target = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32)
    markov, choices = ("gated" if kind == "dspark" else ""), (9 if kind == "dflash 2" else 0)
    if kind == "peagle":
        made.eagle3(
            folder,
            target,
            layout="speculators",
            taps=(1, 3, 5),
            mask=7,
            config={"target_hidden_size": 384},
        )
    else:
        blocks.dflash(folder, target, layout="speculators", markov=markov, choices=choices)
    return str(folder)


def load(dtype: torch.dtype, **kernels: Any) -> PagedLM:
    return load_model(
        "zoo:target",
        Placement(device=torch.device("cuda"), dtype=dtype, kernels=Kernels(**kernels)),
    )


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


def build(kind: str) -> Drafter:
    if kind == "none":
        return NoDrafter()
    if kind == "ngram":
        return NGram()
    if kind == "early_exit":
        return EarlyExit()
    if kind == "own_cache":
        return OwnCache(window=128)
    if kind == "token_recycling":
        return TokenRecycling()
    if kind == "eagle3":
        return Eagle3(path="zoo:eagle3")
    if kind == "peagle":
        return PEagle(path=random_head(kind))
    if kind.startswith("dflash"):
        return DFlash(path=random_head(kind))
    if kind == "mtp":
        return MTP(path=random_head(kind))
    if kind == "dspark":
        return DSpark(path=random_head(kind))
    small = SmallLlama(path="zoo:draft")
    if kind == "small_llama":
        return small
    if kind.startswith("cascade"):  # whole steps go by without a draft of the head
        parts = {"ngram": NGram(), "head": build(kind.removeprefix("cascade "))}
        return Compose(parts=parts, mode="cascade", min_match=2)
    parts = {"ngram": NGram(), "small_llama": small}
    return Compose(parts=parts, mode=kind.removeprefix("compose "), min_match=2)


def new_decoder(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None,
    rule: AcceptanceRule | None = None,
    *,
    batch_size: int,
    temperature: float = 0.0,
    **options: Any,
) -> Decoder:
    return decoder_of(
        target,
        drafter,
        tree,
        rule or (RecursiveRejection() if temperature else None),
        temperature=temperature,
        seed=1,
        rows=batch_size,
        max_tokens=1024,
        **options,
    )


def decode(
    target: PagedLM, drafter: Drafter, tree: TreePolicy | None, **options: Any
) -> tuple[list[dict[str, Any]], list[Step]]:
    """Records of the outputs, in the order of the prompts, and the steps."""
    steps: list[Step] = []
    decoder = new_decoder(target, drafter, tree, **options)
    prompts = prompts_of(target)
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=NEW) for i, ids in enumerate(prompts)]
    done = {s.request.id: s for s in decoder.run(requests, on_step=steps.append)}
    return [
        {"prompt": i, "sample": 0, "turn": 0, "prompt_ids": ids, "output_ids": done[i].output_ids}
        for i, ids in enumerate(prompts)
    ], steps


def outputs_of(records: list[dict[str, Any]]) -> list[list[int]]:
    return [record["output_ids"] for record in records]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("kind", "tree"), PLANS)
def test_greedy_equals_generate(
    exact: PagedLM, generated: list[list[int]], kind: str, tree: str, batch_size: int
) -> None:
    records, steps = decode(exact, build(kind), TREES[tree], batch_size=batch_size)
    assert outputs_of(records) == generated
    if kind not in UNTRAINED:
        assert (sum(sum(step.accepted) for step in steps) > 0) == (kind != "none")


@pytest.mark.parametrize(
    "settings",
    [{"exact": True}, {"exact": True, "shared_prefix": True}, {"shared_prefix": True}],
    ids=str,
)
@pytest.mark.parametrize(("kind", "tree"), [("none", "chain"), ("small_llama", "dynamic")])
def test_however_the_work_is_divided(
    generated: list[list[int]], kind: str, tree: str, settings: dict[str, Any]
) -> None:
    target = load(torch.float32, impl="triton", **settings)
    records, _ = decode(target, build(kind), TREES[tree], batch_size=4)
    assert outputs_of(records) == generated


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_sampling_does_not_depend_on_the_batch(exact: PagedLM, children: Any) -> None:
    tree = Dynamic(budget=12, children=children)
    drafter = SmallLlama(path="zoo:draft")
    alone, _ = decode(exact, drafter, tree, batch_size=1, temperature=1.0)
    together, _ = decode(exact, drafter, tree, batch_size=4, temperature=1.0)
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
    records, _ = decode(rounded, build(kind), TREES[tree], batch_size=batch_size)
    plain, _ = decode(rounded, NoDrafter(), None, batch_size=1)
    divergences = compare(records, plain, Witness(rounded))["divergences"]
    # bfloat16 keeps 8 bits: of logits around 20, neighbours are an eighth apart.
    assert all(abs(d["logit_gap"]) <= 0.25 for d in divergences)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches_differ_at_near_ties_only(exact: PagedLM, kv_dtype: torch.dtype) -> None:
    """From plain decoding over the same cache. Where float32 rounds a key otherwise, it may fall
    on the other side of a tie between two numbers of the pages: a step of one of them."""
    drafter = build("small_llama")
    records, steps = decode(exact, drafter, TREES["dynamic"], batch_size=4, kv_dtype=kv_dtype)
    plain, _ = decode(exact, NoDrafter(), None, batch_size=1, kv_dtype=kv_dtype)
    divergences = compare(records, plain, Witness(exact, kv_dtype))["divergences"]
    assert all(abs(d["logit_gap"]) <= 0.05 for d in divergences)
    assert sum(sum(step.accepted) for step in steps) > 0


# --- times


@pytest.mark.parametrize("kind", ["none", "small_llama", "ngram"])
def test_step_times_add_up_to_the_clock(exact: PagedLM, kind: str) -> None:
    decoder = new_decoder(exact, build(kind), TREES["chain"], batch_size=2)
    prompts = prompts_of(exact)
    decoder.warm_up(prompts[0])
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=NEW) for i, ids in enumerate(prompts)]
    steps: list[Step] = []
    torch.cuda.synchronize()
    start = time.perf_counter()
    done = list(decoder.run(requests, on_step=steps.append))
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    assert len(done) == len(prompts)
    assert sum(sum(step.seconds.values()) for step in steps) == pytest.approx(elapsed, rel=0.03)


# --- graphs, and results that come a step late


@pytest.fixture(scope="module")
def eager() -> PagedLM:
    return load(torch.float32, impl="triton", graphs=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["none", *GROWN, *UNTRAINED, "ngram"])
def test_graphs_change_nothing(
    exact: PagedLM, eager: PagedLM, kind: str, batch_size: int, temperature: float
) -> None:
    if exact.kernels.impl != "triton":
        pytest.skip("graphs are captured over the kernels only")
    tree = "chain" if kind == "ngram" else "static"
    rule = TargetOnly() if temperature else Greedy()
    outputs = [
        decode(
            target,
            build(kind),
            TREES[tree],
            batch_size=batch_size,
            temperature=temperature,
            rule=rule,
        )
        for target in (exact, eager)
    ]
    assert outputs_of(outputs[0][0]) == outputs_of(outputs[1][0])


@pytest.mark.parametrize("kind", ["none", *GROWN, *UNTRAINED, "ngram"])
def test_after_warming_up_everything_is_replayed(exact: PagedLM, kind: str) -> None:
    """At every size of batch, that of the last sequences included."""
    if exact.kernels.impl != "triton":
        pytest.skip("graphs are captured over the kernels only")
    decoder = new_decoder(exact, build(kind), TREES["chain"], batch_size=3)
    prompts = prompts_of(exact)
    decoder.warm_up(prompts[0])
    before = {verb: dict(counts) for verb, counts in decoder.graphs.counts.items()}
    requests = [
        Request(id=i, prompt_ids=ids, max_new_tokens=NEW - 9 * i) for i, ids in enumerate(prompts)
    ]
    steps: list[Step] = []
    for _ in decoder.run(requests, on_step=steps.append):
        pass
    after = decoder.graphs.counts
    assert decoder.graphs.obstacle is None
    assert ("draft" in after) == (kind != "ngram")
    for verb, counts in after.items():
        assert counts["called"] == before[verb]["called"], verb
        assert counts["captured"] == before[verb]["captured"], verb
        assert counts["replayed"] - before[verb]["replayed"] == len(steps)


@pytest.mark.parametrize("kind", ["none", *GROWN, *UNTRAINED, "ngram"])
def test_texts_end_exactly_where_they_should(
    exact: PagedLM, generated: list[list[int]], kind: str
) -> None:
    """At the first stop token or the limit, with rows that are filled again meanwhile."""
    stops = {output[17 + i] for i, output in enumerate(generated)}
    wanted = []
    for output in generated:
        end = next((i + 1 for i, token in enumerate(output) if token in stops), NEW)
        wanted.append(output[:end])
    decoder = new_decoder(exact, build(kind), TREES["chain"], batch_size=2, stop_tokens=stops)
    prompts = prompts_of(exact)
    requests = [
        Request(id=i, prompt_ids=prompts[i % 4], max_new_tokens=NEW - i // 4) for i in range(8)
    ]
    done = {s.request.id: s for s in decoder.run(requests)}
    for i in range(8):
        assert done[i].output_ids == wanted[i % 4][: NEW - i // 4]
        assert sum(done[i].accepted_lengths) == len(done[i].output_ids)


def test_what_cannot_be_captured_is_called(exact: PagedLM) -> None:
    class Waiting(Greedy):
        def accept(
            self, context: StepContext, tree: TokenTree, logits: torch.Tensor
        ) -> Acceptance:
            assert float(logits[0, 0, 0]) < 1e9  # waits for the device
            return super().accept(context, tree, logits)

    if exact.kernels.impl != "triton":
        pytest.skip("graphs are captured over the kernels only")
    plain, _ = decode(exact, NoDrafter(), None, batch_size=2)
    decoder = new_decoder(exact, NoDrafter(), None, batch_size=2, rule=Waiting())
    prompts = prompts_of(exact)
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=NEW) for i, ids in enumerate(prompts)]
    done = {s.request.id: s.output_ids for s in decoder.run(requests)}
    assert [done[i] for i in range(len(prompts))] == outputs_of(plain)
    assert decoder.graphs.obstacle


def test_a_recursive_rule_over_trees_of_the_host(exact: PagedLM) -> None:
    """Where nothing matches there is no proposal, while the next tree has one."""
    drafter, tree = NGram(), Dynamic(budget=6, children="sample")
    decoder = new_decoder(exact, drafter, tree, batch_size=2, temperature=1.0)
    prompts = prompts_of(exact)
    decoder.warm_up(prompts[0])
    requests = [Request(id=i, prompt_ids=ids, max_new_tokens=NEW) for i, ids in enumerate(prompts)]
    outputs = {s.request.id: s.output_ids for s in decoder.run(requests)}
    again, _ = decode(exact, drafter, tree, batch_size=1, temperature=1.0)
    assert [outputs[i] for i in range(len(prompts))] == outputs_of(again)
