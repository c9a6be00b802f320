"""drafter=eagle3, drafter=eagle: a recurrent head over the target's hidden states."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specdec.cache import CacheFullError
from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.drafters.logits import candidates_of
from specdec.heads.formats import find_head, load_head
from specdec.heads.paged import PagedHead
from specdec.heads.recurrent import RecurrentHead
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes, Tap
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class Eagle(GrowingDrafter):
    """Drafts with a head of the EAGLE kind (Li et al. 2024, 2025), on any tree and with the
    probabilities that children are really drawn from.

    Each draft begins by reading what the last step added, with the states that the target had
    there: one pass over as many pairs as a step may add. The pairs of drafted nodes, made of the
    head's own states, lie in the scratch and are thrown away (keeping them costs 8 to 15 % of the
    accepted length, vllm-project/vllm#14649).

    Args:
        path: folder or hub id of a head in any published layout, or zoo:NAME.
        taps: the states it reads, by number of layers passed, if its files are not to be believed.
        depth: levels of the tree; None leaves it to the policy.
        candidates: as in `SmallLlama`.
        rope_theta: base of its rotary angles; None for the head's own.
        widen: on a stand-in, a head of its small model gets the size of published ones; False
            leaves it small, a lower limit of what heads cost.

    Raises:
        ValueError: a setting out of range, files that are no such head, or a head of another
            target.
    """

    sampled_children = True
    reads_states = True
    kind: ClassVar[str]

    def __init__(
        self,
        *,
        path: str,
        taps: list[Tap] | None = None,
        depth: int | None = None,
        candidates: int = 64,
        rope_theta: float | None = None,
        widen: bool = True,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        self.path, self.taps, self.rope_theta, self.widen = path, taps, rope_theta, widen
        self.head: RecurrentHead
        self.model: PagedHead
        # Of each cache row: what the next draft reads first, tokens and joined states of pairs.
        self._news: Tensor  # [rows, W]
        self._states: Tensor  # [rows, W, taps * H]
        self._count: Tensor  # [rows]
        self._prompts: dict[int, tuple[int, list[int]]] = {}  # by row: tokens read so far, and all
        self._tree: TokenTree  # of the last draft

    def find(self) -> None:
        find_head(self.path, "drafter.path")

    def load(self, target: PagedLM, models: Models) -> None:
        head = load_head(
            self.path,
            target,
            kinds=(self.kind,),
            setting="drafter.path",
            taps=self.taps,
            rope_theta=self.rope_theta,
            widened=self.widen,
        )
        assert isinstance(head, RecurrentHead)  # of these kinds
        target.check_taps(head.config.taps, f"drafter.path={self.path}")
        self.head, self.model = head, PagedHead(head, target)
        self.notes = {"drafter.path": head.description}
        self.observes = Observes(taps=head.config.taps, prompts=True)
        self.candidates = min(self.candidates, head.drafts)

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        if not self.levels:
            return
        self.model.prepare(capacity)
        known = self.head.config.layer.max_position_embeddings
        if capacity.max_tokens > known:
            said = (
                f"{self.head.description}; it knows {known:,} positions and drafts worse past them"
            )
            self.notes = {"drafter.path": said}
        config, rows = self.head.config, capacity.rows + 1
        width = (self._joined or self.levels) + 1
        device, dtype = self.model.device, self.model.dtype
        self._news = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self._count = torch.zeros(rows, dtype=torch.int64, device=device)
        size = len(config.taps) * config.state_size
        self._states = torch.zeros(rows, width, size, dtype=dtype, device=device)
        self._prompts = {}

    # Prompts

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        if not self.levels:
            return sequences
        taken = []
        for sequence in sequences:
            tokens = min(sequence.request.max_tokens, self.model.cache.max_tokens)
            try:
                self.model.cache.open(sequence.row, tokens=tokens)
            except CacheFullError:
                break
            # The root has no pair until a prompt is read; of one token there is nothing to read.
            row = sequence.row
            self._news[row, 0], self._states[row, 0], self._count[row] = sequence.tokens[-1], 0, 0
            self._prompts[row] = 0, list(sequence.tokens)
            taken.append(sequence)
        return taken

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
        cache, device = self.model.cache, rows.device
        following, known = torch.tensor(parts, device=device), torch.tensor(counts, device=device)
        chain = torch.arange(tokens.shape[1], device=device).expand_as(following)
        with cache.scratch_apart(len(parts), tokens.shape[1]):
            self.model.forward(rows, following, self.head.fuse(states), chain)
            cache.append(rows, None, known, tokens.shape[1])

    def finish(self, sequence: Decoding) -> None:
        if self.levels:
            self._prompts.pop(sequence.row, None)
            self.model.cache.close(sequence.row)

    # Steps

    def begin(self, context: StepContext) -> Expand:
        feature, normal = self._catch_up(context.rows)  # [B, 1, D], of the root
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
                    frontier.tokens,
                    known.gather(1, index),
                    structure.depths[:, first:],
                    ancestors=structure.ancestors[:, first:],
                    first=first,
                    key_offsets=structure.depths,
                )
                features.append(made)
            ids, probs = candidates_of(
                context,
                self.model.logits(last),
                self.tree,
                frontier.level,
                candidates=self.candidates,
                vocab=self.head.drafts,
            )
            return ids if self.head.names is None else self.head.names[ids], probs

        return expand

    def _catch_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read what was noted, and commit it: the feature and the normed state after the last
        pair, [B, 1, D] each."""
        news, states, count = self._news[rows], self._states[rows], self._count[rows]
        if self.model.looks:  # where a look is free, and a narrower pass cheaper
            width = max(1, int(count.max()))
            news, states = news[:, :width], states[:, :width]
        chain = torch.arange(news.shape[1], device=rows.device).expand_as(news)
        feature, normal = self.model.forward(rows, news, self.head.fuse(states), chain)
        self.model.cache.append(rows, None, count, news.shape[1])
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, -1, feature.shape[2])
        return feature.gather(1, last), normal.gather(1, last)

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        self._tree = tree
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self.levels:
            self.follow(context, self._tree, acceptance, seen)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        # Pair i is the state at node i of the path with new token i: the root comes first.
        states = self._joined_states(seen)
        index = acceptance.path[..., None].expand(-1, -1, states.shape[2])
        width, rows = acceptance.path.shape[1], context.rows
        self._news[rows, :width] = acceptance.new_tokens(tree)
        self._states[rows, :width] = states.gather(1, index)
        self._count[rows] = acceptance.length

    def _joined_states(self, seen: Observation) -> Tensor:
        """[B, N, taps * H]."""
        config = self.head.config  # of a stand-in that has a small head, H are the first numbers
        found = [seen.states[tap][..., : config.state_size] for tap in config.taps]
        return torch.cat(found, dim=-1)


class Eagle3(Eagle):
    """EAGLE-3 and EAGLE-3.1, in the layouts of SafeAILab, SpecForge, DeepSpec and speculators."""

    kind = "eagle3"


class Eagle1(Eagle):
    """EAGLE, EAGLE-2 and HASS, in the layouts of SafeAILab and speculators."""

    kind = "eagle"
