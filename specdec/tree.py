"""TokenTree: a padded batch of token trees, and the distributions their children were drawn
from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

ROOT, PADDING = -1, -2  # marks in TokenTree.parents
RANDOM_DEPTH = 6  # levels of random trees at most
MOST_NODES = 256  # of a tree, the root not counted: scratch, masks and rules are made for so many
MOST_LEVELS = 64  # of a tree, the root's not counted

Children = Literal["top_k", "sample", "sample_with_replacement"]
"""How the children of a node were chosen: its most probable tokens, or draws from the draft
distribution."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Proposal:
    """The draft distribution at every node, as the parent of its children.

    A distribution cut to K tokens and renormalised is the one children are drawn from, so it is
    all that a lossless rule needs.

    Args:
        ids: [B, N, K] int64, tokens of the support, none twice for a node.
        probs: [B, N, K] float, their probabilities; zero (and the id void) where the support is
            smaller than K, and all over a node that has no children.
        children: how children were chosen from it; in the order of node indices.
    """

    ids: Tensor
    probs: Tensor
    children: Children


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Begun:
    """Nodes that have gone through the first layers of the target already.

    Args:
        layers: how many; the keys and values of these are in the scratch of the target's cache,
            in the order of the nodes.
        hidden: [B, N, H], the hidden states after them.
    """

    layers: int
    hidden: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenTree:
    """One tree of candidate tokens for each sequence of a batch.

    Node 0 is the last committed token, whose keys and values are not in the cache yet; every other
    node comes after its parent. Siblings stand in the order in which they are to be tried.

    Args:
        tokens: [B, N] int64.
        parents: [B, N] int32; parents[:, 0] == -1, parents[b, i] < i, padding is -2.
        size: [B] int32, real nodes, which come first; 0 is an idle row.
        depth: no path has more edges than this (known on the host without a look at the tensors).
        proposal: the draft distributions, None if the drafter has none.
        source: [B, N] int8, which of several drafters proposed a node; None if there is only one.
        begun: where verification may go on; None to begin at the first layer.
    """

    tokens: Tensor
    parents: Tensor
    size: Tensor
    depth: int
    proposal: Proposal | None = None
    source: Tensor | None = None
    begun: Begun | None = None

    @classmethod
    def roots(cls, tokens: Tensor) -> "TokenTree":
        """Trees of the root alone, for [B] tokens: plain autoregressive decoding."""
        tokens = tokens[:, None]
        parents = torch.full_like(tokens, ROOT, dtype=torch.int32)
        return cls(tokens=tokens, parents=parents, size=torch.ones_like(parents[:, 0]), depth=0)

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def support(self) -> int:
        """Draft candidates kept per node."""
        return 0 if self.proposal is None else self.proposal.ids.shape[2]

    def tensors(self) -> list[Tensor]:
        """All there are, in a fixed order."""
        found = [self.tokens, self.parents, self.size]
        if self.proposal is not None:
            found += [self.proposal.ids, self.proposal.probs]
        return found if self.source is None else [*found, self.source]

    def to(self, device: torch.device) -> "TokenTree":
        """A copy on a device."""
        return self._map(lambda tensor, _: tensor.to(device, copy=True))

    def padded(self, batch: int, nodes: int) -> "TokenTree":
        """With idle rows and padding nodes up to [batch, nodes]; paths may then be as long as that
        and `MOST_LEVELS` allow."""

        def pad(tensor: Tensor, value: int) -> Tensor:
            missing = [batch - len(tensor), *(nodes - n for n in tensor.shape[1:2])]
            widths = [0] * 2 * max(0, tensor.dim() - 2)
            for count in reversed(missing):
                widths += [0, count]
            return torch.nn.functional.pad(tensor, widths, value=value)

        return replace(self._map(pad), depth=min(nodes - 1, MOST_LEVELS))

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> "TokenTree":
        """With every tensor changed, given the value of its padding."""
        proposal = self.proposal
        if proposal is not None:
            ids, probs = change(proposal.ids, 0), change(proposal.probs, 0)
            proposal = replace(proposal, ids=ids, probs=probs)
        return replace(
            self,
            tokens=change(self.tokens, 0),
            parents=change(self.parents, PADDING),
            size=change(self.size, 0),
            proposal=proposal,
            source=None if self.source is None else change(self.source, 0),
        )

    def check_size(self) -> None:
        """Raise ValueError for trees larger than any may be, without a look at the tensors."""
        if self.nodes > MOST_NODES + 1:
            raise ValueError(
                f"a tree of {self.nodes} nodes: {MOST_NODES} and the root are the most, draft less"
            )
        if self.depth > MOST_LEVELS:
            raise ValueError(
                f"a tree of {self.depth} levels: {MOST_LEVELS} are the most; draft shorter paths"
            )

    def check(self) -> None:
        """Raise RuntimeError, naming the first violation, unless every invariant above holds."""
        parents, size = self.parents.tolist(), self.size.tolist()
        if self.parents.shape != self.tokens.shape or self.size.shape != self.tokens.shape[:1]:
            raise RuntimeError("TokenTree: tokens, parents and size disagree in shape")
        repeats = self.proposal is not None and self.proposal.children == "sample_with_replacement"
        for row, tokens in enumerate(self.tokens.tolist()):
            if not 0 <= size[row] <= self.nodes:
                raise RuntimeError(f"TokenTree row {row}: size {size[row]} of {self.nodes} nodes")
            depths: list[int] = []
            edges: set[tuple[int, int]] = set()
            for node, parent in enumerate(parents[row]):
                at = f"TokenTree row {row}, node {node}"
                if node >= size[row]:
                    if parent != PADDING:
                        raise RuntimeError(f"{at}: padding must have parent -2, not {parent}")
                    continue
                if (parent == ROOT) != (node == 0) or not ROOT <= parent < node:
                    raise RuntimeError(f"{at}: parent {parent} is not an earlier node")
                depths.append(0 if node == 0 else depths[parent] + 1)
                if depths[-1] > self.depth:
                    raise RuntimeError(f"{at}: depth {depths[-1]} exceeds {self.depth}")
                if node and (parent, tokens[node]) in edges and not repeats:
                    raise RuntimeError(
                        f"{at}: token {tokens[node]} is already a child of node {parent}"
                    )
                edges.add((parent, tokens[node]))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Acceptance:
    """What a rule keeps of each tree.

    Args:
        path: [B, depth + 1] int64, nodes from the root down; entries past `length` are undefined
            but legal node indices.
        length: [B] int64, nodes kept, the root included; equals the number of new tokens. 0 for an
            idle row.
        next_token: [B] int64, the target's own token after the path (a correction or a bonus).
    """

    path: Tensor
    length: Tensor
    next_token: Tensor

    def new_tokens(self, tree: TokenTree) -> Tensor:
        """[B, depth + 1] int64: the first `length` entries of each row are the tokens gained this
        step."""
        drafted = tree.tokens.gather(1, self.path[:, 1:])
        last = (self.length - 1).clamp(min=0)[:, None]
        padded = torch.cat([drafted, self.next_token[:, None]], dim=1)
        return padded.scatter(1, last, self.next_token[:, None])


def of_parents(tree: TokenTree, proposal: Proposal, *values: Tensor) -> list[Tensor]:
    """[B, N] each: the entry of a node's token in [B, N, K] values of its parent; 0 where the
    parent did not propose it, and for roots."""
    parent = tree.parents.long().clamp(min=0)[..., None].expand(-1, -1, proposal.ids.shape[2])
    own = (proposal.ids.gather(1, parent) == tree.tokens[..., None]) & (
        proposal.probs.gather(1, parent) > 0
    )
    own = own & (tree.parents >= 0)[..., None]
    return [(value.gather(1, parent) * own).sum(-1) for value in values]


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """The parents of a tree of up to RANDOM_DEPTH levels: each node below a random earlier one."""
    parents, depths = [-1], [0]
    for _ in range(nodes - 1):
        open_nodes = [node for node, depth in enumerate(depths) if depth < RANDOM_DEPTH]
        pick = int(torch.randint(len(open_nodes), (1,), generator=generator))
        parents.append(open_nodes[pick])
        depths.append(depths[open_nodes[pick]] + 1)
    return parents
