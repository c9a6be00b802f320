"""drafter=eagle3, eagle and peagle: a recurrent head over the target's hidden states."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier
from specdec.drafters.heads import CachedHeadDrafter
from specdec.heads.layered import LayeredHead
from specdec.heads.paged import PagedHead
from specdec.heads.paged_mtp import PagedMTP
from specdec.heads.parallel import ParallelHead
from specdec.heads.recurrent import MTPHead
from specdec.kernels.layout import pack_bits
from specdec.models.paged import PagedLM
from specdec.observation import Observation
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class Eagle(CachedHeadDrafter):
    """Drafts with a head of the EAGLE kind (Li et al. 2024, 2025), on any tree and with the
    probabilities that children are really drawn from.

    Each draft begins by reading the pairs that the last step added: one pass over as many as a
    step may add. The pairs of drafted nodes are made of the head's own states.

    Args, Raises: those of `HeadDrafter`.
    """

    model: PagedHead | PagedMTP
    _news: Tensor  # [rows, W] tokens of the pairs whose states are noted
    _prompts: dict[int, tuple[int, list[int]]]  # by row: tokens read so far, and all

    def _use(self, head: LayeredHead, target: PagedLM) -> None:
        super()._use(head, target)
        if isinstance(head, MTPHead) and len(head.later):
            self.model = PagedMTP(head, target)
            self.page_successors = len(self.model.each)
        else:
            self.model = PagedHead(head, target)

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        if self.levels:
            rows, device = capacity.rows + 1, self.model.device
            self._news = torch.zeros(rows, self._width, dtype=torch.int64, device=device)
            self._prompts = {}

    # Prompts

    def _join(self, sequence: Decoding) -> None:
        super()._join(sequence)
        # The root has no pair until a prompt is read; of one token there is nothing to read.
        row = sequence.row
        self._news[row, 0], self._states[row, 0] = sequence.tokens[-1], 0
        self._prompts[row] = sequence.found, list(sequence.tokens)

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        """Read the pairs of this part of the prompts. The pair that ends in the root is the next
        draft's."""
        if not self.levels:
            return
        states = self._joined_states(seen)
        parts, counts = [], []
        for place, (row, count) in enumerate(zip(rows.tolist(), length.tolist(), strict=True)):
            start, prompt = self._prompts[row]
            end = start + count
            self._prompts[row] = end, prompt
            parts.append(prompt[start + 1 : end + 1] + [0] * (tokens.shape[1] - count))
            if end + 1 == len(prompt):
                self._states[row, 0] = states[place, count - 1]
                self._count[row] = 1
                del self._prompts[row]
                count -= 1
            counts.append(count)
        cache, head, device = self.model.cache, self.head, rows.device
        following, known = torch.tensor(parts, device=device), torch.tensor(counts, device=device)
        chain = torch.arange(tokens.shape[1], device=device).expand_as(following)
        with cache.scratch_apart(len(parts), tokens.shape[1]):
            self.model.forward(rows, head.embed(following), head.fuse(states), chain)
            cache.append(rows, None, known, tokens.shape[1])
        self._offer(rows)

    def finish(self, sequence: Decoding) -> None:
        super().finish(sequence)
        if self.levels:
            self._prompts.pop(sequence.row, None)

    # Steps

    def begin(self, context: StepContext) -> Expand:
        feature, normal = self.catch_up(context.rows)  # [B, 1, D], of the root
        features = [feature]  # [B, F, D] of each level: what its nodes hand on to their children
        parents: list[Tensor] = []  # of the nodes that have scratch rows, level by level

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            last = normal
            if frontier.level:
                parents.append(frontier.parents - 1)  # expanded node n has scratch row n - 1
                known = torch.cat(features, dim=1)
                index = frontier.parents[..., None].expand(-1, -1, known.shape[2])
                structure = context.kernels.tree_structure(torch.cat(parents, dim=1))
                first = frontier.first - 1
                made, last = self.model.forward(
                    context.rows,
                    self.head.embed(frontier.tokens),
                    known.gather(1, index),
                    structure.depths[:, first:],
                    ancestors=structure.ancestors[:, first:],
                    first=first,
                    key_offsets=structure.depths,
                )
                features.append(made)
            ids, probs = self.candidates_after(
                context, self.model.logits(last), frontier.level, self.head.drafts
            )
            return self._named(ids), probs

        return expand

    def catch_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read what was noted, and commit it: the feature and the normed state after the last
        pair, [B, 1, D] each."""
        states, count = self._noted(rows)
        news = self._news[rows, : states.shape[1]]
        chain = torch.arange(news.shape[1], device=rows.device).expand_as(news)
        head = self.head
        feature, normal = self.model.forward(rows, head.embed(news), head.fuse(states), chain)
        self.model.cache.append(rows, None, count, news.shape[1])
        last = (count - 1).clamp(min=0)[:, None, None]
        feature = feature.gather(1, last.expand(-1, -1, feature.shape[2]))
        return feature, normal.gather(1, last.expand(-1, -1, normal.shape[2]))

    def note(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        # Pair i is the state at node i of the path with new token i: the root comes first.
        super().note(context, tree, acceptance, seen)
        self._news[context.rows, : acceptance.path.shape[1]] = acceptance.new_tokens(tree)


class Eagle3(Eagle):
    """EAGLE-3 and EAGLE-3.1, in the layouts of SafeAILab, SpecForge, DeepSpec and speculators."""

    kind = "eagle3"


class PEagle(Eagle):
    """P-EAGLE, in the layouts of speculators and SpecForge: one pass reads the pairs that the last
    step added and answers all levels, so that all nodes of a level have the same candidates."""

    kind = "peagle"
    head: ParallelHead

    def _use(self, head: Any, target: PagedLM) -> None:
        super()._use(head, target)
        # Masked pairs stand at places that others of the pass have too, which exact sums forbid.
        self.model = PagedHead(head, target, kernels=replace(target.kernels, exact=False))

    def begin(self, context: StepContext) -> Expand:
        states, count = self._noted(context.rows)
        head, width, further = self.head, states.shape[1], self.levels - 1
        device, batch = states.device, len(states)
        embedded, feature = (x.expand(batch, further, -1) for x in head.masked())
        news = self._news[context.rows, :width]
        steps = torch.arange(width + further, device=device)
        known = count.clamp(min=1)[:, None]  # pairs that stand in for what was read
        offsets = torch.where(steps < width, steps, steps - width + known)  # [B, W + L - 1]
        # A pair sees itself and those before it, a masked one no pair that does not count.
        seen = steps <= steps[:, None]
        seen = seen & ((steps < known) | (steps >= width))[:, None] | torch.eye(
            len(steps), dtype=torch.bool, device=device
        )
        _, normal = self.model.forward(
            context.rows,
            torch.cat([head.embed(news), embedded], dim=1),
            torch.cat([head.fuse(states), feature], dim=1),
            offsets,
            ancestors=pack_bits(seen),
        )
        self.model.cache.append(context.rows, None, count, width)
        last = (known - 1)[..., None].expand(-1, -1, normal.shape[2])
        read = torch.cat([normal.gather(1, last), normal[:, width:]], dim=1)
        return self._in_levels(context, self.model.logits(read.contiguous()))


class Eagle1(Eagle):
    """EAGLE, EAGLE-2 and HASS, in the layouts of SafeAILab and speculators."""

    kind = "eagle"
