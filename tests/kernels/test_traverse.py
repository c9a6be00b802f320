"""Traversal and divisors in kernels, against the definitions in float64."""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.sampling import ACCEPT_STREAM, uniforms
from tests.kernels.cases import BIT, DEVICE, SEED, Case, guards, random_case, same, slack

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


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


@pytest.mark.some(3)
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
    last, left, chance = judged.by(
        gpu, torch.full((3, 1), 0.99, dtype=torch.float64, device=DEVICE)
    )
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


@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
@pytest.mark.parametrize(
    "nodes", [129, *(pytest.param(n, marks=pytest.mark.slow) for n in (65, 128, 255, 256, 257))]
)
def test_traversal_of_wide_trees(nodes: int, repeats: bool) -> None:
    case = random_case(
        nodes,
        sizes=[nodes],
        vocab=20,
        support=9,
        repeats=repeats,
        dtype=torch.float32,
        fan=8,
    )
    judged, _ = check_traversal(case, low=0.9)
    assert judged > 1


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
