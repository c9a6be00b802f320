"""A base for drafters that look at one sequence at a time on the host and know nothing of
tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, ShapedDrafter, grow
from specdec.kernels import reference
from specdec.kernels.reference.growth import DEAD
from specdec.protocols import Growth, StepContext, TreePolicy
from specdec.reasons import DraftError
from specdec.request import Capacity, Decoding
from specdec.tree import PADDING, ROOT, Proposal, TokenTree


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
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Trie()
            child.weight += weight
            node = child

    def best(self, count: int) -> list[tuple[int, float]]:
        """(token, probability) of the `count` heaviest children, renormalised; of equals the one
        added first."""
        heaviest = list(self.children.items())
        if len(heaviest) > 1:
            heaviest = sorted(heaviest, key=lambda item: -item[1].weight)[:count]
        total = sum(child.weight for _, child in heaviest)
        return [(token, child.weight / total) for token, child in heaviest]


class HostDrafter(ShapedDrafter):
    """Asks `propose` for weighted continuations of each sequence and grows trees from them.

    Settings and errors are those of `ShapedDrafter`.
    """

    most_candidates = 1024  # all of which have a place at every node

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if {"draft", "commit"} & vars(cls).keys() and "composable" not in vars(cls):
            cls.composable = False  # a composition calls neither

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        self.most_nodes = tree.budget + 1 if self.levels else 1

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        """Continuations of `sequence.tokens` of up to `levels` tokens, each with a positive
        weight."""
        raise NotImplementedError

    def match_length(self, sequence: Decoding) -> int:
        """Tokens of context on which the last `propose` for this sequence rested; 0 where it found
        nothing. All of them, unless a drafter knows better."""
        return len(sequence.tokens)

    def draft(self, context: StepContext) -> TokenTree:
        tries = [self.trie(sequence) for sequence in context.sequences if self.levels]
        if not any(trie.children for trie in tries):
            return TokenTree.roots(context.roots)
        if self.tree.children == "top_k":
            trees = self.grown(context.sequences, tries)
            return tensors_of(trees, self.levels, self.widest(), context.roots.device)
        expanded: list[list[Trie]] = [
            [trie] for trie in tries
        ]  # per sequence, by number of expanded node

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            if frontier.level:
                places = zip(
                    expanded, frontier.tokens.tolist(), frontier.parents.tolist(), strict=True
                )
                for nodes, tokens, parents in places:
                    nodes += [
                        nodes[p].children.get(t, _NOTHING)
                        for t, p in zip(tokens, parents, strict=True)
                    ]
            width = self.candidates
            best = [[node.best(width) for node in nodes[frontier.first :]] for nodes in expanded]
            ids = torch.tensor([[_column(row, 0, width) for row in rows] for rows in best])
            probs = torch.tensor([[_column(row, 1, width) for row in rows] for rows in best])
            device = context.roots.device
            return ids.long().to(device), probs.to(device, torch.float64)

        return grow(self.tree, self.levels, context, expand)[0]

    def trie(self, sequence: Decoding) -> Trie:
        """What is proposed for this sequence, which alone is to blame if that fails."""
        trie = Trie()
        try:
            for path, weight in self.propose(sequence, self.levels):
                trie.add(path, weight)
        except DraftError:
            raise
        except Exception as error:
            raise DraftError.caused_by(error, self, [sequence]) from error
        return trie

    def widest(self) -> int:
        """Children the policy gives a node at most."""
        return max(self.tree.width(level) for level in range(self.levels))

    def grown(self, sequences: Sequence[Decoding], tries: list[Trie]) -> list["HostTree"]:
        """The trees of most probable children that the policy makes of these tries."""
        trees = [HostTree(sequence.tokens[-1]) for sequence in sequences]
        if self.tree.takes_all:
            for tree, trie in zip(trees, tries, strict=True):
                self._grow_all(tree, trie)
        else:
            self._grow(trees, tries)
        return trees

    def _grow_all(self, tree: "HostTree", trie: Trie) -> None:
        """The tree of a policy that takes all it is offered: no need to ask it anything else."""
        frontier = [(0, trie)]
        for level in range(self.levels):
            width = self.tree.width(level)
            grown = []
            for node, trie in frontier:
                if trie.children:
                    tree.supports[node] = support = trie.best(width)
                    for token, _ in support:
                        grown.append((len(tree.tokens), trie.children[token]))
                        tree.tokens.append(token)
                        tree.parents.append(node)
            frontier = grown

    def _grow(self, trees: list["HostTree"], tries: list[Trie]) -> None:
        """The trees that `grow` makes of the same tries. Only scores are tensors, because policies
        judge those; levels at which no sequence has a node are left out.

        Until the end a tree has all T slots, which are the same for all sequences of the batch.
        (Long like `grow`: a level hands all it has on to the next.) It is here for
        its speed: on one thread of a CPU a chain of 16 takes 58 us, by `grow` 519; a dynamic tree
        of 16 nodes takes 577 us, by `grow` 1,194.
        """
        policy, batch = self.tree, len(trees)
        frontiers = [[(0, trie)] for trie in tries]  # [B, F] slots and what may follow them
        score = torch.zeros(batch, 1, dtype=torch.float64)
        scores: list[Tensor] = []
        offered: tuple[int, ...] = ()
        for level in range(self.levels):
            width = policy.width(level)
            offered = (*offered, width)
            at = Growth(
                level=level,
                levels=self.levels,
                offered=offered,
                sampled=False,
                kernels=reference,
            )
            best = [[trie.best(width) for _, trie in frontier] for frontier in frontiers]
            shares = [[_column(row, 1, width) for row in rows] for rows in best]
            probs = torch.tensor(shares, dtype=torch.float32)  # [B, F, width]
            slots = reference.extend(score, probs)
            selected = policy.select(at, slots)
            if selected is not None:
                slots = slots.masked_fill(~selected, DEAD)
            growing = slots.flatten(1)  # [B, C]
            scores.append(growing)
            first = len(trees[0].tokens)
            following = []  # [B, C] what may follow each new slot
            for tree, frontier, rows in zip(trees, frontiers, best, strict=True):
                follows = []
                for (node, trie), support in zip(frontier, rows, strict=True):
                    missing = width - len(support)
                    tree.supports[node] = support
                    tree.tokens += [token for token, _ in support] + [0] * missing
                    tree.parents += [node] * width
                    follows += [trie.children[token] for token, _ in support]
                    follows += [_NOTHING] * missing
                following.append(follows)
            if level + 1 == self.levels:
                break
            place = policy.expand(at, growing)
            if place is None:
                score = growing
                places = [range(growing.shape[1])] * batch
            else:
                score = growing.gather(1, place)
                places = place.tolist()
            frontiers = [
                [
                    (first + slot, follows[slot] if value > DEAD else _NOTHING)
                    for slot, value in zip(chosen_slots, values, strict=True)
                ]
                for follows, chosen_slots, values in zip(
                    following, places, score.tolist(), strict=True
                )
            ]
            if not any(trie.children for frontier in frontiers for _, trie in frontier):
                break
        every = torch.cat(scores, dim=1)  # [B, T - 1], the root left out
        kept = every > DEAD
        keep = policy.keep(every, reference)
        if keep is not None:
            kept &= keep
        for tree, keeps in zip(trees, kept.tolist(), strict=True):
            tree.compact([True, *keeps])


@dataclass(slots=True)
class HostTree:
    """A tree in lists, the root first."""

    root: int
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    supports: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """(token, probability) of the draft distribution at each node that has one."""

    def __post_init__(self) -> None:
        self.tokens, self.parents = [self.root], [ROOT]

    def compact(self, kept: list[bool]) -> None:
        """Drop what is not kept."""
        order = [node for node, keeps in enumerate(kept) if keeps]
        place = {node: new for new, node in enumerate(order)}
        place[ROOT] = ROOT
        self.tokens = [self.tokens[node] for node in order]
        self.parents = [place[self.parents[node]] for node in order]
        found = self.supports
        self.supports = {place[node]: found[node] for node in order if node in found}


def tensors_of(trees: list[HostTree], depth: int, most: int, device: torch.device) -> TokenTree:
    """[B, N] trees with paths of up to `depth` edges, and K = `most` places for the support of
    each node."""
    sizes = [len(tree.tokens) for tree in trees]
    nodes = max(sizes)
    tokens, parents, ids, probs = [], [], [], []  # flat, which is faster to make tensors of
    for tree, size in zip(trees, sizes, strict=True):
        tokens += tree.tokens + [0] * (nodes - size)
        parents += tree.parents + [PADDING] * (nodes - size)
        for node in range(nodes):
            support = tree.supports.get(node, ())
            for token, prob in support:
                ids.append(token)
                probs.append(prob)
            missing = most - len(support)
            if missing:
                ids += [0] * missing
                probs += [0.0] * missing
    shape = len(trees), nodes
    return TokenTree(
        tokens=torch.tensor(tokens).view(shape).to(device),
        parents=torch.tensor(parents, dtype=torch.int32).view(shape).to(device),
        size=torch.tensor(sizes, dtype=torch.int32).to(device),
        depth=min(depth, nodes - 1),
        proposal=Proposal(
            ids=torch.tensor(ids).view(*shape, most).to(device),
            # Rounded like those that scores are computed from.
            probs=torch.tensor(probs, dtype=torch.float32)
            .view(*shape, most)
            .to(device, torch.float64),
            children="top_k",
        ),
    )


_NOTHING = Trie()


def _column(rows: Sequence[tuple[int, float]], which: int, width: int) -> list[float]:
    return [row[which] for row in rows] + [0] * (width - len(rows))
