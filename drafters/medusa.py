"""drafter=medusa: heads that name a token of each depth from one state of the target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.drafters.logits import candidates_of
from specdec.heads.formats import load_head
from specdec.heads.medusa import MedusaHeads
from specdec.heads.medusa_files import heads_of
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class Medusa(GrowingDrafter):
    """Drafts with Medusa heads (Cai et al. 2024), all of them in one pass at the start of a draft.

    Head i names the token i + 1 places below the root, from the state of the last token that has
    one, which stands before the root. It knows nothing of the nodes in between: all nodes of a
    level have the same candidates, each drawing its own children of them. Their probabilities are
    the heads', so that the rules stay lossless; Medusa's own acceptance is `acceptance=typical`.

    Args:
        path: folder or hub id of heads in any published layout, or zoo:NAME.
        depth: levels of the tree, at most the heads there are; None takes as many as there are
            heads, or fewer if the policy likes.
        candidates: as in `SmallLlama`.
        widen: as in `Eagle`.

    Raises:
        ValueError: a setting out of range, files that are no Medusa heads, or heads of another
            target; a tree that is deeper than there are heads.
    """

    sampled_children = True
    reads_states = True

    def __init__(
        self, *, path: str, depth: int | None = None, candidates: int = 64, widen: bool = True
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        self.path, self.widen, self._wanted = path, widen, depth
        self.heads: MedusaHeads
        self.device: torch.device
        self.dtype: torch.dtype
        self._policy: TreePolicy | None = None  # of the last check
        self._state: Tensor  # [rows, H] of the token before the root, zero if there is none
        self._tree: TokenTree  # of the last draft

    def check(self, tree: TreePolicy) -> None:
        self._policy = tree
        try:
            super().check(tree)
        except ValueError:
            if self.depth == self._wanted:
                raise
            raise ValueError(
                f"drafter.path={self.path}: has {self.depth} heads, each for a level, and the "
                f"tree has {tree.levels(None)} levels; choose a shallower one"
            ) from None

    def find(self) -> None:
        count = heads_of(self.path, "drafter.path")
        if count is not None:
            self._limit(count)
        if self._policy is not None:
            self.check(self._policy)

    def _limit(self, heads: int) -> None:
        """So many heads there are."""
        if self._wanted is not None and self._wanted > heads:
            raise ValueError(
                f"drafter.depth={self._wanted}: drafter.path={self.path} has {heads} heads, each "
                f"for a level; choose at most so many"
            )
        self.depth = self._wanted or heads

    def load(self, target: PagedLM, models: Models) -> None:
        heads = load_head(
            self.path, target, kinds=("medusa",), setting="drafter.path", widened=self.widen
        )
        assert isinstance(heads, MedusaHeads)  # of this kind
        self._use(heads, target)
        self.notes = {"drafter.path": str(heads.description)}

    def _use(self, heads: MedusaHeads, target: PagedLM) -> None:
        self._limit(heads.config.heads)
        target.check_taps(heads.config.taps, f"drafter.path={self.path}")
        heads.kernels = target.kernels.on(target.device)
        self.heads = heads
        self.device, self.dtype = target.device, target.dtype
        self.observes = Observes(taps=heads.config.taps, prompts=True)
        self.candidates = min(self.candidates, heads.drafts)

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        self._state = torch.zeros(
            capacity.rows + 1, self.heads.width, dtype=self.dtype, device=self.device
        )

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        for sequence in sequences:  # of a prompt of one token nothing will be read
            self._state[sequence.row] = 0
        return sequences

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        self._note(rows, length - 1, seen)

    def begin(self, context: StepContext) -> Expand:
        logits = self.heads.logits(self._state[context.rows], self.levels)  # [B, levels, V]

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            level, nodes = frontier.level, frontier.tokens.shape[1]
            ids, probs = candidates_of(
                context,
                logits[:, level : level + 1],
                self.tree,
                level,
                candidates=self.candidates,
                vocab=self.heads.drafts,
            )
            if self.heads.names is not None:
                ids = self.heads.names[ids]
            return ids.repeat(1, nodes, 1), probs.repeat(1, nodes, 1)

        return expand

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        self._tree = tree
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self.levels:
            self.follow(context, self._tree, acceptance, seen)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        last = (acceptance.length - 1).clamp(min=0)[:, None]  # idle rows have none
        self._note(context.rows, acceptance.path.gather(1, last)[:, 0], seen)

    def _note(self, rows: Tensor, place: Tensor, seen: Observation) -> None:
        """The state at node or token `place` [B] is the newest."""
        states = seen.states[self.heads.config.taps[0]][..., : self.heads.width]
        index = place[:, None, None].expand(-1, -1, states.shape[2])
        self._state[rows] = states.gather(1, index)[:, 0]
