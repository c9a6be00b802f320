"""Growing token trees level by level: candidates from a drafter, decisions from a tree policy.

Legend: B sequences, F nodes expanded at a level, K candidates, C = F * width new nodes of a level,
T nodes of all levels with the root, N nodes of the finished tree, E expanded nodes of all levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.drafters.logits import candidates_of
from specdec.kernels.reference.growth import DEAD
from specdec.observation import Observation
from specdec.protocols import (
    Drafter,
    Growth,
    StepContext,
    TreePolicy,
    check_depth,
    levels_of,
)
from specdec.request import Capacity
from specdec.sampling import DRAFT_STREAM, draw, race
from specdec.tree import PADDING, ROOT, Acceptance, Children, Proposal, TokenTree


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Frontier:
    """The nodes of one level that are to get children, padded with dead slots.

    Args:
        level: their depth; 0 is the root.
        first: number of the first of them among all expanded nodes; the root is 0.
        tokens: [B, F] int64.
        parents: [B, F] int64, each node's parent, numbered likewise.
        alive: [B, F] bool, False for dead slots.
    """

    level: int
    first: int
    tokens: Tensor
    parents: Tensor
    alive: Tensor


Expand = Callable[[Frontier], tuple[Tensor, Tensor]]
"""A drafter's answer to a frontier: candidate ids [B, F, K], none twice for a node, and their
probabilities [B, F, K] in descending order, zero where there are fewer than K. They sum to 1 if
children are to be sampled."""


class ShapedDrafter(Drafter):
    """A drafter whose trees a policy shapes.

    Args:
        depth: levels of the tree; None leaves it to the policy.
        candidates: children considered per node when they are sampled.

    Attributes:
        composable: False if it cannot guess for trees that others have a part in. A class that
            has a `draft` or, on the host, a `commit` of its own, or on the device a `commit`
            without `follow`, is not, unless it says that it is.
        mend: what to do instead where it is not composable.
        most_candidates: the limit of `candidates`, if it has to be stated before the vocabulary
            is known.
        tree, levels: the policy of the run, and the levels to grow; 0 turns drafting off.

    Raises:
        ValueError: a setting out of range.
    """

    composable = True
    mend = "choose another drafter"
    most_candidates: int | None = None
    tree: TreePolicy
    levels: int

    def __init__(self, *, depth: int | None = None, candidates: int = 16) -> None:
        if depth is not None and depth < 1:
            raise ValueError(
                f"drafter.depth={depth}: must be at least 1, or null; tree.budget=0 drafts nothing"
            )
        check_depth(depth, "drafter.depth")
        if candidates < 1:
            raise ValueError(f"drafter.candidates={candidates}: must be at least 1")
        most = self.most_candidates
        if most is not None and candidates > most:
            raise ValueError(f"drafter.candidates={candidates}: must be at most {most}")
        self.depth, self.candidates = depth, candidates
        self._joined: int | None = None  # levels of the trees it has a part in

    def join(self, levels: int) -> None:
        """Before `prepare`: it becomes a part of a composition, whose trees have up to so many
        levels."""
        self._joined = levels

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        self.tree = tree
        if self._joined is None:
            self.levels = levels_of(tree, self.depth)
        else:
            self.levels = min(self._joined, self.depth or self._joined)


class GrowingDrafter(ShapedDrafter):
    """A drafter that has an answer for any frontier, on the device: what it drafts is grown.

    Such drafters can be composed, because they need not have proposed what they continue.
    """

    on_device = True
    fills_scratch = False  # True if its draft lies in the scratch of the target's cache
    layers = 0  # of the target's first ones, which it has run and verification skips

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        alone = (cls.commit is Drafter.commit) != (cls.follow is GrowingDrafter.follow)
        if alone and "composable" not in vars(cls):
            cls.composable = False  # a composition calls the one or the other

    def begin(self, context: StepContext) -> Expand:
        """Get ready for the trees of this step: what answers their frontiers."""
        raise NotImplementedError

    def candidates_after(
        self, context: StepContext, logits: Tensor, level: int, vocab: int
    ) -> tuple[Tensor, Tensor]:
        """What `Expand` returns, for logits [B, F, V] after nodes of a level, as
        `logits.candidates_of` makes it for the tree of this run."""
        return candidates_of(
            context, logits, self.tree, level, candidates=self.candidates, vocab=vocab
        )

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        """The trees are grown; `expanded` as `grow` returns it."""
        return tree

    def sureness(self, frontier: Frontier) -> Tensor | None:
        """[B, F], the chance that a child of these nodes is accepted, if the drafter knows it
        apart from its probabilities: a factor of them for the policy, and for nobody else. Of the
        frontier that was answered last."""
        return None

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        """Instead of `commit`, after a step without `begin`: others drafted these trees."""

    def draft(self, context: StepContext) -> TokenTree:
        if not self.levels:
            return TokenTree.roots(context.roots)
        expand, sure = self.begin(context), self.sureness
        return self.end(context, *grow(self.tree, self.levels, context, expand, sure=sure))


def grow(
    policy: TreePolicy,
    levels: int,
    context: StepContext,
    expand: Expand,
    *,
    most: int | None = None,
    sure: Callable[[Frontier], Tensor | None] = lambda frontier: None,
) -> tuple[TokenTree, Tensor]:
    """Grow one tree per sequence.

    On a GPU nothing waits for the device and no shape depends on what is drafted, so that all of
    it may be captured in a CUDA graph. (Long because a level hands nine lists on to the next,
    and cut in two the reader would have to carry them.)

    Args:
        most: no tree will have more nodes, the root included; None if only the budget is known.
        sure: as `GrowingDrafter.sureness`.

    Returns:
        (the trees; expanded [B, N] int64: each node's number among the expanded nodes, -1 if it
            was not.)
    """
    if policy.children == "top_k" and policy.takes_all:
        return _grow_all(policy, levels, context, expand, most)
    sampled = policy.children != "top_k"
    kernels = context.kernels
    frontier = _root(context)
    # Of the frontier's nodes: place among the T nodes, log of the cumulative probability.
    index = torch.zeros_like(frontier.tokens)
    score = torch.zeros_like(index, dtype=torch.float64)
    # [B, C] of each level
    tokens, parents, scores = [frontier.tokens], [frontier.parents], [score]
    expanded: list[tuple[Tensor, Tensor]] = []  # [B, F] of each level: index, alive
    supports: list[tuple[Tensor, Tensor]] = []  # ids and probs [B, F, K] of each level
    total, offered = 1, tuple[int, ...]()
    for level in range(levels):
        ids, probs = expand(frontier)
        expanded.append((index, frontier.alive))
        supports.append((ids, probs))
        width = min(policy.width(level), ids.shape[2])
        offered = (*offered, width)
        at = Growth(level=level, levels=levels, offered=offered, sampled=sampled, kernels=kernels)
        known = _weighed(probs, sure(frontier))
        slots = kernels.extend(score, known[..., :width])  # [B, F, width]
        selected = policy.select(at, slots)
        if sampled:
            chosen = (slots > DEAD) & (True if selected is None else selected)
            drawn = _draw_children(context, level, policy.children, probs, width)
            ids = ids.gather(2, drawn)
            slots = kernels.extend(score, known.gather(2, drawn))
            chosen = torch.arange(width, device=ids.device) < chosen.sum(-1, keepdim=True)
        tokens.append(ids[..., :width].flatten(1))
        parents.append(index[..., None].expand(-1, -1, width).flatten(1))
        if sampled:
            slots = slots.masked_fill(~chosen, DEAD)
        elif selected is not None:
            slots = slots.masked_fill(~selected, DEAD)
        scores.append(slots.flatten(1))
        if level + 1 == levels:
            break
        if policy.children == "sample_with_replacement":
            slots = slots.masked_fill(_repeated(ids), DEAD)
        growing = slots.flatten(1)  # [B, C]
        place = policy.expand(at, growing)
        if place is None:
            score, grown = growing, tokens[-1]
            place = torch.arange(growing.shape[1], device=growing.device).expand_as(growing)
        else:
            score, grown = growing.gather(1, place), tokens[-1].gather(1, place)
        frontier = Frontier(
            level=level + 1,
            first=frontier.first + frontier.tokens.shape[1],
            tokens=grown,
            parents=frontier.first + place // width,
            alive=score > DEAD,
        )
        index, total = total + place, total + growing.shape[1]

    every = torch.cat(scores, dim=1)  # [B, T]
    kept = every > DEAD
    if not sampled:
        best = policy.keep(every[:, 1:], kernels)  # the root is not theirs to judge
        if best is not None:
            kept[:, 1:] &= best
    tree, order = _compact(context, policy.budget + 1, most, levels, tokens, parents, kept)
    places, alive = (torch.cat(parts, dim=1) for parts in zip(*expanded, strict=True))
    number = _numbers(places.masked_fill(~alive, -1), every.shape[1]).gather(1, order)  # [B, N]
    number = number.masked_fill(tree.parents == PADDING, -1)
    return replace(tree, proposal=_proposal(supports, number, policy.children)), number


def _grow_all(
    policy: TreePolicy, levels: int, context: StepContext, expand: Expand, most: int | None
) -> tuple[TokenTree, Tensor]:
    """`grow` for a policy that takes the most probable tokens however probable they are: every
    node is expanded, so its place among the T nodes is its number too, and no score is needed."""
    frontier = _root(context)
    tokens, parents, alive = [frontier.tokens], [frontier.parents], [frontier.alive]  # [B, C]
    supports: list[tuple[Tensor, Tensor]] = []  # ids and probs [B, F, K] of each level
    total = 1
    for level in range(levels):
        ids, probs = expand(frontier)
        supports.append((ids, probs))
        width = min(policy.width(level), ids.shape[2])
        tokens.append(ids[..., :width].flatten(1))
        alive.append((frontier.alive[..., None] & (probs[..., :width] > 0)).flatten(1))
        index = torch.arange(frontier.first, total, device=ids.device)
        parents.append(index[:, None].expand(-1, width).flatten().expand_as(tokens[-1]))
        frontier = Frontier(
            level=level + 1, first=total, tokens=tokens[-1], parents=parents[-1], alive=alive[-1]
        )
        total += tokens[-1].shape[1]

    kept = torch.cat(alive, dim=1)
    tree, order = _compact(context, policy.budget + 1, most, levels, tokens, parents, kept)
    leaf = order >= frontier.first
    number = order.masked_fill(leaf | (tree.parents == PADDING), -1)
    return replace(tree, proposal=_proposal(supports, number, policy.children)), number


def _weighed(probs: Tensor, factor: Tensor | None) -> Tensor:
    return probs if factor is None else probs * factor[..., None]


def _root(context: StepContext) -> Frontier:
    tokens = context.roots[:, None]
    return Frontier(
        level=0,
        first=0,
        tokens=tokens,
        parents=torch.full_like(tokens, ROOT),
        alive=torch.ones_like(tokens, dtype=torch.bool),
    )


def _repeated(ids: Tensor) -> Tensor:
    """[B, F, width] bool: the same token stands earlier among the siblings.

    The rule never enters such a node, so growing it further would be wasted.
    """
    return (ids[..., None] == ids[..., None, :]).tril(-1).any(-1)


def _draw_children(
    context: StepContext, level: int, children: Children, probs: Tensor, width: int
) -> Tensor:
    """[B, F, width] int64 places in the support [B, F, K], drawn from it in this order."""
    batch, nodes, support = probs.shape
    stream = DRAFT_STREAM + level
    if children == "sample":
        arrival = race(probs, context.uniforms(stream, nodes * support).view(probs.shape))
        return arrival.topk(width, largest=False).indices
    shape = batch, nodes, width, support
    coins = context.uniforms(stream, nodes * width * support).view(shape)
    return draw(probs[:, :, None].expand(shape), coins)


def _compact(
    context: StepContext,
    budget: int,
    most: int | None,
    levels: int,
    tokens: list[Tensor],
    parents: list[Tensor],
    kept: Tensor,
) -> tuple[TokenTree, Tensor]:
    """Drop what is not kept: (trees, order [B, N]: where each node stood).

    Args:
        budget, most: nodes of a tree at most, the root included.
        tokens, parents: [B, C] of each level.
        kept: [B, T].
    """
    # Where a look at the sizes is free, a smaller tree is cheaper to verify.
    if context.kernels.LOOKS:
        nodes = int(kept.sum(-1).max())
    else:
        nodes = min(budget if most is None else most, budget, kept.shape[1])
    new_tokens, new_parents, size, order = context.kernels.compact(
        torch.cat(tokens, dim=1), torch.cat(parents, dim=1), kept, nodes
    )
    depth = min(levels, nodes - 1)
    return TokenTree(tokens=new_tokens, parents=new_parents, size=size, depth=depth), order


def _numbers(expanded: Tensor, total: int) -> Tensor:
    """[B, E] index of each expanded node to [B, T] number of each node among the expanded ones, -1
    for none."""
    batch, count = expanded.shape
    numbers = torch.full((batch, total + 1), -1, dtype=torch.int64, device=expanded.device)
    target = torch.where(
        expanded < 0, total, expanded
    )  # dead slots all write to the extra last place
    place = torch.arange(count, device=expanded.device).expand(batch, -1)
    return numbers.scatter(1, target, place)[:, :total]


def _proposal(
    supports: list[tuple[Tensor, Tensor]], number: Tensor, children: Children
) -> Proposal:
    """Each node's support ([B, F, K] of its level), found by its number ([B, N]) among the
    expanded nodes."""
    ids, probs = padded_cat(supports)  # [B, E, K]
    index = number.clamp(min=0)[..., None].expand(-1, -1, ids.shape[2])
    unexpanded = (number < 0)[..., None]
    return Proposal(
        ids=ids.gather(1, index),
        probs=probs.gather(1, index).masked_fill(unexpanded, 0.0),
        children=children,
    )


def padded_cat(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of tensors [B, F, k], put together: two of [B, E, K], with zeros where k was less."""
    most = max(first.shape[2] for first, _ in pairs)

    def padded(part: Tensor) -> Tensor:
        missing = most - part.shape[2]
        return torch.nn.functional.pad(part, (0, missing)) if missing else part

    first, second = (
        torch.cat([padded(p) for p in parts], 1) for parts in zip(*pairs, strict=True)
    )
    return first, second
