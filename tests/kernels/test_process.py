"""What `generate` does to logits, of both implementations against loops in float64 and against
transformers' own processors."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, generation

from specdec.kernels import gpu, reference
from specdec.kernels.gpu import process
from specdec.kernels.layout import pack_bits
from tests.kernels.cases import some_logits
from tests.kernels.memory import DEVICE, part_of_wider, poisoned_allocations
from tests.kernels.test_trees import forest

VOCAB, NODES, ROWS = 77, 6, 7  # no multiple of a word or a chunk
both = pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
OPTIONS = {
    "nothing": {"penalty": 1.0},
    "penalty": {"penalty": 1.3},
    "reward": {"penalty": 0.7, "bias": True},
    "lengths": {"penalty": 1.0, "not_before": True},
    "all": {"penalty": 1.1, "bias": True, "not_before": True},
}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROCESS_CHUNK", 32)


def case(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Arguments for a bush, a deep tree, one with padding, a root alone and an idle row. A node
    often has a token of its path, or of the text."""
    generator = torch.Generator().manual_seed(5)
    parents = torch.tensor(forest(NODES), dtype=torch.int32)
    seen = torch.rand(ROWS, VOCAB, generator=generator) < 0.2
    seen[:, [31, 32, 63, 64]] = torch.tensor([True, False, True, False])  # at the ends of words
    bias = torch.randn(VOCAB, generator=generator)
    bias[[3, 31, 76]] = -torch.inf
    not_before = torch.randint(0, 9, (2, VOCAB), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, 6, (ROWS, 2), generator=generator, dtype=torch.int32)
    given = {
        "logits": 3 * some_logits(len(parents), NODES, VOCAB, dtype),
        "tokens": torch.randint(0, VOCAB, parents.shape, generator=generator) // 8 * 8,
        "parents": parents,
        "rows": torch.tensor([4, 0, 2, 5, 6]),
        "seen": pack_bits(seen),
        "counts": counts,
        "penalty": options["penalty"],
        "bias": bias if "bias" in options else None,
        "not_before": not_before if "not_before" in options else None,
    }
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}


def expected(given: dict[str, Any]) -> Tensor:
    """Node by node and token by token."""
    out = given["logits"].double().cpu()
    host = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in given.items()}
    for b, row in enumerate(host["rows"]):
        for n in range(NODES):
            path = [n]
            while host["parents"][b][path[-1]] >= 0:
                path.append(host["parents"][b][path[-1]])
            mine = {host["tokens"][b][node] for node in path}
            new, total = (count + len(path) - 1 for count in host["counts"][row])
            for t in range(VOCAB):
                score = float(out[b, n, t])
                if host["bias"]:
                    score += host["bias"][t]
                if t in mine or host["seen"][row][t // 32] >> t % 32 & 1:
                    score = score * host["penalty"] if score < 0 else score / host["penalty"]
                least = host["not_before"] or [[0] * VOCAB] * 2
                early = new < least[0][t] or total < least[1][t]
                out[b, n, t] = -torch.inf if early else score
    return out


def call(kernels: ModuleType, given: dict[str, Any]) -> Tensor:
    found: Tensor = kernels.process_logits(**given)
    return found


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_node_is_processed_by_its_own_path(
    kernels: ModuleType, options: dict[str, Any]
) -> None:
    given = case(**options)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    with poisoned_allocations():
        found = call(kernels, given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), expected(given), rtol=2.0**-21, atol=1e-6)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


def on_host(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()
    }


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_and_reference_round_alike(dtype: torch.dtype) -> None:
    given = case(dtype, **OPTIONS["all"])
    expected = call(reference, on_host(given))  # CUDA's torch divides by a number less exactly
    assert torch.equal(call(gpu, given).cpu(), expected)
    strided = part_of_wider(given["logits"].cpu())
    assert torch.equal(call(gpu, given | {"logits": strided}).cpu(), expected)


def test_the_reference_computes_in_float64_too() -> None:
    given = on_host(case(**OPTIONS["penalty"]))
    given["logits"] = given["logits"].double()
    torch.testing.assert_close(call(reference, given).cpu(), expected(given), rtol=0, atol=0)


