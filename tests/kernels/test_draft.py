"""What drafting takes, in both implementations: random numbers, most probable tokens, and the
choice among the nodes of a growing tree."""

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.kernels.gpu import growth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEAD = float("-inf")

both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])


# Random numbers


def by_numpy(key: tuple[int, int, int], stream: int, count: int) -> list[float]:
    seed, sequence, step = key
    bits = np.random.Philox(
        key=np.array([seed, sequence], np.uint64),
        counter=np.array([0, 0, stream, step], np.uint64),
    )
    return np.random.Generator(bits).random(count).tolist()


KEYS = [(0, 0, 0), (7, 2**32 + 5, 3), (2**64 - 1, 2**63, 2**40), (2**63, 2**64 - 1, 2**32 - 1)]


@pytest.mark.parametrize(("stream", "count"), [(0, 1), (1, 3), (2, 4), (3, 257), (40, 1030)])
@both
def test_uniforms_are_those_of_numpy(kernels: ModuleType, stream: int, count: int) -> None:
    bits = np.array(KEYS, np.uint64).view(np.int64)
    found = kernels.uniforms(torch.from_numpy(bits).to(DEVICE), stream, count)
    assert found.dtype == torch.float64
    assert found.tolist() == [by_numpy(key, stream, count) for key in KEYS]


# The most probable tokens


def some_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Ordinary ones, many ties with zeros of both signs, and many -inf."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[1::3] = logits[1::3].round()
    logits[1::3, ::5] = -0.0
    logits[2::3, 1:] = logits[2::3, 1:].masked_fill(logits[2::3, 1:] > -2, DEAD)
    return logits.to(dtype).to(DEVICE)


def assert_most_probable(found: tuple[Tensor, Tensor], logits: Tensor, temperature: float) -> None:
    ids, probs = found
    assert (ids.dtype, probs.dtype) == (torch.int64, torch.float32)
    wide = logits.double()
    expected = (wide / temperature).softmax(1)
    for row, (numbers, chosen) in enumerate(zip(wide.tolist(), ids.tolist(), strict=True)):
        order = sorted(range(len(numbers)), key=lambda token: (-numbers[token], token))
        assert chosen == order[: len(chosen)]
        # The order in which thousands of terms are summed in float32 is the processor's matter.
        torch.testing.assert_close(
            probs[row].double(), expected[row, ids[row]], rtol=1e-5, atol=1e-30
        )


