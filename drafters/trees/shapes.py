"""Shapes of trees: which children nodes have, whatever their tokens, and which shapes are best.

A node is the path to it from the root, as ranks of children: (0, 2) is the third child of the
first child of the root. A shape is a set of nodes, the root left out, that holds with each node
its parent. It skips a rank where it holds a node but not the next elder sibling.
"""

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from specdec.rates import AcceptanceRates

Node = tuple[int, ...]
Shape = frozenset[Node]
STOP = -1  # in the choices of a programme: no such child


def shape_of(paths: Iterable[Sequence[int]]) -> Shape:
    """These nodes as a shape.

    Raises:
        ValueError: an empty path, a rank below 0, or a node whose parent is missing; it names
            `tree.paths`, for nothing else makes such shapes.
    """
    shape = frozenset(tuple(path) for path in paths)
    for node in ordered(shape):
        if not node or min(node) < 0:
            raise ValueError(
                f"tree.paths: {list(node)} is no path; each must list ranks of children, the most "
                f"probable being 0"
            )
        if len(node) > 1 and node[:-1] not in shape:
            raise ValueError(
                f"tree.paths: {list(node)} lacks its parent {list(node[:-1])}; list that as well"
            )
    return shape


def ordered(shape: Shape) -> list[Node]:
    """The nodes level by level, siblings together and by rank."""
    return sorted(shape, key=lambda node: (len(node), node))


def skipping(shape: Shape) -> Node | None:
    """The first node that has no elder sibling though its rank is above 0; None if there is
    none."""
    lonely = (node for node in ordered(shape) if node[-1] and _elder(node) not in shape)
    return next(lonely, None)


def parents_by_level(shape: Shape) -> list[list[Node]]:
    """The nodes that have children, level by level, the root first; none if it has none."""
    levels: list[list[Node]] = [[] for _ in range(max(map(len, shape), default=0))]
    for parent in ordered(frozenset(node[:-1] for node in shape)):
        levels[len(parent)].append(parent)
    return levels


def describe(shape: Shape) -> str:
    """One line: how many nodes, and the numbers of children of those that have any, level by
    level."""
    counts = [
        " ".join(str(sum(node[:-1] == parent for node in shape)) for parent in parents)
        for parents in parents_by_level(shape)
    ]
    return f"{len(shape)} nodes" + (f", children {' | '.join(counts)}" if counts else "")


def expected_accepted(shape: Shape, rates: AcceptanceRates) -> float:
    """Expected number of drafted nodes that a step accepts: the sum over all nodes of the chance
    that they are, which is the product of the rates on their path."""
    chance: dict[Node, float] = {(): 1.0}
    nodes = ordered(shape)
    for node in nodes:
        chance[node] = chance[node[:-1]] * rates.at(len(node) - 1, node[-1])
    return sum(chance[node] for node in nodes)


def optimal(rates: AcceptanceRates, budget: int, depth: int | None = None) -> Shape:
    """The shape of the most expected accepted nodes among all that skip no rank, by the dynamic
    programme of Sequoia (Chen et al. 2024, section 3.1), with rates that depend on the depth.

    A node that cannot be accepted is in it only where a younger sibling is worth the place; of
    equally good shapes it is one that needs no node too many.

    Args:
        budget: nodes at most, the root not counted.
        depth: levels at most; None for no limit.
    """
    return OptimalShapes(rates, budget, depth).of(budget)


def greedy(
    rates: AcceptanceRates, budget: int, depth: int | None = None, *, in_order: bool = False
) -> Shape:
    """The shape that takes the node most likely to be accepted again and again, its parent being
    in the shape already (Medusa, Cai et al. 2024, section 2.3.3).

    Rates are at most 1, so that no node is likelier than its parent: these are the likeliest nodes
    of all, and no shape of as many has more expected accepted nodes. Where siblings' rates never
    ascend it skips no rank and is as good as `optimal`; elsewhere it is better by skipping ranks.

    Args:
        budget: nodes at most, the root not counted. Those that cannot be accepted never count.
        depth: levels at most; None for no limit.
        in_order: a child may be taken only after its elder siblings, so that none is skipped. Then
            `optimal` may be better.
    """
    chance: dict[Node, float] = {(): 1.0}
    # A heap; of equally likely nodes the one nearer to the root comes first.
    offers: list[tuple[float, int, Node]] = []

    def offer(node: Node) -> None:
        found = chance[node[:-1]] * rates.at(len(node) - 1, node[-1])
        if found > 0.0 and (depth is None or len(node) <= depth):
            heapq.heappush(offers, (-found, len(node), node))

    def offer_children(node: Node) -> None:
        for rank in range(1 if in_order else rates.values.shape[1]):
            offer((*node, rank))

    offer_children(())
    while offers and len(chance) <= budget:
        lost, _, node = heapq.heappop(offers)
        chance[node] = -lost
        offer_children(node)
        if in_order:
            offer((*node[:-1], node[-1] + 1))
    return frozenset(chance) - {()}