@both
def test_a_chain_is_processed_as_transformers_does(kernels: ModuleType) -> None:
    """Of a text that the tree continues: bias, penalty, least length, first token."""
    text, chain, ends = [5, 9, 70], [70, 12, 5, 13], torch.tensor([13, 40], device=DEVICE)
    own = LogitsProcessorList(
        [
            generation.SequenceBiasLogitsProcessor([[[12], -1.5], [[13], 2.0]]),
            generation.RepetitionPenaltyLogitsProcessor(1.2),
            generation.MinLengthLogitsProcessor(6, ends, device=str(DEVICE)),
            generation.SuppressTokensAtBeginLogitsProcessor([9, 64], 3, device=str(DEVICE)),
        ]
    )
    logits = 3 * some_logits(1, len(chain), VOCAB, torch.float32)
    theirs = [
        own(torch.tensor([text + chain[1 : 1 + n]], device=DEVICE), logits[:, n])
        for n in range(len(chain))
    ]
    seen = torch.zeros(1, VOCAB, dtype=torch.bool, device=DEVICE)
    seen[0, text] = True
    bias, not_before = torch.zeros(VOCAB), torch.zeros(2, VOCAB, dtype=torch.int32)
    bias[[12, 13]] = torch.tensor([-1.5, 2.0])
    not_before[0, [9, 64]], not_before[1, [13, 40]] = 1, 6
    found = kernels.process_logits(
        logits,
        torch.tensor([chain], device=DEVICE),
        torch.arange(-1, len(chain) - 1, device=DEVICE)[None],
        torch.tensor([0], device=DEVICE),
        pack_bits(seen),
        torch.tensor([[0, len(text)]], dtype=torch.int32, device=DEVICE),
        penalty=1.2,
        bias=bias.to(DEVICE),
        not_before=not_before.to(DEVICE),
    )
    torch.testing.assert_close(found[0], torch.cat(theirs), rtol=2.0**-22, atol=0)


@both
def test_new_tokens_are_noted(kernels: ModuleType) -> None:
    """Of several sequences, one of them idle, whose places past their length hold anything."""
    known = [{5}, {0, 31}, set(), {76}]
    seen = torch.zeros(4, VOCAB, dtype=torch.bool)
    for row, tokens in enumerate(known):
        seen[row, list(tokens)] = True
    packed = pack_bits(seen).to(DEVICE)
    counts = torch.tensor([[0, 9], [1, 3], [7, 7], [2, 2]], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([[32, 31, 63, 64], [5, 1, 2, 3], [6, 6, 6, 6], [4, 4, 4, 4]])
    length, rows = torch.tensor([4, 1, 0, 0]), torch.tensor([1, 0, 3, 3])
    kernels.note_tokens(packed, counts, rows.to(DEVICE), tokens.to(DEVICE), length.to(DEVICE))
    known[1] |= {32, 31, 63, 64}
    words = [[t for t in range(96) if row[t // 32] >> t % 32 & 1] for row in packed.tolist()]
    assert [set(found) for found in words] == known
    assert counts.tolist() == [[1, 10], [5, 7], [7, 7], [2, 2]]


def test_nonsense_does_not_hang_the_kernel() -> None:
    given = case(**OPTIONS["all"])
    given["parents"] = given["parents"].fill_(9**9)
    call(gpu, given)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an NVIDIA GPU")
def test_a_captured_graph_follows_what_a_sequence_has() -> None:
    given = case(**OPTIONS["all"])
    new = torch.tensor([[8], [9], [10], [16], [0]], device=DEVICE)
    length = torch.tensor([1, 1, 1, 1, 0], device=DEVICE)

    def step() -> Tensor:
        found = call(gpu, given)
        gpu.note_tokens(given["seen"], given["counts"], given["rows"], new, length)
        return found

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        wanted = expected(given)
        graph.replay()
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=2.0**-21, atol=1e-6)
        new.add_(7)
