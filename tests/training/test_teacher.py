"""States and logits are those of the layers themselves, and lengths those of counting."""

import pytest
import torch
from torch import Tensor

from specdec.training.batches import Batch
from specdec.training.measure import lengths, whole_chains
from specdec.training.methods.head import frequent
from specdec.training.teacher import Teacher, check_taps, default_taps, norm_weight, plain
from specdec.training.trainee import rooted
from tests.training.small import VOCAB, target


@torch.no_grad()
def test_states_are_what_leaves_the_layers() -> None:
    lm = target(3)
    tokens = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    found: dict[int, Tensor] = {}
    base = lm.model.model
    hooks = [
        layer.register_forward_hook(lambda m, a, out, i=i: found.__setitem__(i + 1, out))
        for i, layer in enumerate(base.layers)
    ]
    with plain(lm.model) as model:
        states, logits = Teacher(model, (0, 2, 3, "normal"))(tokens)
    for hook in hooks:
        hook.remove()
    zero, two, three, normal = states.split(16, dim=-1)
    assert torch.equal(zero, base.embed_tokens(tokens))
    torch.testing.assert_close(two, found[2])
    torch.testing.assert_close(three, found[3])
    torch.testing.assert_close(normal, base.norm(found[3]))
    torch.testing.assert_close(logits, lm.model.lm_head(normal))
    assert lm.model.config._attn_implementation == "specdec_paged"  # as it was


def test_default_taps() -> None:
    assert default_taps(32) == (2, 16, 29)
    assert default_taps(7) == (2, 3, 4)
    assert default_taps(6) == (1, 3, 5)
    assert default_taps(4) == (1, 2, 3)
    assert [default_taps(n) for n in (1, 2, 3)] == [(0,), (1,), (1, 2)]


@pytest.mark.parametrize("taps", [[], [1, 1], [4], [-1], ["last"]])
def test_taps_that_there_are_not_are_refused(taps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^method\.taps="):
        check_taps(taps, 3)


def test_the_weight_of_the_final_norm() -> None:
    lm = target()
    torch.nn.init.normal_(lm.model.model.norm.weight)
    weight = norm_weight(lm.model)
    assert weight is not None
    torch.testing.assert_close(weight, lm.model.model.norm.weight, rtol=1e-5, atol=1e-5)


def test_the_most_frequent_tokens_by_id() -> None:
    counts = torch.tensor([3, 9, 0, 9, 3, 1])
    assert frequent(counts, 3).tolist() == [0, 1, 3]  # of two with 3 the lower id
    assert frequent(counts, 6).tolist() == list(range(6))


class Scripted:
    """Chains with known chances."""

    taps, is_target = (0,), False

    def __init__(self, agrees: Tensor, overlap: Tensor) -> None:
        self.agrees, self.overlap = agrees, overlap

    def chains(self, seen: object, depth: int) -> tuple[Tensor, Tensor]:
        return rooted(list(self.agrees)), rooted(list(self.overlap))


def test_lengths_are_sums_of_products_over_whole_chains() -> None:
    torch.manual_seed(0)
    lm = target()
    agrees, overlap = torch.rand(3, 2, 6) > 0.4, torch.rand(3, 2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    batch = Batch(tokens=torch.zeros(2, 8, dtype=torch.int64), mask=mask)
    with plain(lm.model) as model:
        found = lengths(
            Scripted(agrees, overlap), Teacher(model, (0,)), iter([batch]), 3, lm.device
        )
    roots = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1)]
    for value, chances in ((found.greedy, agrees.double()), (found.sampled, overlap.double())):
        total = 0.0
        for row, slot in roots:
            product = 1.0
            for depth in range(3):
                product *= chances[depth, row, slot + depth].item()
                total += product
        assert value == pytest.approx(1 + total / len(roots), rel=1e-5)
    assert [tuple(x) for x in whole_chains(mask, 3).nonzero().tolist()] == roots
    assert not whole_chains(mask, 7).any()
