"""What acceptance rules compute in kernels, against the torch definitions in float64.

A comparison with a random number may go either way where rounding decides it. How far rounding
reaches is found by running the definition on inputs that are changed in their last bit; coins are
then chosen so that none falls that near.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import rules as rule_steps
from specdec.experiments.bench import run
from specdec.experiments.figures import kernels as tables
from specdec.kernels import gpu, reference
from specdec.kernels.gpu import race, scan, softmax
from specdec.kernels.layout import TargetLaw
from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, SamplingParams, random_keys, uniforms
from specdec.tree import Acceptance, Children, Proposal, TokenTree
from specdec.verifier.block import Block
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical
from tests.kernels.test_kernels_accept import Case, context_for, random_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 5
BIT = 2.0**-23  # of float32
FEW = 8  # times the largest change seen
ALL = 2.0  # more than a token can have
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of even a small vocabulary."""
    monkeypatch.setattr(scan, "SCAN_BYTES", 128)
    monkeypatch.setattr(race, "RACE_CHUNK", 32)
    monkeypatch.setattr(softmax, "SUPPORT_BLOCK", 4)


def nudged(numbers: Tensor, seed: int) -> Tensor:
    """Changed by up to a bit of float32."""
    generator = torch.Generator(numbers.device).manual_seed(seed)
    noise = torch.rand(
        numbers.shape, generator=generator, dtype=numbers.dtype, device=numbers.device
    )
    return numbers * (1.0 + BIT * (2.0 * noise - 1.0))