@pytest.mark.some(5)
@both
@pytest.mark.parametrize(
    ("vocab", "count"),
    [(1, 1), (7, 7), (33, 1), (100, 3), (257, 8), (1000, 5), (70, 30), (4999, 2), (9001, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_tokens(kernels: ModuleType, vocab: int, count: int, dtype: torch.dtype) -> None:
    logits = some_logits(3, vocab, dtype)
    assert_most_probable(kernels.top_tokens(logits, count, temperature=0.7), logits, 0.7)


@both
def test_top_tokens_of_the_largest_count(kernels: ModuleType) -> None:
    logits = some_logits(1, 130, torch.bfloat16)
    assert_most_probable(kernels.top_tokens(logits, 128), logits, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "count"), [(16_400, 64), (40_001, 128), (70_000, 9)])
def test_top_tokens_of_many_chunks(vocab: int, count: int) -> None:
    logits = some_logits(3, vocab, torch.bfloat16)
    assert_most_probable(gpu.top_tokens(logits, count), logits, 1.0)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("temperature", [1e-30, 5e-324])
def test_top_tokens_at_tiny_temperatures(kernels: ModuleType, temperature: float) -> None:
    """The limit, in which the most probable tokens share everything."""
    logits = torch.full((2, 300), -2.0, device=DEVICE)
    logits[0, [9, 200]], logits[1, 7:] = 3e4, DEAD
    ids, probs = kernels.top_tokens(logits, 9, temperature=temperature)
    assert ids[0, :3].tolist() == [9, 200, 0]
    assert probs[0].tolist() == [0.5] * 2 + [0.0] * 7
    torch.testing.assert_close(probs[1].tolist(), [1 / 7] * 7 + [0.0] * 2)


@both
def test_top_tokens_of_a_part_of_a_wider_tensor(kernels: ModuleType) -> None:
    wide = torch.full((4, 3, 50), 1e9, dtype=torch.float32, device=DEVICE)
    wide[:, 1, :41] = some_logits(4, 41, torch.float32)
    wide[0, 1, :41] = -7.0  # all equal
    found = kernels.top_tokens(wide[:, 1], 6, vocab=41)
    assert_most_probable(found, wide[:, 1, :41], 1.0)
    assert found[0][0].tolist() == [0, 1, 2, 3, 4, 5]


@both
@pytest.mark.parametrize("count", [0, 12])
def test_only_tokens_that_exist_can_be_asked_for(kernels: ModuleType, count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}: must be from 1 to the 11 tokens"):
        kernels.top_tokens(some_logits(2, 11, torch.float32), count)


def test_nonsense_among_logits_still_gives_tokens() -> None:
    logits = torch.full((2, 4100), float("nan"), device=DEVICE)
    logits[1] = -logits[1]
    logits[1, 4000:] = 1.0
    ids, _ = gpu.top_tokens(logits, 4)
    assert ((ids >= 0) & (ids < 4100)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())


# Growing trees

scores = st.lists(
    st.sampled_from([DEAD, -3.0, -1.0, -0.5, -0.0, 0.0]) | st.floats(-20, 0),
    min_size=1,
    max_size=90,
)


@both
@settings(max_examples=40, deadline=None, derandomize=True)
@given(row=scores, count=st.integers(0, 95))
def test_the_best_and_the_places_they_have(
    kernels: ModuleType, row: list[float], count: int
) -> None:
    batch = [row, row[::-1], [DEAD] * len(row)]
    found = kernels.best(torch.tensor(batch, dtype=torch.float64, device=DEVICE), count)
    assert found.dtype == torch.bool
    order = [sorted(range(len(row)), key=lambda i: (-each[i], i))[:count] for each in batch]
    expected = [[i in chosen for i in range(len(row))] for chosen in order]
    assert found.tolist() == expected
    for size in {min(count, len(row)), len(row)}:
        if size:
            listed = kernels.places(found, size)
            first = [sorted(range(len(row)), key=lambda i: not each[i]) for each in expected]
            assert listed.tolist() == [each[:size] for each in first]


@both
@pytest.mark.parametrize(
    "total", [65, 128, 129, 255, 256, 257, 500, pytest.param(4096, marks=pytest.mark.slow)]
)
def test_the_best_of_many(kernels: ModuleType, total: int) -> None:
    generator = torch.Generator().manual_seed(total)
    numbers = -torch.rand(2, total, generator=generator, dtype=torch.float64)
    numbers[1] = numbers[1].mul(8).round()
    found = kernels.best(numbers.to(DEVICE), 60)
    order = numbers.sort(dim=1, descending=True, stable=True).indices[:, :60]
    assert found.cpu().nonzero()[:, 1].view(2, 60).tolist() == order.sort(dim=1).values.tolist()


@pytest.mark.parametrize("total", [65, 129, 256, 257, 3000])
@pytest.mark.parametrize("block", [64, 2048])
def test_nodes_are_moved_block_by_block(
    total: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same places as all at once, and nothing beyond them."""
    monkeypatch.setattr(growth, "MOST_TOGETHER", block)
    generator = torch.Generator().manual_seed(total)
    share = torch.rand(3, total, generator=generator)
    parents = (share * torch.arange(total)).long()
    parents[:, 0] = -1
    kept = torch.rand(3, total, generator=generator) < torch.tensor([[0.1], [0.9], [0.0]])
    kept[:, 0] = True
    for node in range(1, total):  # with each node its parent
        kept[:, node] &= kept[torch.arange(3), parents[:, node]]
    tokens = torch.arange(3 * total).view(3, total)
    nodes = int(kept.sum(1).max())
    expected = reference.compact(tokens, parents, kept, nodes)
    given = tokens.to(DEVICE), parents.to(DEVICE), kept.to(DEVICE)
    for found, right in zip(gpu.compact(*given, nodes), expected, strict=True):
        assert torch.equal(found.cpu(), right)
    listed = gpu.places(given[2], min(total, 256))
    assert torch.equal(listed.cpu(), reference.places(kept, min(total, 256)))


@both
def test_scores_of_children(kernels: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(3, 10, 9, generator=generator).to(DEVICE)
    numbers[0, :, 1], numbers[1, 2, :] = 0.0, float("nan")
    numbers[2, 3, 0] = 1.0 + 1e-6
    parents = torch.rand(3, 10, generator=generator, dtype=torch.float64).log().to(DEVICE)
    parents[:, 4] = DEAD
    found = kernels.extend(parents, numbers[..., :4])
    assert found.dtype == torch.float64
    dead = (numbers[..., :4] > 0).logical_not() | (parents == DEAD)[..., None]
    assert torch.equal(found == DEAD, dead)
    expected = parents[..., None] + numbers[..., :4].double().log().clamp(max=0.0)
    torch.testing.assert_close(found[~dead], expected[~dead], rtol=1e-14, atol=1e-300)


@st.composite
def families(draw: st.DrawFn) -> tuple[list[int], list[bool], int]:
    """Parents, which nodes are kept (with their parents), and the nodes of the result."""
    total = draw(st.integers(1, 40))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, total)]
    kept = [True]
    for node in range(1, total):
        kept.append(kept[parents[node]] and draw(st.booleans()))
    return parents, kept, draw(st.integers(sum(kept), total))


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(family=families())
def test_compaction(kernels: ModuleType, family: tuple[list[int], list[bool], int]) -> None:
    parents, kept, nodes = family
    total = len(parents)
    alone = [-1, *[0] * (total - 1)], [True, *[False] * (total - 1)]
    batch = [(parents, kept), alone]
    tokens = torch.arange(100, 100 + 2 * total, device=DEVICE).view(2, total)
    found = kernels.compact(
        tokens,
        torch.tensor([each for each, _ in batch], device=DEVICE),
        torch.tensor([each for _, each in batch], device=DEVICE),
        nodes,
    )
    assert [tensor.dtype for tensor in found] == [
        torch.int64,
        torch.int32,
        torch.int32,
        torch.int64,
    ]
    for row, (old, keeps) in enumerate(batch):
        order = sorted(range(total), key=lambda node: not keeps[node])[:nodes]
        size = sum(keeps)
        new = [-1 if old[node] < 0 else order.index(old[node]) for node in order[:size]]
        assert found[0][row].tolist() == [100 + row * total + node for node in order]
        assert found[1][row].tolist() == new + [-2] * (nodes - size)
        assert int(found[2][row]) == size
        assert found[3][row].tolist() == order
