"""Bets: fair, seldom wrong, and quick where tokens are no draws from the target's law."""

import numpy as np
import pytest
import torch

from specdec.lab.bets import Bets, learnt, place_in, wealths
from tests.lab.faulty import chain, world

LAW = torch.tensor([[0.4, 0.1, 0.1, 0.3, 0.0, 0.1]]).double()
DRAFT = torch.tensor([[0.2, 0.2, 0.2, 0.1, 0.1, 0.2]]).double()


def bets_of(fault: str, seed: int, tokens: int) -> Bets:
    generator = np.random.default_rng(seed)
    target, draft = world(generator)
    drawn, contexts, places = chain(generator, target, draft, tokens, fault)
    found = Bets()
    found.add(
        torch.tensor(target[contexts]),
        torch.tensor(drawn),
        generator.random(tokens),
        [str(place) for place in places],
        torch.tensor(draft[contexts]),
    )
    return found


@pytest.mark.parametrize("score", [-LAW, DRAFT / LAW.clamp(min=1e-9)])
def test_places_of_tokens_tile_the_unit_interval(score):
    """So that where a drawn token lies is uniform, ties and all."""
    count = LAW.shape[1]
    law, score, drawn = LAW.expand(count, -1), score.expand(count, -1), torch.arange(count)
    ends = [place_in(law, score, drawn, torch.full((count,), x).double()) for x in (0.0, 1.0)]
    points = (np.arange(1200) + 0.5) / 1200
    density = np.zeros(1200)
    for token in range(count):
        low, high = (float(end[token]) for end in ends)
        if high > low:
            density[(points > low) & (points < high)] += float(LAW[0, token]) / (high - low)
    np.testing.assert_allclose(density, 1.0, atol=1e-9)


def test_each_return_is_one_in_the_mean():
    """Whatever was won before: by enumeration of tokens and of parts."""
    before = np.random.default_rng(0).random(20) ** 2
    points = (np.arange(160) + 0.5) / 160
    after = np.exp([learnt(np.append(before, point))[-1] for point in points])
    assert after.mean() == pytest.approx(np.exp(learnt(before)[-1]))
    price = float((LAW * (DRAFT > LAW)).sum())
    odds = (DRAFT > LAW)[0].numpy()
    shares = np.full((3, 2), 0.5)
    mean = 0.0
    for token, chance in enumerate(LAW[0].tolist()):
        above = np.array([True, False, odds[token]])
        mean += chance * np.exp(wealths(shares, above, np.array([0.3, 0.6, price]))[-1, 2])
    start = np.exp(wealths(shares[:2], np.array([True, False]), np.array([0.3, 0.6]))[-1, 2])
    assert mean == pytest.approx(start)


def test_a_capital_of_true_draws_seldom_grows():
    found = [bets_of("none", seed, 250).found(0.05) for seed in range(200)]
    assert np.mean([one.tokens is not None for one in found]) < 0.05
    assert min(one.p_value for one in found) > 1e-4


@pytest.mark.parametrize(
    ("fault", "most", "bets"),
    [("residual", 800, {"q above", "q/p"}), ("cut", 2000, {"p"}), ("eager", 15_000, {"q above"})],
)
def test_the_table_of_faults(fault, most, bets):
    """Tokens until each is certain at 0.001, in three worlds of 64 tokens: simulated beforehand
    as 430 to 700, 700 to 1,500 and 2,600 to 4,300."""
    for seed in range(3):
        found = bets_of(fault, seed, most).found(0.001)
        assert found.tokens is not None
        assert found.bet in bets
    assert bets_of("none", 0, most).found(0.001).tokens is None


def test_the_place_is_named_where_tokens_are_wrong():
    generator = np.random.default_rng(1)
    target, draft = world(generator)
    bets = Bets()
    for name in ("0", "1"):
        drawn = [generator.choice(64, p=target[i % 40]) for i in range(1500)]
        if name == "1":
            drawn = [generator.choice(64, p=draft[i % 40]) for i in range(1500)]
        law, other = (torch.tensor(x[np.arange(1500) % 40]) for x in (target, draft))
        bets.add(law, torch.tensor(drawn), generator.random(1500), [name] * 1500, other)
    assert bets.found(1e-4).place == "1"


def test_without_a_draft_the_order_of_p_is_left():
    bets = Bets()
    assert bets.found(0.01).p_value == 1.0
    law = torch.full((400, 8), 1 / 8).double()
    bets.add(law, torch.zeros(400).long(), np.full(400, 0.2), ["0"] * 400)
    found = bets.found(1e-4)
    assert found.bet == "p"
    assert found.tokens is not None
