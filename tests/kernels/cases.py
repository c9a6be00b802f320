"""Trees and logits of acceptance rules in kernels, and how far rounding may move an answer."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.kernels.layout import DraftedTrees
from specdec.protocols import StepContext
from specdec.sampling import SamplingParams, random_keys, uniforms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """Trees in numpy: tokens, parents [B, N], size [B], logits [B, N, V], drafts [B, N, V]."""

    tokens: np.ndarray
    parents: np.ndarray
    size: np.ndarray
    logits: Tensor
    drafts: np.ndarray
    repeats: bool

    @property
    def depth(self) -> int:
        deepest = 0
        for parents in self.parents:
            depths = [0]
            for parent in parents[1:]:
                depths.append(depths[parent] + 1 if parent >= 0 else 0)
            deepest = max(deepest, *depths)
        return deepest

    def trees(self, *, support: int | None = None) -> DraftedTrees:
        """On the device. Supports are shuffled and filled up with void entries."""
        batch, nodes, vocab = self.drafts.shape
        most = int((self.drafts > 0).sum(-1).max()) if support is None else support
        ids = np.zeros((batch, nodes, most), np.int64)
        probs = np.zeros((batch, nodes, most), np.float32)
        shuffle = np.random.default_rng(0)
        for row in range(batch):
            for node in range(nodes):
                found = shuffle.permutation(np.flatnonzero(self.drafts[row, node]))
                ids[row, node] = found[0] if len(found) else vocab // 2
                ids[row, node, : len(found)] = found
                probs[row, node, : len(found)] = self.drafts[row, node, found]
        return DraftedTrees(
            tokens=torch.tensor(self.tokens, device=DEVICE),
            parents=torch.tensor(self.parents, dtype=torch.int32, device=DEVICE),
            size=torch.tensor(self.size, dtype=torch.int32, device=DEVICE),
            depth=self.depth,
            draft_ids=torch.tensor(ids, device=DEVICE),
            draft_probs=torch.tensor(probs, device=DEVICE),
            repeats=self.repeats,
        )


WORLDS = ("near", "certain", "rival", "unrelated", "equal", "disjoint", "one draft")


def distributions(
    generator: np.random.Generator, world: str, vocab: int, support: int
) -> tuple[np.ndarray, np.ndarray]:
    """[V] target and draft of one node; zeros in both of most worlds."""
    allowed = generator.permutation(vocab)[:support]
    if world == "one draft":
        allowed = allowed[:1]
    draft = np.zeros(vocab)
    draft[allowed] = generator.dirichlet(np.full(len(allowed), 0.6)).clip(1e-6)
    draft = (draft / draft.sum()).astype(np.float32).astype(np.float64)
    target = generator.dirichlet(np.full(vocab, 0.3))
    if world == "near":
        target = 0.8 * draft + 0.2 * target
    elif world == "rival":
        target[allowed] += 6.0 * generator.dirichlet(np.full(len(allowed), 0.4))
    elif world == "equal":
        target = draft
    elif world == "disjoint":
        target[allowed] = 0.0
    elif world == "certain":
        target = (np.arange(vocab) == allowed[0]).astype(float)
    else:
        target[generator.permutation(vocab)[: vocab // 4]] = 0.0
    total = target.sum()
    return (target / total if total else np.full(vocab, 1 / vocab)), draft


def random_case(
    seed: int,
    *,
    sizes: list[int],
    vocab: int,
    support: int,
    repeats: bool,
    dtype: torch.dtype,
    temperature: float = 1.0,
    bushy: float = 0.5,
    star: bool = False,
    fan: int = 0,
) -> Case:
    """Trees of these sizes whose children are drawn from the drafts, in one padded batch.

    Args:
        bushy: how often a node grows on any earlier node instead of the last.
        star: all nodes grow on the root.
        fan: so many children of every node instead, level by level, but for the last eight nodes,
            each of which grows on the one before it.
    """
    generator = np.random.default_rng(seed)
    batch, nodes = len(sizes), max(sizes)
    tokens = generator.integers(vocab, size=(batch, nodes))
    parents = np.full((batch, nodes), -2)
    targets = np.full((batch, nodes, vocab), 1 / vocab)
    drafts = np.zeros((batch, nodes, vocab))
    for row, size in enumerate(sizes):
        left = {}
        for node in range(size):
            world = WORLDS[generator.integers(len(WORLDS)) if node else row % 3]
            if star and node == 0:
                world = ("rival", "unrelated")[row % 2]
            targets[row, node], drafts[row, node] = distributions(generator, world, vocab, support)
            left[node] = drafts[row, node].copy()
            if node == 0:
                parents[row, 0] = -1
                continue
            parent = int(generator.integers(node)) if generator.random() < bushy else node - 1
            parent = 0 if star else parent
            if fan and node < size - 8:
                parent = (node - 1) // fan
            elif fan:
                parent = node - 1
            while left[parent].sum() == 0:  # no token is left to draw
                parent = int(generator.integers(node))
            token = generator.choice(vocab, p=left[parent] / left[parent].sum())
            if not repeats:
                left[parent][token] = 0.0
            parents[row, node], tokens[row, node] = parent, token
        childless = np.setdiff1d(np.arange(nodes), parents[row])
        drafts[row, childless] = 0.0
    with np.errstate(divide="ignore"):
        logits = torch.tensor(np.log(targets) * temperature).to(dtype)
    return Case(tokens, parents, np.array(sizes), logits.to(DEVICE), drafts, repeats)


def context_for(params: SamplingParams, batch: int, step: int, kernels: ModuleType) -> StepContext:
    ids, steps = list(range(batch)), [step] * batch

    def draws(stream: int, count: int) -> Tensor:
        return uniforms(params.seed, ids, steps, stream, count).to(DEVICE)

    return StepContext(
        sequences=[],
        roots=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
        sampling=params,
        uniforms=draws,
        kernels=kernels,
        keys=random_keys(params.seed, ids, steps, DEVICE),
    )


SEED = 5
BIT = 2.0**-23  # of float32
FEW = 8  # times the largest change seen


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


def keys_at(step: int, batch: int) -> Tensor:
    return random_keys(SEED, list(range(batch)), [step] * batch, DEVICE)
