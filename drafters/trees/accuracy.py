"""tree=accuracy: the likeliest nodes by measured acceptance."""

from specdec.drafters.trees.fixed import FixedShape, measured_rates
from specdec.drafters.trees.shapes import greedy


class Accuracy(FixedShape):
    """The `budget` nodes most likely to be accepted, found one after the other, given how often
    children are accepted by depth and rank (Medusa, Cai et al. 2024, section 2.3.3).

    Top-k children of a rank seldom accepted may be left out while later ones are in. Sampled ones
    may not, because who is drawn second is nobody without a first: there a child is taken only
    after its elder siblings.

    Args:
        rates: as in `Optimal`.
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        depth: levels at most; None for no limit.
        temperature: as in `Optimal`.
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
        shape = greedy(found, budget, depth, in_order=children != "top_k")
        super().__init__(shape=shape, children=children)
