"""The bandit finds the arm that pays, and follows a change."""

import torch

from specdec.drafters.bandit import Bandit


def test_the_bandit_finds_the_arm_that_pays() -> None:
    generator = torch.Generator().manual_seed(0)
    bandit, pulls = Bandit(), [0, 0, 0]
    pays, costs = (4.0, 6.0, 9.0), (1.0, 1.2, 3.0)  # per unit of time: 4, 5, 3
    for _ in range(600):
        arm = bandit.choose([(i, 0) for i in range(3)])
        pulls[arm] += 1
        noise = float(torch.rand((), generator=generator)) - 0.5
        bandit.learn((arm, 0), pays[arm] + 2 * noise, costs[arm])
    assert pulls[1] > 400
    assert min(pulls) >= 1


def test_the_bandit_follows_a_change() -> None:
    bandit = Bandit()
    last = []
    for step in range(1200):
        arm = bandit.choose([(0, 0), (1, 0)])
        good = int(step >= 600)
        bandit.learn((arm, 0), 3.0 if arm == good else 1.0, 1.0)
        last.append(arm)
    assert sum(last[500:600]) < 20
    assert sum(last[1100:]) > 80
