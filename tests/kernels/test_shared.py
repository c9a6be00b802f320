"""The sum over ranks inside `add_norm`: in the interpreter, one rank after the other, whose flags
the other has set beforehand. That two wait for each other is for two GPUs to show
(`specdec.experiments.bench.ranks`)."""

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.layer import add_norm
from specdec.kernels.gpu.shared import FLAG_BYTES, PART_BYTES, Everyone, SharedParts
from specdec.kernels.gpu.stream import choose_stream
from specdec.models.shards import Shared
from specdec.ranks import Ranks
from tests.kernels.memory import DEVICE

ROWS, HIDDEN, OFFSET = 3, 80, 512


def memory_of(parts: Tensor, rank: int, ranks: int) -> Tensor:
    """Of a rank, with its parts [S, M, H], and the flags that all others have set."""
    memory = torch.zeros(OFFSET + parts.nbytes, dtype=torch.uint8)
    flags = memory[: ROWS * ranks * FLAG_BYTES].view(torch.int32).view(ROWS, ranks)
    flags[:] = 1
    flags[:, rank] = 0
    memory[OFFSET:].view(parts.dtype).view(parts.shape).copy_(parts)
    return memory


@pytest.mark.skipif(DEVICE.type == "cuda", reason="ranks in turns would wait for ever")
@pytest.mark.parametrize(("ranks", "splits"), [(2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_ranks(ranks: int, splits: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(ranks)
    parts = torch.randn(ranks, splits, ROWS, HIDDEN, generator=random).to(dtype)
    residual = torch.randn(ROWS, HIDDEN, generator=random).bfloat16()
    weight, bias = torch.randn(2, HIDDEN, generator=random).bfloat16()
    together = add_norm(residual, parts.flatten(0, 1), weight, 1e-5, bias)
    exactly = reference.add_norm(
        residual.double(), parts.flatten(0, 1).double(), weight.double(), 1e-5, bias.double()
    )
    for rank in range(ranks):
        memories = [memory_of(parts[one], one, ranks) for one in range(ranks)]
        for one in range(ranks):  # theirs are as they were made: those of this rank not yet set
            flags = memories[one][: ROWS * ranks * FLAG_BYTES].view(torch.int32)
            if one != rank:
                flags.view(ROWS, ranks)[:, rank] = 0
        table = torch.tensor([memory.data_ptr() for memory in memories])
        own = memories[rank][OFFSET:].view(dtype).view(parts[rank].shape)
        everyone = Everyone(table.data_ptr(), OFFSET, rank, ranks)
        found = add_norm(residual, own, weight, 1e-5, bias, everyone=everyone)
        for ours, theirs, exact in zip(found, together, exactly, strict=True):
            assert torch.equal(ours, theirs)  # the same numbers in the same order
            torch.testing.assert_close(ours.double(), exact, rtol=2**-6, atol=0.02)  # bfloat16
        for one, memory in enumerate(memories):
            flags = memory[: ROWS * ranks * FLAG_BYTES].view(torch.int32).view(ROWS, ranks)
            assert int(flags[:, rank].sum()) == (0 if one == rank else ROWS)  # told each other
            assert one != rank or not flags.any()  # what it has waited for is taken down


class Planned(SharedParts):
    """Without GPUs."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self._turn = 0, size, 0
        self._flags = self.ROWS * size * FLAG_BYTES
        self._memory = torch.zeros(self._flags + 2 * PART_BYTES, dtype=torch.uint8)
        self._handle = type("Handle", (), {"buffer_ptrs_dev": 7})


@pytest.mark.parametrize("hidden", [4096, 8192, 5120])
def test_parts_of_every_product_have_room(hidden: int) -> None:
    memory = Planned(8)
    for rows in (1, 16, 17, 64):
        assert memory.fits(rows, hidden)
        for inputs in (512, 2048, 7168, 14336):
            for dtype in (torch.bfloat16, torch.float32):
                for exact in (False, True):
                    stream = choose_stream(
                        rows=rows,
                        outputs=hidden,
                        inputs=inputs,
                        dtype=dtype,
                        whole=False,
                        exact=exact,
                    )
                    memory.place((stream.splits, rows, hidden), torch.float32)
    assert not memory.fits(65, hidden)


def test_products_take_turns_and_are_found_again() -> None:
    memory = Planned(2)
    first, second = (memory.place((2, 3, 64), torch.float32) for _ in range(2))
    assert memory.of(first) == Everyone(7, 64 * 2 * 4, 0, 2)
    assert memory.of(second) == Everyone(7, 64 * 2 * 4 + PART_BYTES, 0, 2)
    assert memory.place((1, 1, 64), torch.bfloat16).data_ptr() == first.data_ptr()
    assert memory.of(torch.zeros(2, 3, 64)) is None
    assert memory.of(None) is None
    with pytest.raises(RuntimeError, match="exceed"):
        memory.place((9, 64, 8192), torch.float32)
    assert Shared(reference, Ranks(), 8, torch.device("cpu"))._parts is None
