"""drafter=early_exit: the target's own first layers."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.protocols import StepContext
from specdec.tree import Begun, TokenTree


class EarlyExit(GrowingDrafter):
    """Drafts with the target's first layers, its norm and its output head (LayerSkip, Elhoushi et
    al. 2024, section 4), on trees.

    The keys and values of a draft go to the scratch of the target's own cache and its hidden
    states are kept, so that verification goes on where the draft has stopped (LayerSkip's cache
    reuse, section 4.3): a verified node passes each layer of the target once. Nodes nobody was
    drafted after go through the first layers when the tree is complete, without the output head.

    Args:
        exit_layer: how many layers draft; None is a third of them. Good ones are those the model
            was trained to leave at.
        depth: levels of the tree; None leaves it to the policy.
        candidates: as in `SmallLlama`.

    Raises:
        ValueError: a setting out of range, or a model whose layers cannot be run in part.
    """

    sampled_children = True
    fills_scratch = True

    def __init__(
        self,
        *,
        exit_layer: int | None = None,
        depth: int | None = None,
        candidates: int = 64,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        self.exit_layer = exit_layer
        self.lm: PagedLM
        self._nodes: _Nodes  # of the step

    def load(self, target: PagedLM, models: Models) -> None:
        target.check_in_part("drafter=early_exit")
        layers = max(1, target.layers // 3) if self.exit_layer is None else self.exit_layer
        if not 1 <= layers < target.layers:
            raise ValueError(
                f"drafter.exit_layer={self.exit_layer}: must be from 1 to {target.layers - 1}, "
                f"the target has {target.layers} layers"
            )
        self.lm, self.layers = target, layers
        self.candidates = min(self.candidates, target.vocab_size)

    def begin(self, context: StepContext) -> Expand:
        self._nodes = nodes = _Nodes(self.lm, self.layers, context)

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            logits = nodes.add(frontier.tokens, frontier.parents, head=True)
            assert logits is not None
            return self.candidates_after(context, logits, frontier.level, self.lm.vocab_size)

        return expand

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        nodes = self._nodes
        first = nodes.count
        # In a composition nodes may lie deeper than this drafter goes.
        slots = expanded.masked_fill(expanded >= first, -1)
        left = (slots < 0) & (tree.parents >= 0)  # [B, N], in the tree and not yet run
        last = context.kernels.places(left, self._most_left(tree, left))  # [B, U]
        own = torch.arange(first, first + last.shape[1], device=last.device).expand_as(last)
        # Where fewer are left, nodes that have been run take the places, and keep their slots.
        slots = slots.scatter(
            1, last, torch.where(left.gather(1, last), own, slots.gather(1, last))
        )
        parents = tree.parents.long().gather(1, last).clamp(min=0)
        nodes.add(tree.tokens.gather(1, last), slots.gather(1, parents).clamp(min=0), head=False)
        hidden = nodes.arrange(slots.clamp(min=0))
        del self._nodes  # and with it the target's cache
        return replace(tree, begun=Begun(layers=self.layers, hidden=hidden))

    def _most_left(self, tree: TokenTree, left: Tensor) -> int:
        """How many nodes of a tree may not have been expanded."""
        if self.lm.looks:
            return max(1, int(left.sum(1).max()))
        if self.tree.takes_all:
            return max(1, tree.nodes - self._nodes.count)
        return tree.nodes - 1


class _Nodes:
    """The nodes of a step that have gone through the first layers, in the order they did; their
    keys and values are in the scratch of the target's cache."""

    def __init__(self, lm: PagedLM, layers: int, context: StepContext) -> None:
        assert context.cache is not None
        self.lm, self.layers, self.cache, self.context = lm, range(layers), context.cache, context
        self.parents: list[Tensor] = []  # [B, F] each, among these nodes
        self.hidden: list[Tensor] = []  # [B, F, H] each
        self.count = 0

    def add(self, tokens: Tensor, parents: Tensor, *, head: bool) -> Tensor | None:
        """Run [B, F] more of them: [B, F, V] logits, or None without the output head."""
        first = self.count
        self.parents.append(parents)
        self.count += tokens.shape[1]
        structure = self.context.kernels.tree_structure(torch.cat(self.parents, dim=1))
        logits, hidden = self.lm.forward_layers(
            self.cache,
            self.context.rows,
            tokens,
            structure.depths[:, first:],
            self.layers,
            ancestors=structure.ancestors[:, first:],
            first=first,
            key_offsets=structure.depths,
            logits="all" if head else "none",
        )
        self.hidden.append(hidden)
        return logits

    def arrange(self, slots: Tensor) -> Tensor:
        """Put the keys and values of the nodes `slots` [B, N] first, in this order.

        Returns:
            [B, N, H], their hidden states.
        """
        batch, nodes = slots.shape
        self.cache.scratch(batch, nodes)
        for scratch in self._scratch():
            own = scratch[:, :batch, :, : self.count]  # [E, B, HKV, M, D]
            index = slots[None, :, None, :, None].expand(*own.shape[:3], nodes, own.shape[4])
            scratch[:, :batch, :, :nodes] = own.gather(3, index)
        hidden = torch.cat(self.hidden, dim=1)
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[2]))

    def _scratch(self) -> Iterator[Tensor]:
        for scratch in (self.cache.tree_keys, self.cache.tree_values):
            yield scratch[self.layers.start : self.layers.stop]
