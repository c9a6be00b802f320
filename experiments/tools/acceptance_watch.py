"""What `measure_acceptance.py` measures with: an acceptance rule that is watched at its work.

Legend: B sequences, N nodes of a tree, P paths of a shape, D depths, R ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.drafters.trees.shapes import Node, Shape, ordered
from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import SamplingParams, probabilities
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier import target_only
from specdec.verifier.recursive_rejection import RecursiveRejection, try_children
from specdec.verifier.support import Trial
from specdec.verifier.walk import elder_siblings


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Acceptance by depth and rank, over the depths that were reached.

    Args:
        rates: [D, R], the chance of the child of a rank to be the one accepted once its parent, of
            a depth, is.
        errors: [D, R], their standard errors.
        reached: [D], how many accepted nodes they rest on.
        steps: how many trees.
    """

    rates: Tensor
    errors: Tensor
    reached: Tensor
    steps: int


class Watch(AcceptanceRule):
    """A rule for trees of one shape, and how likely each of their nodes was to be accepted.

    No coin is counted: once the target has seen a tree, the chance of every node is known, given
    its parent and that its elder siblings were turned down. So each step says something about all
    nodes that were expanded, and counts by the chance that they are reached.

    A step may be cut short: what lies beyond `kept` is given up, and the token that led there
    becomes the target's own. That loses nothing, for it is what was accepted, and the next step
    begins after it.

    Args:
        rule: greedy, target_only or recursive_rejection.
        shape: of the trees, as in `drafters/trees/shapes.py`. Nodes with children are the expanded
            ones; where a drafter has fewer children to offer, the others count as turned down.
        kept: nodes that may be accepted; None for all.
    """

    def __init__(
        self, rule: AcceptanceRule, shape: Shape, *, kept: Iterable[Node] | None = None
    ) -> None:
        self.rule, self.name, self.needs_proposal = rule, rule.name, rule.needs_proposal
        nodes: list[Node] = [(), *ordered(shape)]
        number = {node: i for i, node in enumerate(nodes)}
        self.ranks = 1 + max(node[-1] for node in shape)
        self.depths = max(map(len, shape))
        self._child = torch.zeros(len(nodes), self.ranks, dtype=torch.int64)  # [P, R]
        for node in nodes[1:]:
            self._child[number[node[:-1]], node[-1]] = number[node]
        self._depth = torch.tensor([len(node) for node in nodes])
        self._expanded = self._child.any(1)
        among = shape if kept is None else frozenset(kept)
        self._kept = torch.tensor([not node or node in among for node in nodes])
        # By request: [D, R + 1] sums over its steps: children accepted, and nodes reached.
        self._sums: dict[int, Tensor] = {}

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return self.rule.lossy(children, sampling)

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        chance = self._chances(tree, probabilities(logits, context.sampling)).cpu()
        host = tree.to(torch.device("cpu"))
        elder = elder_siblings(host)
        number = self._numbers(host, elder)
        found = self._found(host, elder, number, chance)
        for sequence, sums in zip(context.sequences, found, strict=False):
            request = sequence.request.id
            self._sums[request] = self._sums.get(request, 0.0) + sums
        return self._cut(tree, self.rule.accept(context, tree, logits), number.to(logits.device))

    def estimate(self) -> Estimate:
        """What all requests together say; errors by how they differ (those of a ratio of sums).

        Raises:
            ValueError: fewer than two requests.
        """
        count = len(self._sums)
        if count < 2:
            raise ValueError("one prompt alone does not say how much prompts differ; give more")
        every = torch.stack(list(self._sums.values()))  # [requests, D, R + 1]
        every = every[:, every[:, :, -1].sum(0) > 0]
        accepted, reached = every[..., :-1], every[..., -1:]
        total = reached.sum(0)
        rates = accepted.sum(0) / total
        scatter = (accepted - rates * reached).square().sum(0) * count / (count - 1)
        return Estimate(
            rates=rates,
            errors=scatter.sqrt() / total,
            reached=total[:, 0],
            steps=round(float(total[0])),
        )

    def _chances(self, tree: TokenTree, target: Tensor) -> Tensor:
        """[B, N] float64: of each node to be accepted once its parent is and its elder siblings
        are not."""
        if self.name == RecursiveRejection.name:
            chance = try_children(Trial.of(self.name, tree, target))[0]
        else:
            chance = target_only.child_probabilities(tree, target)
        return chance.double().clamp(0.0, 1.0)

    def _numbers(self, tree: TokenTree, elder: Tensor) -> Tensor:
        """[B, N] int64: which node of the shape each node of the trees is; padding is the root."""
        rank = elder.sum(-1)
        parent = tree.parents.long().clamp(min=0)
        number = torch.zeros_like(parent)
        for _ in range(tree.depth):
            number = self._child[number.gather(1, parent), rank]
            number = number.masked_fill(tree.parents < 0, 0)
        return number

    def _found(self, tree: TokenTree, elder: Tensor, number: Tensor, chance: Tensor) -> Tensor:
        """[B, D, R + 1], what a step adds to the sums."""
        drafted = tree.parents >= 0
        turned_down = torch.where(elder, 1.0 - chance[:, None], 1.0).prod(-1)
        accepted = (chance * turned_down).masked_fill(~drafted, 0.0)  # once its parent is
        parent = tree.parents.long().clamp(min=0)
        reach = torch.ones_like(accepted)
        for _ in range(tree.depth):
            reach = torch.where(drafted, accepted * reach.gather(1, parent), 1.0)
        depth, width = self._depth[number], self.ranks + 1
        found = torch.zeros(len(reach), (self.depths + 1) * width, dtype=torch.float64)
        found.scatter_add_(
            1, (depth - 1).clamp(min=0) * width + elder.sum(-1), reach.masked_fill(~drafted, 0.0)
        )
        real = torch.arange(tree.nodes) < tree.size[:, None]
        expanded = self._expanded[number] & real
        found.scatter_add_(1, depth * width + self.ranks, reach.masked_fill(~expanded, 0.0))
        return found.view(-1, self.depths + 1, width)[:, :-1]

    def _cut(self, tree: TokenTree, acceptance: Acceptance, number: Tensor) -> Acceptance:
        """Up to the last node that is kept."""
        path, length = acceptance.path, acceptance.length
        kept = self._kept.to(path.device)[number].gather(1, path)  # [B, depth + 1]
        ends = kept.long().cumprod(1).sum(1)
        beyond = path.gather(1, ends.clamp(max=path.shape[1] - 1)[:, None])
        token = tree.tokens.gather(1, beyond)[:, 0]
        return replace(
            acceptance,
            length=torch.minimum(length, ends),
            next_token=torch.where(ends < length, token, acceptance.next_token),
        )
