"""drafter=synthetic: nodes that are accepted as often as the settings say, for studies of
speed."""

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.protocols import StepContext, TreePolicy
from specdec.rates import Rates, by_depth

STRIDE = 48271  # spreads the tokens of neighbouring parents over the vocabulary


class Synthetic(GrowingDrafter):
    """Guesses arbitrary tokens and says how probable they are; `acceptance=synthetic` takes its
    word for it.

    What a step costs is real: the target scores these trees like any other, and the cache keeps
    what was accepted. Only drafting itself is all but free. Texts mean nothing, and may end at a
    stop token that was never the target's: `ignore_eos=true` makes them equally long.

    Args:
        rates: the chance to accept a node once its parent is accepted. A number is that of the
            only child of every node. A list goes by depth, its last entry serves all deeper
            levels; an entry is a number, or a list by rank, the most probable child first.
            Siblings exclude each other. Children of rate 0 are not drafted.
        depth: levels of the tree; None leaves it to the policy.

    Raises:
        ValueError: rates that are none, or children that are to be sampled.
    """

    composable = False
    acceptance = "synthetic"  # the rule that makes its rates come true

    def __init__(self, *, rates: Rates = 0.8, depth: int | None = None) -> None:
        super().__init__(depth=depth, candidates=1)
        self.rates, self._rows = rates, by_depth(rates)
        self.vocab_size = 0
        self._rates: Tensor  # [D, K]
        self._ranks: Tensor  # [K]

    def check(self, tree: TreePolicy) -> None:
        super().check(tree)
        if tree.children != "top_k":
            raise ValueError(
                f"tree.children={tree.children}: drafter.rates are chances to be accepted and "
                f"need not sum to 1, so no child can be drawn from them; use top_k"
            )

    def load(self, target: PagedLM, models: Models) -> None:
        self.vocab_size = target.vocab_size
        most = max(map(len, self._rows))
        if most > self.vocab_size:
            raise ValueError(
                f"drafter.rates={self.rates}: {most} children of a node, but the target has only "
                f"{self.vocab_size} tokens"
            )
        padded = [row + [0.0] * (most - len(row)) for row in self._rows]
        self._rates = torch.tensor(padded, dtype=torch.float64, device=target.device)
        self._ranks = torch.arange(most, device=target.device)

    def begin(self, context: StepContext) -> Expand:
        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            rates = self._rates[min(frontier.level, len(self._rates) - 1)]
            first = frontier.tokens * STRIDE + frontier.level + 1
            ids = (first[..., None] + self._ranks) % self.vocab_size
            return ids, rates.expand(ids.shape)

        return expand
