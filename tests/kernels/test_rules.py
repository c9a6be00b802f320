"""Acceptance rules with kernels keep what they keep without."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.host import HostDrafter
from specdec.drafters.trees.static import Static
from specdec.kernels import gpu, reference
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import DraftedTrees
from specdec.protocols import AcceptanceRule, StepContext
from specdec.request import Decoding
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, SamplingParams
from specdec.tree import Acceptance, Children, Proposal, TokenTree
from specdec.verifier.block import Block
from specdec.verifier.greedy import Greedy
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical
from tests.decoding import FakeVerifier, decoder_of, requests_of
from tests.kernels.cases import DEVICE, Case, context_for, keys_at, random_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities


@pytest.mark.some(2)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, top_k=3),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, seed=4),
    ],
    ids=["greedy", "tempered", "filtered"],
)
@pytest.mark.parametrize(
    "rule", [Greedy(), TargetOnly(), RecursiveRejection()], ids=lambda rule: rule.name
)
def test_rules_that_are_kernels_keep_the_same(
    rule: AcceptanceRule, params: SamplingParams
) -> None:
    case = random_case(
        9, sizes=[7, 0, 4, 1], vocab=70, support=6, repeats=True, dtype=torch.float32
    )
    drafted = case.trees()
    assert drafted.draft_ids is not None
    assert drafted.draft_probs is not None
    tree = TokenTree(
        tokens=drafted.tokens,
        parents=drafted.parents,
        size=drafted.size,
        depth=drafted.depth,
        proposal=Proposal(
            ids=drafted.draft_ids, probs=drafted.draft_probs, children="sample_with_replacement"
        ),
    )
    gpu = Kernels(impl="triton").on(DEVICE)
    for step in range(2):
        plain = rule.accept(context_for(params, 4, step, reference), tree, case.logits)
        found = rule.accept(context_for(params, 4, step, gpu), tree, case.logits)
        busy = tree.size > 0
        assert torch.equal(found.length, plain.length)
        past = torch.arange(plain.path.shape[1], device=DEVICE) >= plain.length[:, None]
        assert ((found.path == plain.path) | past)[busy].all()
        assert torch.equal(found.next_token[busy], plain.next_token[busy])


class Bigrams(FakeVerifier):
    """A target whose next token depends on the last one alone."""

    def __init__(self, vocab: int, kernels: Kernels) -> None:
        super().__init__(device=DEVICE, kernels=kernels, max_context=64)
        generator = torch.Generator().manual_seed(2)
        self.table = 2.0 * torch.randn(vocab, vocab, generator=generator).to(DEVICE)

    def logits(self, context: StepContext, tree: TokenTree) -> Tensor:
        return self.table[tree.tokens]


class Guesses(HostDrafter):
    """Every token of the vocabulary again, in an order that depends on the last one."""

    def propose(self, sequence: Decoding, levels: int) -> Iterator[tuple[list[int], float]]:
        last = sequence.tokens[-1]
        for i in range(6):
            yield [(last + i + k) % 12 for k in range(levels)], 1.0 + i


@pytest.mark.some(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [TargetOnly(), RecursiveRejection()], ids=lambda rule: rule.name)
def test_the_loop_gives_the_same_with_and_without_kernels(
    rule: AcceptanceRule, temperature: float
) -> None:
    outputs, accepted = {}, 0
    for impl in ("triton", "reference"):
        decoder = decoder_of(
            Bigrams(12, Kernels(impl=impl)),
            Guesses(),
            Static(widths=[2, 1], children="sample"),
            rule,
            temperature=temperature,
            seed=5,
            rows=2,
            max_tokens=64,
        )
        requests = requests_of([[i, 3] for i in range(3)], 5)
        done = sorted(decoder.run(requests), key=lambda s: s.request.id)
        outputs[impl] = [sequence.output_ids for sequence in done]
        accepted += sum(max(sequence.accepted_lengths) > 1 for sequence in done)
    assert outputs["triton"] == outputs["reference"]
    assert accepted


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
RULES: list[tuple[AcceptanceRule, Children, float]] = [
    (Traversal(), "sample", 0.5),
    (Traversal(), "sample_with_replacement", 0.5),
    (Hsd(), "sample", 0.5),
    (Hsd(), "sample_with_replacement", 0.5),
    (Block(), "sample", 0.0),
    (KSeq(), "sample_with_replacement", 0.5),
    (MultiPath(), "sample_with_replacement", 0.5),
    (Tokenwise(), "sample", 0.0),
    (Typical(), "sample", 0.5),
    (Relaxed(top_n=2, delta=0.4), "sample", 0.5),
]
RULE_NAMES = [f"{rule.name} {children}" for rule, children, _ in RULES]


def tree_of(case: Case, children: Children, support: int | None = None) -> TokenTree:
    trees = case.trees(support=support)
    assert trees.draft_ids is not None
    assert trees.draft_probs is not None
    proposal = Proposal(ids=trees.draft_ids, probs=trees.draft_probs, children=children)
    return TokenTree(
        tokens=trees.tokens,
        parents=trees.parents,
        size=trees.size,
        depth=trees.depth,
        proposal=proposal,
    )


def rows_that_differ(found: Acceptance, expected: Acceptance, tree: TokenTree) -> int:
    inside = torch.arange(found.path.shape[1], device=DEVICE) < expected.length[:, None]
    differ = ((found.path != expected.path) & inside).any(1)
    differ |= (found.length != expected.length) | (found.next_token != expected.next_token)
    return int((differ & (tree.size > 0)).sum())


@pytest.mark.some(3)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, seed=4),
    ],
    ids=["tempered", "filtered"],
)
@pytest.mark.parametrize(("rule", "children", "bushy"), RULES, ids=RULE_NAMES)
def test_a_rule_keeps_the_same_with_and_without_kernels(
    rule: AcceptanceRule, children: Children, bushy: float, params: SamplingParams
) -> None:
    case = random_case(
        9,
        sizes=[6, 0, 4],
        vocab=70,
        support=6,
        repeats=children == "sample_with_replacement",
        dtype=torch.float32,
        bushy=bushy,
    )
    tree, kept = tree_of(case, children), 0
    for step in range(2):
        plain = rule.accept(context_for(params, 3, step, reference), tree, case.logits)
        found = rule.accept(context_for(params, 3, step, gpu), tree, case.logits)
        assert rows_that_differ(found, plain, tree) == 0
        assert found.length[1] == 0
        assert ((found.next_token >= 0) & (found.next_token < 70)).all()
        kept = max(kept, int(plain.length.max()))
    assert kept > 1


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [129, 257])
@pytest.mark.parametrize(("rule", "children", "bushy"), RULES, ids=RULE_NAMES)
def test_a_rule_keeps_the_same_of_a_wide_tree(
    rule: AcceptanceRule, children: Children, bushy: float, nodes: int
) -> None:
    """Of a chain, as deep as may be, in a batch padded to that size."""
    case = random_case(
        nodes,
        sizes=[nodes] if bushy else [65],
        vocab=20,
        support=12,
        repeats=children == "sample_with_replacement",
        dtype=torch.float32,
        bushy=bushy,
        fan=8 if bushy else 0,
    )
    tree = tree_of(case, children).padded(1, nodes)
    logits = torch.nn.functional.pad(case.logits, (0, 0, 0, nodes - case.logits.shape[1]))
    params = SamplingParams(temperature=0.8, seed=3)
    plain = rule.accept(context_for(params, 1, 0, reference), tree, logits)
    found = rule.accept(context_for(params, 1, 0, gpu), tree, logits)
    assert rows_that_differ(found, plain, tree) == 0
    assert found.path.shape == (1, 65)


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement", None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_kernel_is_handed_the_trees_and_how_they_were_drawn(
    children: Children | None, temperature: float
) -> None:
    case = random_case(2, sizes=[4, 2], vocab=9, support=3, repeats=False, dtype=torch.float32)
    tree = tree_of(case, children or "top_k")
    if children is None:
        tree = replace(tree, proposal=None)
    handed: list[tuple[DraftedTrees, Tensor, dict[str, Any]]] = []

    def kernel(trees: DraftedTrees, logits: Tensor, **more: Any) -> tuple[Tensor, ...]:
        handed.append((trees, logits, more))
        return trees.tokens, trees.size, trees.parents

    kernels = ModuleType("kernels")
    vars(kernels).update(RULES={"greedy": kernel, "target_only": kernel})
    context = context_for(SamplingParams(temperature=temperature), 2, 0, kernels)
    kept = TargetOnly().accept(context, tree, case.logits)
    ((trees, logits, more),) = handed
    assert kept.path is trees.tokens is tree.tokens
    assert kept.length is trees.size is tree.size
    assert kept.next_token is trees.parents is tree.parents
    assert trees.depth == tree.depth
    assert trees.repeats == (children == "sample_with_replacement")
    proposal = tree.proposal
    assert trees.draft_ids is (None if proposal is None else proposal.ids)
    assert trees.draft_probs is (None if proposal is None else proposal.probs)
    assert torch.equal(logits, case.logits)
    assert more["temperature"] == (temperature or 1.0)
    assert more["keys"] is context.keys
    assert more["streams"] == (ACCEPT_STREAM, TOKEN_STREAM)


@pytest.mark.parametrize("temperature", [1e-30, 5e-324])
@pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
def test_tiny_temperatures_give_the_limit(kernels: ModuleType, temperature: float) -> None:
    """What is kept is what the target finds most probable; where nothing else is left, too."""
    generator = torch.Generator().manual_seed(3)
    logits = (2e4 * torch.randn(2, 3, 70, generator=generator)).to(DEVICE)
    logits[:, :, :5] = 1e5  # which share everything
    size = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    law = kernels.target_law(logits, size, temperature=temperature, entropy=True)
    assert law.total[0].tolist() == [5.0] * 3
    torch.testing.assert_close(law.entropy[0], torch.full((3,), math.log(5.0), device=DEVICE))
    ids = torch.tensor([0, 4, 5, 69], device=DEVICE).expand(2, 3, 4)
    expected = torch.tensor([0.2, 0.2, 0.0, 0.0], device=DEVICE)
    torch.testing.assert_close(kernels.masses(logits, law, ids)[0], expected.expand(3, 4))
    drawn = kernels.draw_rest(
        logits,
        law,
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
        size.long(),
        ids=torch.arange(4, device=DEVICE).expand(2, 4),
        taken=torch.full((2, 4), 0.2, device=DEVICE),
        keys=keys_at(0, 2),
        stream=1,
    )
    assert drawn.tolist() == [4, 4]
    tree = TokenTree(
        tokens=torch.tensor([[9, 3, 8], [9, 60, 0]], device=DEVICE),
        parents=torch.tensor([[-1, 0, 1], [-1, 0, -2]], dtype=torch.int32, device=DEVICE),
        size=size,
        depth=2,
        proposal=None,
    )
    params = SamplingParams(temperature=temperature, seed=2)
    for step in range(2):
        kept = TargetOnly().accept(context_for(params, 2, step, kernels), tree, logits)
        assert kept.length[1] == 1
        assert ((kept.next_token >= 0) & (kept.next_token < 5)).all()


# On a GPU


def big_case(seed: int, batch: int, children: Children, bushy: float, vocab: int) -> Case:
    return random_case(
        seed,
        sizes=[64] + [20] * (batch - 1),
        vocab=vocab,
        support=64,
        repeats=children == "sample_with_replacement",
        dtype=torch.bfloat16,
        bushy=0.8 if bushy else 0.0,
    )


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("rule", "children", "bushy"), RULES, ids=RULE_NAMES)
def test_a_large_vocabulary(
    rule: AcceptanceRule, children: Children, bushy: float, batch: int
) -> None:
    """In float64 the definition may decide a close call otherwise; of 40 or so, one."""
    case = big_case(20, batch, children, bushy, 128_256)
    tree, params = tree_of(case, children, 64), SamplingParams(temperature=0.8, seed=3)
    differ, lengths = 0, set()
    for step in range(5):
        context = context_for(params, batch, step, reference)
        plain = rule.accept(context, tree, case.logits.double())
        found = rule.accept(context_for(params, batch, step, gpu), tree, case.logits)
        differ += rows_that_differ(found, plain, tree)
        lengths.update(found.length.tolist())
    assert differ <= 1
    assert max(lengths) > 1


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "children", "bushy"), RULES, ids=RULE_NAMES)
def test_a_captured_graph_follows_new_inputs(
    rule: AcceptanceRule, children: Children, bushy: float
) -> None:
    """New logits, keys and trees in the same tensors; four replays, which reuse their scratch."""
    cases = [big_case(seed, 3, children, bushy, 5000) for seed in range(4)]
    trees = [tree_of(case, children, 64) for case in cases]
    keys = [keys_at(step, 3) for step in range(4)]
    depth = max(tree.depth for tree in trees)
    params = SamplingParams(temperature=0.9)

    def call(tree: TokenTree, logits: Tensor, key: Tensor) -> list[Tensor]:
        assert tree.proposal is not None
        tree = TokenTree(
            tokens=tree.tokens,
            parents=tree.parents,
            size=tree.size,
            depth=depth,
            proposal=tree.proposal,
        )
        context = StepContext(
            sequences=[],
            roots=tree.tokens[:, 0],
            sampling=params,
            uniforms=partial(gpu.uniforms, key),
            kernels=gpu,
            keys=key,
        )
        kept = rule.accept(context, tree, logits)
        return [kept.path, kept.length, kept.next_token]

    held, logits, key = trees[0].to(DEVICE), cases[0].logits.clone(), keys[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(held, logits, key)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held, logits, key)
    outcomes = set()
    for case, tree, new in zip(cases, trees, keys, strict=True):
        for old, value in zip(held.tensors(), tree.tensors(), strict=True):
            old.copy_(value)
        logits.copy_(case.logits)
        key.copy_(new)
        graph.replay()
        expected = call(tree, case.logits, new)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)
        outcomes.add(str(expected))
    assert len(outcomes) == 4
