"""drafter=dflash: a head that drafts a block of tokens in one pass over the target's states."""

from torch import Tensor

from specdec.drafters.growth import Expand, Frontier
from specdec.drafters.heads import CachedHeadDrafter
from specdec.heads.block import BlockHead
from specdec.heads.flash2 import Flash2Head
from specdec.heads.paged_block import PagedBlock
from specdec.models.paged import PagedLM
from specdec.observation import Observation
from specdec.protocols import StepContext


class DFlash(CachedHeadDrafter):
    """Drafts with a block head (DFlash, Chen et al. 2026), in the layouts of its authors,
    DeepSpec, SpecForge, JetSpec and speculators, or with one of DFlash 2.

    One pass answers all levels: it knows nothing of the nodes in between, so that all nodes of a
    level have the same candidates, each drawing its own children of them; `tree=dynamic` then
    grows the trees of DDTree. The selector of DFlash 2 scores the best tokens of a level after
    each node's own token, and there are no others. Probabilities are the head's, so that the rules
    stay lossless.

    Args, Raises: those of `HeadDrafter`; of `depth` None takes as many levels as a block has, or
        fewer if the policy likes.
    """

    kind = "dflash"
    answers = "drafts at most {} levels, those of a block"
    model: PagedBlock

    def _use(self, head: BlockHead, target: PagedLM) -> None:
        self._limit(head.config.levels)
        super()._use(head, target)
        self.model = PagedBlock(head, target)

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        if self.levels:
            with self.model.cache.scratch_apart(*tokens.shape):
                self.model.read(rows, self._joined_states(seen), length)
            self._offer(rows)

    def catch_up(self, rows: Tensor) -> None:
        self.model.read(rows, *self._noted(rows))

    def begin(self, context: StepContext) -> Expand:
        normal, logits = self._block(context)
        if isinstance(self.head, Flash2Head):
            return self._selected(context, self.head, normal, logits)
        return self._in_levels(context, logits)

    def _selected(
        self, context: StepContext, head: Flash2Head, normal: Tensor, logits: Tensor
    ) -> Expand:
        """Answers of which each scores the same tokens of its level."""
        choices = min(head.config.choices, head.drafts)
        ids, _ = context.kernels.top_tokens(
            logits.flatten(0, 1), choices, temperature=1.0, vocab=head.drafts
        )
        every = ids.view(*logits.shape[:2], choices)
        alone = logits.gather(2, every).float()  # [B, levels, C]

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            level = slice(frontier.level, frontier.level + 1)
            among = every[:, level]
            added = head.candidate_selector(normal[:, level], frontier.tokens, among)
            places, probs = self.candidates_after(
                context, alone[:, level] + added, frontier.level, choices
            )
            found = among.expand(-1, places.shape[1], -1).gather(2, places)
            return self._named(found), probs

        return expand

    def _block(self, context: StepContext) -> tuple[Tensor, Tensor]:
        """Read what the last step added, and draft a block: what the output head reads for each
        level [B, levels, D], and what it says [B, levels, VD]."""
        self.catch_up(context.rows)
        normal = self.model.draft(context.rows, context.roots, self.levels)
        return normal, self.model.logits(normal)
