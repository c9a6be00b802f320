"""drafter=own_cache: the target over a part of its own cache."""

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.protocols import StepContext


class OwnCache(GrowingDrafter):
    """Drafts with the whole target over the first and the last pages of each sequence: what
    StreamingLLM keeps (Xiao et al. 2024), as a draft (MagicDec, Chen et al. 2024, section 4).

    A pass reads all weights but little of the context, so it pays where the keys and values of a
    batch are most of what a step reads. Nothing is copied, and there is no second cache: a draft
    sees the target's pages through a shorter page table, and its own keys and values lie in the
    scratch, where verification, which computes every node again with all pages in sight, puts its
    own.

    Args:
        sink, window: tokens at the beginning of a sequence and at its end that a draft sees, in
            whole pages.
        depth: levels of the tree; None leaves it to the policy.
        candidates: as in `SmallLlama`.

    Raises:
        ValueError: a setting out of range, more tokens than the target has positions, or a target
            with sliding windows.
    """

    sampled_children = True
    fills_scratch = True

    def __init__(
        self,
        *,
        sink: int = 16,
        window: int = 1024,
        depth: int | None = None,
        candidates: int = 64,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        for name, value in {"sink": sink, "window": window}.items():
            if value < 0:
                raise ValueError(f"drafter.{name}={value}: must be at least 0 tokens")
        if not sink + window:
            raise ValueError(
                "drafter.window=0: with drafter.sink=0 a draft sees nothing; raise one of them"
            )
        self.sink, self.window = sink, window
        self.lm: PagedLM

    def load(self, target: PagedLM, models: Models) -> None:
        target.check_views("drafter=own_cache")
        if self.sink + self.window > target.max_context:
            raise ValueError(
                f"drafter.window={self.window}: with drafter.sink={self.sink} it is longer than "
                f"the {target.max_context} positions of {target.name}; lower it"
            )
        self.lm = target
        self.candidates = min(self.candidates, target.vocab_size)

    def begin(self, context: StepContext) -> Expand:
        cache = context.cache
        assert cache is not None
        view = cache.view(context.rows, sink=self.sink, window=self.window)
        parents: list[Tensor] = []  # [B, F] of each level so far, among the nodes in the scratch

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            parents.append(frontier.parents)
            structure = context.kernels.tree_structure(torch.cat(parents, dim=1))
            logits = self.lm.forward(
                cache,
                context.rows,
                frontier.tokens,
                structure.depths[:, frontier.first :],
                ancestors=structure.ancestors[:, frontier.first :],
                first=frontier.first,
                key_offsets=structure.depths,
                view=view,
            )
            assert logits is not None
            return self.candidates_after(context, logits, frontier.level, self.lm.vocab_size)

        return expand
