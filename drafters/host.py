"""A base for drafters that look at one sequence at a time on the host and know nothing of
tensors."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, grow, plan
from specdec.protocols import Decoding, Drafter, StepContext, TreePolicy
from specdec.tree import TokenTree


class Trie:
    """Weighted continuations merged by common beginnings; a child's probability is its share of
    the weight."""

    __slots__ = ("children", "weight")

    def __init__(self) -> None:
        self.children: dict[int, Trie] = {}
        self.weight = 0.0

    def add(self, path: Iterable[int], weight: float) -> None:
        node = self
        for token in path:
            node = node.children.setdefault(token, Trie())
            node.weight += weight

    def best(self, count: int) -> list[tuple[int, float]]:
        """(token, probability) of the `count` heaviest children, renormalised; of equals the one
        added first."""
        heaviest = sorted(self.children.items(), key=lambda item: -item[1].weight)[:count]
        total = sum(child.weight for _, child in heaviest)
        return [(token, child.weight / total) for token, child in heaviest]


class HostDrafter(Drafter):
    """Asks `propose` for weighted continuations of each sequence and grows trees from them.

    Args:
        tree: the tree policy.
        depth: levels of the tree; None leaves it to the policy.
        candidates: children considered per node when they are sampled.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, *, tree: TreePolicy, depth: int | None = None, candidates: int = 16
    ) -> None:
        self.tree = tree
        self.levels = plan(tree, depth, candidates)
        self.candidates = candidates

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        """Continuations of `sequence.tokens` of up to `levels` tokens, each with a positive
        weight."""
        raise NotImplementedError

    def draft(self, context: StepContext) -> TokenTree:
        tries = []
        for sequence in context.sequences if self.levels else ():
            trie = Trie()
            for path, weight in self.propose(sequence, self.levels):
                trie.add(path, weight)
            tries.append(trie)
        if not any(trie.children for trie in tries):
            return TokenTree.roots(context.roots)
        sampled = self.tree.children != "top_k"
        expanded: list[list[Trie]] = [
            [trie] for trie in tries
        ]  # per sequence, by number of expanded node

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            width = self.candidates if sampled else self.tree.width(frontier.level)
            if frontier.level:
                places = zip(
                    expanded, frontier.tokens.tolist(), frontier.parents.tolist(), strict=True
                )
                for nodes, tokens, parents in places:
                    nodes += [
                        nodes[p].children.get(t, _NOTHING)
                        for t, p in zip(tokens, parents, strict=True)
                    ]
            best = [[node.best(width) for node in nodes[frontier.first :]] for nodes in expanded]
            ids = torch.tensor([[_column(row, 0, width) for row in rows] for rows in best])
            probs = torch.tensor([[_column(row, 1, width) for row in rows] for rows in best])
            device = context.roots.device
            return ids.long().to(device), probs.to(device, torch.float64)

        return grow(self.tree, self.levels, context, expand)[0]


_NOTHING = Trie()


def _column(rows: list[tuple[int, float]], which: int, width: int) -> list[float]:
    return [row[which] for row in rows] + [0] * (width - len(rows))
