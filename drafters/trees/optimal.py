"""tree=optimal: the tree that measured acceptance makes the most of."""

from specdec.drafters.trees.fixed import FixedShape, measured_rates
from specdec.drafters.trees.shapes import Shape, optimal
from specdec.protocols import Loaded
from specdec.rates import AcceptanceRates
from specdec.tree import MOST_LEVELS


class Optimal(FixedShape):
    """The tree with the most expected accepted nodes of all with at most `budget` nodes, given how
    often children are accepted by depth and rank (Sequoia, Chen et al. 2024, section 3.1).

    Args:
        rates: file of `AcceptanceRates`, or the name of one in `specdec/data/acceptance`. They
            should be of the same models and the same kind of text.
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        depth: levels at most; None for as many as a tree may have.
        temperature, top_p: of the target; the rates of the nearest ones count.
        children: how children are chosen.

    Raises:
        ValueError: a setting out of range, or no such rates.
    """

    def __init__(
        self,
        *,
        rates: str,
        budget: int,
        depth: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        children: str = "top_k",
    ) -> None:
        found = measured_rates(
            rates,
            budget=budget,
            depth=depth,
            children=children,
            temperature=temperature,
            top_p=top_p,
        )
        shape = self.search(found, budget, depth or MOST_LEVELS, children)
        super().__init__(shape=shape, children=children)
        self.rates = found

    def fit(self, run: Loaded) -> None:
        self.notes = {"rates": self.rates.origin(run)}

    @staticmethod
    def search(rates: AcceptanceRates, budget: int, depth: int, children: str) -> Shape:
        """The shape that these rates make the most of."""
        return optimal(rates, budget, depth)
