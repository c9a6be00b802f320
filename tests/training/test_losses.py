"""Losses against closed formulas, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from specdec.training.judge import Judge
from specdec.training.losses import DSPARK, LOSSES, compare, lk, sequence_means

P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
LABELS = torch.tensor([1, 2])
SHIFT = 3.0  # of logits, which changes no distribution


def of(loss: str, names: list[int] | None = None) -> tuple[Tensor, ...]:
    ids = None if names is None else torch.tensor(names)
    drafted = Q.log() + SHIFT if names is None else Q[:, : len(names)].log()
    return compare(drafted, P.log() - SHIFT, LABELS, ids, loss)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ("kl", 0.5 * math.log(2.5) + 0.3 * math.log(0.5)),
        ("reverse_kl", 0.2 * math.log(0.4) + 0.6 * math.log(2)),
        ("tv", 0.3),
        ("ce", -math.log(0.6)),
        (DSPARK, -0.1 * math.log(0.6) + 0.9 * (0.3 + 0.3 + 0.0)),
    ],
)
def test_of_all_tokens(loss: str, wanted: float) -> None:
    value, overlap, agrees, counts = of(loss)
    of_label = {"ce": 1.0, DSPARK: 0.1}
    assert value[0].item() == pytest.approx(wanted, rel=1e-5)
    assert value[1].item() == pytest.approx(of_label.get(loss, 0) * -math.log(0.8), abs=1e-6)
    assert overlap.tolist() == pytest.approx([0.7, 1.0], rel=1e-5)
    assert agrees.tolist() == [False, True]
    assert counts.all()


def test_of_the_tokens_that_it_can_name() -> None:
    value, overlap, agrees, counts = of("kl", names=[0, 2])
    # Drafted from Q's first two columns, renormalised: 1/4 and 3/4 of the first position.
    p = [0.5 / 0.7, 0.2 / 0.7]
    assert value[0].item() == pytest.approx(
        p[0] * math.log(p[0] / 0.25) + p[1] * math.log(p[1] / 0.75), rel=1e-5
    )
    assert overlap[0].item() == pytest.approx(0.25 + 0.2, rel=1e-5)
    assert counts.tolist() == [True, True]
    assert agrees.tolist() == [False, False]  # token 2 and 0 are meant, 0 and 2 are best
    _, _, _, counts = of("kl", names=[0, 1])
    assert counts.tolist() == [True, False]  # the best token of the second has no name
    _, _, _, counts = of("ce", names=[0, 2])
    assert counts.tolist() == [False, True]  # the label of the first has none


def test_lk_goes_from_kl_to_the_overlap() -> None:
    kl, overlap = torch.tensor([2.0]), torch.tensor([0.25])
    for accepted in (0.0, 0.5, 1.0):
        share = math.exp(-3 * accepted)
        found = lk(kl, overlap, torch.tensor([accepted]))
        assert found.item() == pytest.approx(share * 2.0 + (1 - share) * 0.75)


def test_means_are_of_sequences_first() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    means, any_ = sequence_means(values, mask)
    assert means.tolist() == [1.5, 4.0, 0.0]
    assert any_.tolist() == [True, True, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_neither_losses_nor_gradients(loss: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=False).double()
    names = torch.tensor([0, 2, 3, 5, 7, 8, 9, 11, 12, 13, 14])
    outputs = [torch.randn(5, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    wanted, labels = torch.randn(5, 4, 16), torch.randint(16, (5, 4))
    masks = [torch.rand(5, 4) > 0.3 for _ in range(2)]
    found = []
    for chunk in (4, 9, 1000):
        judged = Judge(loss=loss, names=names, chunk=chunk).judged(
            [head] * 2, outputs, [wanted] * 2, [labels] * 2, masks
        )
        gradients = torch.autograd.grad(judged.loss.sum(), [head.weight, *outputs])
        found.append([judged.loss, judged.overlap, judged.agrees, *gradients])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one.double(), same.double(), rtol=1e-5, atol=1e-7)