class OptimalShapes:
    """The shapes `optimal` for every budget up to one, by one programme.

    Of a node that is accepted let W[n] be the most accepted nodes that n nodes beneath it can be
    expected to yield. A child with m nodes beneath it yields rate * (1 + W'[m]), where W' is that
    of the level below, and leaves n - 1 - m nodes to its younger siblings. So W is found from the
    deepest level to the root, and on each from the last rank to the first. It takes
    O(depth * ranks * budget^2) operations.

    Args:
        rates: of acceptance.
        budget: nodes at most, the root not counted.
        depth: levels at most; None for no limit.

    Attributes:
        accepted: [budget + 1], of the shape of each budget the expected accepted nodes.
        nodes: [budget + 1], how many it has.
        widths: [budget + 1, levels], how many of each level have children, the root's first.
    """

    def __init__(self, rates: AcceptanceRates, budget: int, depth: int | None = None) -> None:
        levels = budget if depth is None else min(depth, budget)
        # [R, budget + 1] of each level: given n nodes to a child of rank r and its younger
        # siblings, how many go beneath that child; STOP if there is best no such child.
        self._choices: list[NDArray[np.int64]] = []
        beneath = np.zeros(budget + 1)  # W of a node of the level below
        self.nodes = np.zeros(budget + 1, dtype=np.int64)  # beneath that node, as the widths are
        self.widths = np.zeros((budget + 1, levels), dtype=np.int64)
        for level in reversed(range(levels)):
            row = rates.row(level)[:budget]
            choices = np.full((row.size, budget + 1), STOP)
            younger = np.zeros(budget + 1)  # what n nodes yield, given to the siblings from a rank
            for rank in reversed(range(row.size)):
                # [n - 1, m]: m beneath the child, the other n - 1 - m to its siblings
                padded = np.concatenate([np.full(budget - 1, -np.inf), younger[:-1]])
                left = sliding_window_view(padded, budget)[:, ::-1]
                together = left + row[rank] * (1.0 + beneath[:-1])
                best = together.argmax(axis=1)  # the fewest nodes, of equals
                found = together[np.arange(budget), best]
                choices[rank, 1:] = np.where(found > 0.0, best, STOP)
                younger = np.concatenate([[0.0], found])
            self._choices.insert(0, choices)
            beneath = younger
            self._count(level, choices)
        self.accepted = beneath

    def _count(self, level: int, choices: NDArray[np.int64]) -> None:
        """Of a node of this level what was known of one below."""
        nodes, widths = np.zeros_like(self.nodes), np.zeros_like(self.widths)
        widths[:, level] = choices[0] != STOP
        left = np.arange(nodes.size)
        for row in choices:
            beneath = row[left]
            (some,) = np.nonzero(beneath != STOP)
            beneath = beneath[some]
            nodes[some] += 1 + self.nodes[beneath]
            widths[some] += self.widths[beneath]
            left = np.where(row[left] == STOP, 0, left - 1 - row[left])  # of 0 nodes no child
        self.nodes, self.widths = nodes, widths

    def of(self, budget: int) -> Shape:
        """The shape of at most so many nodes, themselves at most those of the programme."""
        shape: set[Node] = set()
        growing: list[tuple[Node, int]] = [((), budget)]
        while growing:
            node, nodes = growing.pop()
            if len(node) == len(self._choices):
                continue
            for rank, choices in enumerate(self._choices[len(node)]):
                beneath = int(choices[nodes])
                if beneath == STOP:
                    break
                child = (*node, rank)
                shape.add(child)
                growing.append((child, beneath))
                nodes -= 1 + beneath
        return frozenset(shape)


def _elder(node: Node) -> Node:
    return (*node[:-1], node[-1] - 1)
