"""Tree structure of both implementations against a walk in plain Python."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import gpu, reference
from specdec.kernels.layout import TreeStructure, unpack_bits, words
from specdec.kernels.reference import tree_structure
from tests.kernels.reference_cases import ancestors_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
GUARD = 1024
both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])


def random_parents(nodes: int, size: int, reach: int, generator: torch.Generator) -> list[int]:
    """A random tree of `size` nodes, then padding; a node's parent is one of the `reach` nodes
    before it."""
    tree = [
        int(torch.randint(max(0, i - reach), i, (1,), generator=generator)) for i in range(1, size)
    ]
    return [*[-1][:size], *tree, *[-2] * (nodes - size)]


def forest(nodes: int) -> list[list[int]]:
    """A bush, a deep tree, one with padding, the root alone and an idle row."""
    generator = torch.Generator().manual_seed(nodes)
    return [
        random_parents(nodes, nodes, nodes, generator),
        random_parents(nodes, nodes, 2, generator),
        random_parents(nodes, (nodes + 1) // 2, 7, generator),
        random_parents(nodes, 1, 1, generator),
        random_parents(nodes, 0, 1, generator),
    ]


def assert_describes(found: TreeStructure, batch: list[list[int]]) -> None:
    """Every field, from the parents by walking up."""
    nodes = len(batch[0])
    assert found.ancestors.shape == (len(batch), nodes, words(nodes))
    assert found.ancestors.dtype == torch.int32
    assert found.depths.dtype == torch.int64
    lists = {name: tensor.tolist() for name, tensor in found._asdict().items()}
    for row, parents in enumerate(batch):
        for node in range(nodes):
            line = [node]
            while parents[line[-1]] >= 0:
                line.append(parents[line[-1]])
            bits = sum(
                (word % 2**32) << 32 * i for i, word in enumerate(lists["ancestors"][row][node])
            )
            assert bits == sum(1 << ancestor for ancestor in line)
            assert lists["depths"][row][node] == len(line) - 1


@pytest.mark.some(5)
@both
@pytest.mark.parametrize("nodes", SIZES)
def test_structure_equals_a_walk_to_the_root(kernels: ModuleType, nodes: int) -> None:
    batch = forest(nodes)
    parents = torch.tensor(batch, dtype=torch.int32, device=DEVICE)
    assert_describes(kernels.tree_structure(parents), batch)
    assert parents.tolist() == batch


@both
@pytest.mark.parametrize("nodes", [1, 40])
def test_parents_may_be_wide_integers(kernels: ModuleType, nodes: int) -> None:
    batch = forest(nodes)
    parents = torch.tensor(batch, dtype=torch.int64, device=DEVICE)
    assert_describes(kernels.tree_structure(parents), batch)


@pytest.mark.some(3)
@both
@pytest.mark.parametrize("nodes", [2, 33, 256])
def test_the_longest_chain_and_the_widest_star(kernels: ModuleType, nodes: int) -> None:
    batch = [list(range(-1, nodes - 1)), [-1] + [0] * (nodes - 1)]
    parents = torch.tensor(batch, dtype=torch.int32, device=DEVICE)
    assert_describes(kernels.tree_structure(parents), batch)


@both
def test_a_forest(kernels: ModuleType) -> None:
    """Several roots in a row, as the levels of a draft below a committed root are."""
    parents = torch.tensor([[-1, -1, 0, 1, 1, -1, 3]], dtype=torch.int32, device=DEVICE)
    found = kernels.tree_structure(parents)
    assert found.depths[0].tolist() == [0, 0, 1, 1, 1, 0, 2]
    assert found.ancestors[0, :, 0].tolist() == [1, 2, 0b101, 0b1010, 0b10010, 32, 0b1001010]


@both
def test_parents_may_be_a_part_of_a_wider_tensor(kernels: ModuleType) -> None:
    batch = forest(20)
    wide = torch.full((len(batch), 50), 7, dtype=torch.int32, device=DEVICE)
    wide[:, 10:30] = torch.tensor(batch, dtype=torch.int32)
    assert_describes(kernels.tree_structure(wide[:, 10:30]), batch)


@pytest.mark.parametrize("nodes", [1, 33, 65])
def test_nothing_is_written_beside_the_results(
    nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result gets a guard before and behind it, and starts out as nonsense."""
    guarded: list[tuple[Tensor, int]] = []

    def with_guards(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        memory = torch.full((count + 2 * GUARD,), -77, dtype=dtype, device=device)
        guarded.append((memory, count))
        return memory[GUARD : GUARD + count].view(shape)

    batch = forest(nodes)
    parents = torch.tensor(batch, dtype=torch.int32, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", with_guards)
        found = gpu.tree_structure(parents)
    assert_describes(found, batch)
    assert len(guarded) == len(found)
    for memory, count in guarded:
        assert (memory[:GUARD] == -77).all()
        assert (memory[GUARD + count :] == -77).all()


@pytest.mark.parametrize("parents", [[0, 1], [1, 0], [-1, 3, 3, 1], [9**9, -(9**9)]], ids=str)
def test_nonsense_does_not_hang_the_kernel(parents: list[int]) -> None:
    found = gpu.tree_structure(torch.tensor([parents], dtype=torch.int32, device=DEVICE))
    assert (found.depths < len(parents)).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_a_captured_graph_follows_new_parents() -> None:
    batch = forest(65)
    parents = torch.tensor(batch, dtype=torch.int32, device=DEVICE)
    gpu.tree_structure(parents)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.tree_structure(parents)
    for _ in range(3):
        batch = [batch[-1], *batch[:-1]]
        parents.copy_(torch.tensor(batch, dtype=torch.int32))
        graph.replay()
        assert_describes(found, batch)


@st.composite
def padded_trees(draw: st.DrawFn) -> list[list[int]]:
    """A batch of parents with padding; long chains are as likely as bushes."""
    nodes = draw(st.integers(1, 70) | st.sampled_from([127, 128, 129, 255, 256, 257]))
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, nodes))
        reach = draw(st.sampled_from([1, 2, 100]))
        tree = [draw(st.integers(max(0, i - reach), i - 1)) for i in range(1, size)]
        batch.append([*[-1][:size], *tree, *[-2] * (nodes - size)])
    return batch


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=padded_trees())
def test_structure_of_any_trees(batch: list[list[int]]) -> None:
    structure = tree_structure(torch.tensor(batch, dtype=torch.int32))
    nodes = len(batch[0])
    dense = unpack_bits(structure.ancestors, nodes)
    for row, parents in enumerate(batch):
        for node in range(nodes):
            walk = ancestors_of(parents, node)
            assert dense[row, node].nonzero().flatten().tolist() == sorted(walk)
            assert structure.depths[row, node] == len(walk) - 1


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8, 9, 16, 17, 18, 33, 128, 129, 130])
def test_structure_of_the_longest_chain(nodes: int) -> None:
    structure = tree_structure(torch.arange(-1, nodes - 1)[None])
    assert structure.depths[0].tolist() == list(range(nodes))
    dense = unpack_bits(structure.ancestors, nodes)[0]
    assert torch.equal(dense, torch.ones(nodes, nodes, dtype=torch.bool).tril())