def slack(define: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(What the definition gives; how far rounding of its inputs moves each number of it.)"""
    answer = define(*inputs)
    change = torch.zeros_like(answer)
    for seed in range(3):
        moved = define(*(nudged(numbers, seed) for numbers in inputs))
        change = torch.maximum(change, (moved - answer).abs().nan_to_num(nan=0.0))
    return answer, FEW * (change + BIT)


@contextmanager
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block every new tensor is full of NaN or absurd numbers, and stands between two
    guards that must be intact at the end."""
    made: list[tuple[Tensor, int]] = []
    zeros = torch.zeros

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        whole = zeros(count + 128, dtype=dtype, device=device)
        whole.fill_(float("nan") if dtype.is_floating_point else -123456)
        made.append((whole, count))
        return whole[64 : 64 + count].view(shape)

    def empty_like(other: Tensor) -> Tensor:
        return empty(*other.shape, dtype=other.dtype, device=other.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert made
    for whole, count in made:
        for guard in (whole[:64], whole[64 + count :]):
            intact = guard.isnan() if guard.is_floating_point() else guard == -123456
            assert intact.all()


def same(found: Any, expected: Any) -> bool:
    """To the bit, where there is a number at all."""
    return all(
        torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
        for a, b in zip(found, expected, strict=True)
        if isinstance(a, Tensor)
    )


# The law of the target


def some_logits(batch: int, nodes: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Wide and narrow ones, some without many tokens, one with a single token."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(batch, nodes, vocab, generator=generator)
    logits *= torch.tensor([0.5, 3.0, 9.0])[torch.arange(batch * nodes).view(batch, nodes) % 3][
        ..., None
    ]
    logits[:, 1::2, vocab // 3 :] = float("-inf")
    logits[0, -1] = float("-inf")
    logits[0, -1, vocab // 2] = 1.0
    return logits.to(dtype).to(DEVICE)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_law_of_the_target(dtype: torch.dtype, temperature: float, entropy: bool) -> None:
    logits = some_logits(3, 4, 101, dtype)
    size = torch.tensor([4, 0, 3], dtype=torch.int32, device=DEVICE)
    real = torch.arange(4, device=DEVICE) < size[:, None]
    poisoned = logits.masked_fill(~real[..., None], float("nan"))
    found = gpu.target_law(poisoned, size, temperature=temperature, entropy=entropy)
    options: dict[str, Any] = {"temperature": temperature, "entropy": entropy}
    exact = reference.target_law(logits.double(), size, **options)
    plain = reference.target_law(logits, size, **options)
    assert found.temperature == temperature
    assert (found.entropy is not None) == entropy
    assert torch.equal(found.top[real].double(), exact.top[real])
    for name in ("top", "total", "entropy")[: 2 + entropy]:
        mine, torchs, right = (getattr(law, name) for law in (found, plain, exact))
        assert mine.dtype == torch.float32
        assert mine.isfinite().all(), name
        error, theirs = ((each.double() - right)[real].abs() for each in (mine, torchs))
        bound = 2.0 * theirs.max() + FEW * BIT * right[real].abs().max()
        assert error.max() <= bound, name


@pytest.mark.usefixtures("small_chunks")
def test_the_law_of_strided_logits() -> None:
    logits = some_logits(2, 3, 70, torch.float32)
    size = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    wide = torch.full((3, 2, 79), float("nan"), device=DEVICE)
    wide[..., :70] = logits.transpose(0, 1)
    clean = gpu.target_law(logits, size, temperature=0.8, entropy=True)
    for strided in (wide.transpose(0, 1)[..., :70], logits.mT.contiguous().mT):
        assert same(gpu.target_law(strided, size, temperature=0.8, entropy=True), clean)


# The last draw


class Rest(NamedTuple):
    """What `draw_rest` is asked; the answer of rows with a length is known, if not close."""

    logits: Tensor
    node: Tensor
    length: Tensor
    ids: Tensor
    taken: Tensor
    temperature: float
    everything: bool = False

    def draw(self, kernels: ModuleType, keys: Tensor) -> Tensor:
        size = torch.full_like(self.node, self.logits.shape[1], dtype=torch.int32)
        law = kernels.target_law(self.logits, size, temperature=self.temperature)
        return self.draw_by(kernels, law, keys)

    def draw_by(self, kernels: ModuleType, law: TargetLaw, keys: Tensor) -> Tensor:
        found: Tensor = kernels.draw_rest(
            self.logits,
            law,
            self.node,
            self.length,
            ids=self.ids,
            taken=self.taken,
            keys=keys,
            stream=TOKEN_STREAM,
        )
        return found


def some_rest(
    *, vocab: int, support: int, dtype: torch.dtype = torch.float32, everything: bool = False
) -> Rest:
    """Six rows, the fourth idle. A part, nothing or all is taken off tokens of the support, whose
    last entries are void and name tokens that others name too."""
    batch, nodes, temperature = 6, 3, 0.8
    generator = torch.Generator().manual_seed(vocab + support)
    logits = some_logits(batch, nodes, vocab, dtype)
    node = torch.tensor([0, 1, 2, 0, 1, 2], device=DEVICE)
    length = torch.tensor([1, 2, 3, 0, 1, 1], device=DEVICE)
    ids = torch.rand(batch, vocab, generator=generator).topk(support).indices.to(DEVICE)
    rows = torch.arange(batch, device=DEVICE)
    whole = (logits.double() / temperature).softmax(-1)[rows, node]
    taken = whole.gather(1, ids) * torch.rand(batch, support, generator=generator).to(DEVICE)
    taken[:, ::3] = ALL
    if everything:
        taken.fill_(ALL)
    else:
        void = max(1, support // 4)
        ids[:, -void:] = ids[:, :1]
        taken[:, -void:] = 0.0
    return Rest(logits, node, length, ids, taken.float(), temperature, everything)


def expected_tokens(rest: Rest, step: int) -> tuple[list[int], bool]:
    """In float64, with numpy's random numbers; and whether all races were won by a margin."""
    batch, _, vocab = rest.logits.shape
    rows = torch.arange(batch, device=DEVICE)
    whole = (rest.logits.double() / rest.temperature).softmax(-1)[rows, rest.node]
    weights = whole.scatter_add(1, rest.ids, -rest.taken.double()).clamp(min=0.0)
    if rest.everything:
        weights = whole
    uniform = uniforms(SEED, range(batch), [step] * batch, TOKEN_STREAM, vocab).to(DEVICE)
    times = -torch.log1p(-uniform) / weights
    (first, second), order = times.sort(1).values[:, :2].unbind(1), times.argsort(1)
    clear = ((second - first) > 1e-4 * first) | second.isinf()
    tokens = torch.where(rest.length > 0, order[:, 0], 0)
    return tokens.tolist(), bool((clear | (rest.length == 0)).all())


def keys_at(step: int, batch: int) -> Tensor:
    return random_keys(SEED, list(range(batch)), [step] * batch, DEVICE)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("vocab", "support", "dtype", "everything"),
    [
        (101, 7, torch.float32, False),
        (33, 33, torch.bfloat16, False),
        (128, 4, torch.float16, False),
        (7, 1, torch.float32, False),
        (20, 20, torch.float32, True),
    ],
    ids=["101 tokens", "whole vocabulary", "full chunks", "one candidate", "nothing left"],
)
def test_the_last_draw(vocab: int, support: int, dtype: torch.dtype, everything: bool) -> None:
    rest = some_rest(vocab=vocab, support=support, dtype=dtype, everything=everything)
    drawn = set()
    checked = 0
    for step in range(20):
        tokens, clear = expected_tokens(rest, step)
        if not clear:
            continue
        assert rest.draw(gpu, keys_at(step, 6)).tolist() == tokens
        drawn.update(tokens)
        checked += 1
        if checked == 3:
            break
    assert checked == 3
    assert len(drawn) > 1


@pytest.mark.usefixtures("small_chunks")
def test_the_last_draw_is_that_of_the_rules_that_are_kernels() -> None:
    """Nothing is taken off the target at the root: the same numbers, the same token."""
    case = random_case(3, sizes=[1] * 6, vocab=90, support=5, repeats=False, dtype=torch.float32)
    trees, keys = case.trees(), keys_at(0, 6)
    _, length, token = gpu.RULES["target_only"](
        trees, case.logits, temperature=0.8, keys=keys, streams=(ACCEPT_STREAM, TOKEN_STREAM)
    )
    nothing = torch.zeros(6, 5, device=DEVICE)
    ids = nothing.long()
    rest = Rest(case.logits, torch.zeros_like(length), length, ids, nothing, 0.8)
    assert torch.equal(rest.draw(gpu, keys), token)


@pytest.mark.usefixtures("small_chunks")
def test_the_last_draw_reads_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided inputs, logits of other nodes and of idle rows, tensors as they come."""
    rest, keys = some_rest(vocab=70, support=9), keys_at(1, 6)
    clean = rest.draw(gpu, keys)
    at = torch.zeros(6, 3, dtype=torch.bool, device=DEVICE)
    at[torch.arange(6), rest.node] = rest.length > 0
    size = torch.full((6,), 3, dtype=torch.int32, device=DEVICE)
    law = gpu.target_law(rest.logits, size, temperature=0.8)
    poisoned = rest._replace(
        logits=rest.logits.masked_fill(~at[..., None], float("nan")).mT.contiguous().mT,
        ids=rest.ids.masked_fill(rest.length[:, None] == 0, 2**40).T.contiguous().T,
        taken=rest.taken.T.contiguous().T,
        node=rest.node.masked_fill(rest.length == 0, 2**40),
    )
    with guards(monkeypatch):
        found = poisoned.draw_by(gpu, law, keys)
    assert torch.equal(found, clean)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_last_draw_from_nonsense_is_a_token(value: float) -> None:
    rest = some_rest(vocab=40, support=5)
    nonsense = rest._replace(logits=torch.full_like(rest.logits, value))
    assert ((nonsense.draw(gpu, keys_at(0, 6)) >= 0) & (rest.draw(gpu, keys_at(0, 6)) < 40)).all()


# Traversal


class Judged(NamedTuple):
    """What `traverse` is asked, in numbers that float32 holds."""

    tokens: Tensor
    parents: Tensor
    size: Tensor
    ids: Tensor
    draft: Tensor
    target: Tensor
    repeats: bool

    @classmethod
    def of(cls, case: Case, support: int | None = None) -> "Judged":
        """Leaves have the root's draft distribution, of which nothing may come."""
        trees = case.trees(support=support)
        assert trees.draft_ids is not None
        assert trees.draft_probs is not None
        leaf = (trees.draft_probs <= 0).all(2, keepdim=True)
        ids = torch.where(leaf, trees.draft_ids[:, :1], trees.draft_ids)
        draft = torch.where(leaf, trees.draft_probs[:, :1], trees.draft_probs)
        target = case.logits.double().softmax(-1).gather(2, ids)
        target = target.masked_fill(draft <= 0, 0.0).float()
        return cls(*trees[:3], ids, draft, target, case.repeats)

    @property
    def real(self) -> Tensor:
        nodes = torch.arange(self.tokens.shape[1], device=self.size.device)
        return nodes < self.size[:, None]

    def by(self, kernels: ModuleType, coins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = kernels.traverse(
            *self[:6], coins, repeats=self.repeats
        )
        return found

    def exactly(self, coins: Tensor) -> "Verdict":
        """The answer in float64."""

        def define(draft: Tensor, target: Tensor) -> Tensor:
            exact = self._replace(draft=draft, target=target)
            return torch.cat(exact.by(reference, coins)[1:], dim=1)

        inputs = self.draft.double(), self.target.double()
        exact = self._replace(draft=inputs[0], target=inputs[1])
        last, left, chance = exact.by(reference, coins)
        _, reach = slack(define, *inputs)
        widths = [left.shape[1], chance.shape[1]]
        return Verdict(last, left, chance, *reach.split(widths, dim=1))

    def clear(self, low: float) -> tuple[Tensor, "Verdict"]:
        """Coins in [low, 1) that no rounding can turn, and what becomes of the trees."""
        batch, nodes = self.tokens.shape
        for step in range(50):
            coins = uniforms(SEED, range(batch), [step] * batch, ACCEPT_STREAM, nodes).to(DEVICE)
            coins = low + (1.0 - low) * coins
            verdict = self.exactly(coins)
            if not ((coins - verdict.chance).abs() <= verdict.chance_reach).any():
                return coins, verdict
        pytest.fail("every step was a close call")


class Verdict(NamedTuple):
    """What `traverse` answers, and how far rounding may move it."""

    last: Tensor
    left: Tensor
    chance: Tensor
    left_reach: Tensor
    chance_reach: Tensor


def check_traversal(case: Case, *, low: float, support: int | None = None) -> tuple[int, int]:
    """The kernel judges as the definition does; (nodes it has judged, rows not at the root)."""
    judged = Judged.of(case, support)
    coins, verdict = judged.clear(low)
    last, left, chance = judged.by(gpu, coins)
    busy = judged.size > 0
    assert (last.dtype, left.dtype, chance.dtype) == (torch.int64, torch.float32, torch.float32)
    assert torch.equal(last, verdict.last)
    assert torch.equal(chance.isnan(), verdict.chance.isnan())
    off = (chance.double() - verdict.chance).abs().nan_to_num(nan=0.0)
    assert (off <= verdict.chance_reach).all()
    off = (left.double() - verdict.left).abs()
    assert (off <= verdict.left_reach)[busy].all()
    assert (left >= 0).all()
    return int((~chance.isnan()).sum()), int((last > 0).sum())


TREES: dict[str, dict[str, Any]] = {
    "bushes": {"sizes": [9, 0, 6, 1, 8], "vocab": 40, "support": 7, "bushy": 0.5},
    "tall": {"sizes": [11, 9], "vocab": 30, "support": 5, "bushy": 0.25},
    "chains": {"sizes": [7, 4, 0], "vocab": 30, "support": 6, "bushy": 0.0},
    "stars": {"sizes": [6, 5, 6], "vocab": 12, "support": 7, "star": True},
    "whole vocabulary": {"sizes": [9, 9], "vocab": 4, "support": 4, "bushy": 0.7},
    "one candidate": {"sizes": [5, 3], "vocab": 9, "support": 1, "bushy": 0.0},
}


@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
@pytest.mark.parametrize("shape", TREES)
def test_traversal(shape: str, repeats: bool) -> None:
    """Once with coins of all sizes, once with large ones, which leave many rejected."""
    total, below, nodes = 0, 0, 0
    for seed, low in ((1, 0.0), (2, 0.7)):
        case = random_case(seed, repeats=repeats, dtype=torch.float32, **TREES[shape])
        support = TREES[shape]["support"] + 2 * (shape == "stars")
        judged, moved = check_traversal(case, low=low, support=support)
        total, below, nodes = total + judged, below + moved, nodes + int(case.size.sum())
    assert below > 0
    assert total > nodes // 3


def test_traversal_of_bare_roots() -> None:
    case = random_case(0, sizes=[1, 0, 1], vocab=12, support=3, repeats=False, dtype=torch.float32)
    judged = Judged.of(case, 3)
    last, left, chance = judged.by(gpu, torch.full((3, 1), 0.99, dtype=torch.float64))
    assert last.tolist() == [0, 0, 0]
    assert torch.equal(left, judged.target[:, 0])
    assert chance[[0, 2]].tolist() == [[1.0], [1.0]]
    assert chance[1].isnan().all()


def test_traversal_of_34_nodes_and_40_candidates() -> None:
    for repeats in (False, True):
        case = random_case(
            4,
            sizes=[34],
            vocab=60,
            support=40,
            repeats=repeats,
            dtype=torch.float32,
            bushy=0.6,
        )
        judged, _ = check_traversal(case, low=0.8)
        assert judged > 8


@pytest.mark.parametrize(
    "siblings", [[3, 2, 5], [3, 3, 5], [3, 7, 5], [3, 5, 3]], ids=["all", "twins", "stranger", ""]
)
@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
def test_siblings_are_tried_to_the_last(siblings: list[int], repeats: bool) -> None:
    """All that the draft knows, or one token twice, or one that is none of the draft's."""
    judged = Judged(
        tokens=torch.tensor([[9, *siblings]], device=DEVICE),
        parents=torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32, device=DEVICE),
        size=torch.tensor([4], dtype=torch.int32, device=DEVICE),
        ids=torch.tensor([3, 5, 2, 3], device=DEVICE).expand(1, 4, 4),
        draft=torch.tensor([0.5, 0.3, 0.2, 0.0], device=DEVICE).expand(1, 4, 4),
        target=torch.tensor([0.2, 0.6, 0.15, 0.0], device=DEVICE).expand(1, 4, 4),
        repeats=repeats,
    )
    coins = torch.full((1, 4), 0.97, dtype=torch.float64, device=DEVICE)
    last, left, chance = judged.by(gpu, coins)
    verdict = judged.exactly(coins)
    assert not ((verdict.chance - coins).abs() <= verdict.chance_reach).any()
    assert last.tolist() == verdict.last.tolist()
    assert torch.equal(chance.isnan(), verdict.chance.isnan())
    off = (chance.double() - verdict.chance).abs().nan_to_num(nan=0.0)
    assert (off <= verdict.chance_reach).all()
    assert ((left.double() - verdict.left).abs() <= verdict.left_reach).all()
    if siblings == [3, 2, 5] and not repeats:
        assert last.tolist() == [0]
        assert left.tolist() == [[0.0] * 4]  # all that is left lies outside the support


@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
def test_traversal_reads_what_it_should(repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the padding; strided inputs; nothing that it has not written itself."""
    case = random_case(
        6, sizes=[7, 0, 4], vocab=30, support=5, repeats=repeats, dtype=torch.float32
    )
    judged = Judged.of(case, 7)
    coins, _ = judged.clear(0.5)
    clean = judged.by(gpu, coins)
    padding = ~judged.real
    poisoned = Judged(
        tokens=judged.tokens.masked_fill(padding, 2**40).T.contiguous().T,
        parents=judged.parents.T.contiguous().T,
        size=judged.size,
        ids=judged.ids.masked_fill(padding[..., None], 2**40).mT.contiguous().mT,
        draft=judged.draft.masked_fill(padding[..., None], float("nan")).mT.contiguous().mT,
        target=judged.target.masked_fill(padding[..., None], float("nan")),
        repeats=repeats,
    )
    with guards(monkeypatch):
        found = poisoned.by(gpu, coins.masked_fill(padding, float("nan")).T.contiguous().T)
    busy = judged.size > 0
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1][busy], clean[1][busy])
    assert same(found[2:], clean[2:])


def test_traversal_of_nonsense_ends_at_a_node() -> None:
    case = random_case(8, sizes=[6, 3], vocab=20, support=4, repeats=False, dtype=torch.float32)
    judged = Judged.of(case)
    coins = torch.full(judged.tokens.shape, 0.5, dtype=torch.float64, device=DEVICE)
    for value in (float("nan"), float("inf"), 0.0):
        nothing = torch.full_like(judged.target, value)
        for changed in (judged._replace(target=nothing), judged._replace(draft=nothing)):
            last, _, _ = changed.by(gpu, coins)
            assert ((last >= 0) & (last < judged.size)).all()


# The divisor of K-SEQ


def some_divisor(nodes: int, support: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draft, target [1, N, K] and count [1, N]: near, disjoint and nearly disjoint ones."""
    generator = np.random.default_rng(support)
    draft = generator.dirichlet(np.full(support, 0.6), size=(1, nodes))
    target = generator.dirichlet(np.full(support + 3, 0.6), size=(1, nodes))[..., :support]
    target[0, 1] = 0.7 * draft[0, 1] + 0.3 * target[0, 1]
    target[0, 2] = 0.0
    target[0, 3] *= 1e-4
    target[0, 4] = draft[0, 4]
    count = torch.tensor([2, 5, 3, 40, 4, 1, 0, 7][:nodes])[None]
    return torch.tensor(draft).float(), torch.tensor(target).float(), count


@pytest.mark.parametrize("support", [1, 6, 33])
def test_divisors(support: int) -> None:
    draft, target, count = (x.to(DEVICE) for x in some_divisor(8, support))
    found = gpu.divisor(draft, target, count)
    exact, reach = slack(partial(reference.divisor, count=count), draft.double(), target.double())
    assert found.dtype == torch.float32
    # The sum of powers of 1 - overlap moves by up to count / 2 times its own size.
    reach = reach + BIT * count.clamp(min=2) * exact
    assert ((found.double() - exact).abs() <= reach).all()
    assert (found[count < 2] == 1.0).all()
    assert ((found >= 1.0) & (found <= count.clamp(min=1))).all()
    # Something is left for the next token.
    overlap = torch.minimum(draft.double(), target.double() / found.double()[..., None]).sum(-1)
    ever = 1.0 - (1.0 - overlap.clamp(max=1.0)) ** count
    assert (ever <= found * overlap * (1.0 + BIT * count.clamp(min=2)) + 1e-12)[count > 1].all()


def test_divisors_read_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target, count = (x.to(DEVICE) for x in some_divisor(8, 5))
    clean = gpu.divisor(draft, target, count)
    alone = (count < 2)[..., None]
    with guards(monkeypatch):
        found = gpu.divisor(
            draft.masked_fill(alone, float("nan")).mT.contiguous().mT,
            target.masked_fill(alone, float("nan")),
            count,
        )
    assert torch.equal(found, clean)
    nonsense = gpu.divisor(draft, torch.full_like(target, float("nan")), count)
    assert ((nonsense >= 1.0) & (nonsense <= count.clamp(min=1))).all()


# In the rules

RULES: list[tuple[AcceptanceRule, Children, float]] = [
    (Traversal(), "sample", 0.5),
    (Traversal(), "sample_with_replacement", 0.5),
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


# In the benchmark


def test_every_rule_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    options = "rules device=cpu batches=[1,2] vocabulary=90 nodes=6 candidates=5"
    monkeypatch.setattr(rule_steps, "COMPARED", 2)
    monkeypatch.setattr(rule_steps, "wall_us", lambda call: call() and 1.0)
    assert run.main([*options.split(), f"out={path}"]) == 0
    result = json.loads(path.read_text())
    names = [rule.name for rule, _, _ in rule_steps.RULES]
    assert {"traversal", "block", "k_seq", "tokenwise", "typical", "relaxed"} < set(names)
    for record in result["batches"]:
        assert list(record["operations"]) == names
        for found in record["operations"].values():
            assert found["compared"] == 2
            assert 1.0 <= found["length"] <= 6.0
    assert result["settings"]["vocabulary"] == 90
    assert result["command"].startswith("python -m specdec.experiments.bench.run rules device=cpu")
    assert tables.rules(result).endswith("| relaxed | 1.0 (1) | 1.0 (1) |")
    assert run.main(["rules", "device=cpu", "candidates=9", "vocabulary=8"]) == 2


def test_a_rule_that_disagrees_gets_no_time() -> None:
    sizes = rule_steps.Sizes(batch=2, nodes=5, candidates=4, vocabulary=80)
    inputs = rule_steps.Inputs(sizes, copies=1, dtype=torch.float32, device=DEVICE)
    tree = inputs.tree("bush", "sample")

    def roots(tree: Any, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        path = torch.zeros(2, tree.depth + 1, dtype=torch.int64, device=DEVICE)
        return path, path[:, 0] + 1, path[:, 0]

    wrong = ModuleType("wrong")
    vars(wrong).update(vars(reference) | {"RULES": {"target_only": roots}})
    found = rule_steps.time_rule(rule_steps.TargetOnly(), inputs, tree, wrong, None)
    assert "sequences differ" in found["fault"]
    assert "us" not in found


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
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
def test_traversal_of_64_nodes(repeats: bool, batch: int) -> None:
    for seed, support, bushy in ((1, 64, 0.8), (2, 64, 0.3), (3, 64, 0.0), (4, 1000, 0.8)):
        case = random_case(
            seed,
            sizes=[64, *[50, 0, 64, 33, 1, 64, 9][: batch - 1]],
            vocab=2000,
            support=support,
            repeats=repeats,
            dtype=torch.float32,
            bushy=bushy,
        )
        rejected, _ = check_traversal(case, low=0.9, support=support)
        _, kept = check_traversal(case, low=0.3, support=support)
        assert rejected > 16
        assert kept > 0 or batch == 1


@on_gpu
@pytest.mark.gpu
def test_divisors_of_many_candidates() -> None:
    for support in (64, 500, 1024):
        test_divisors(support)


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
