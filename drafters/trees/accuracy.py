"""tree=accuracy: the likeliest nodes by measured acceptance."""

from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.shapes import Shape, greedy
from specdec.rates import AcceptanceRates


class Accuracy(Optimal):
    """The `budget` nodes most likely to be accepted, found one after the other, given how often
    children are accepted by depth and rank (Medusa, Cai et al. 2024, section 2.3.3).

    Top-k children of a rank seldom accepted may be left out while later ones are in. Sampled ones
    may not, because who is drawn second is nobody without a first: there a child is taken only
    after its elder siblings.

    Settings and errors are those of `Optimal`.
    """

    @staticmethod
    def search(rates: AcceptanceRates, budget: int, depth: int, children: str) -> Shape:
        return greedy(rates, budget, depth, in_order=children != "top_k")
