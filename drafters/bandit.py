"""A bandit that chooses among drafters by the tokens they earn per unit of time."""

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Arm:
    """What one choice has yielded so far; older steps count less."""

    steps: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0


@dataclass(slots=True)
class Bandit:
    """Upper confidence bounds on a ratio of rewards to costs, forgetting exponentially: after
    discounted UCB (Garivier and Moulines 2011, section 2.1) and budgeted bandits (Xia et al.
    2015), with a bonus that multiplies the ratio. An arm is (choice, class of situations); each
    class is a bandit of its own.

    Args:
        exploration: how much an arm that was tried rarely is favoured.
        discount: weight of a step against the one after it.
    """

    exploration: float = 0.2
    discount: float = 0.99
    arms: dict[tuple[int, int], Arm] = field(default_factory=dict)

    def choose(self, choices: list[tuple[int, int]]) -> int:
        """Which of these arms to pull: its place in the list, of equals the first."""
        known = [self.arms.setdefault(choice, Arm()) for choice in choices]
        total = sum(arm.steps for arm in known)

        def index(arm: Arm) -> float:
            if arm.steps < 0.5 or not arm.cost:
                return math.inf
            bonus = self.exploration * math.sqrt(math.log(1.0 + total) / arm.steps)
            return arm.tokens / arm.cost * (1.0 + bonus)

        values = [index(arm) for arm in known]
        return values.index(max(values))

    def learn(self, choice: tuple[int, int], tokens: float, cost: float) -> None:
        """Pulling this arm took `cost` and yielded `tokens`."""
        for (_, kind), arm in self.arms.items():
            if kind == choice[1]:
                arm.steps *= self.discount
                arm.tokens *= self.discount
                arm.cost *= self.discount
        arm = self.arms.setdefault(choice, Arm())
        arm.steps += 1.0
        arm.tokens += tokens
        arm.cost += cost
