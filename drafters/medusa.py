"""drafter=medusa: heads that name a token of each depth from one state of the target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.growth import Expand
from specdec.drafters.heads import HeadDrafter
from specdec.heads.medusa import MedusaHeads
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Observation
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class Medusa(HeadDrafter):
    """Drafts with Medusa heads (Cai et al. 2024), all of them in one pass at the start of a draft.

    Head i names the token i + 1 places below the root, from the state of the last token that has
    one, which stands before the root. It knows nothing of the nodes in between: all nodes of a
    level have the same candidates, each drawing its own children of them. Their probabilities are
    the heads', so that the rules stay lossless; Medusa's own acceptance is `acceptance=typical`.

    Args, Raises: those of `HeadDrafter`; of `depth` None takes as many levels as there are heads,
        or fewer if the policy likes.
    """

    kind = "medusa"
    answers = "has {} heads, each for a level"

    def __init__(
        self,
        *,
        path: str,
        depth: int | None = None,
        candidates: int = 64,
        widen: bool = True,
        vocabulary: int | str | None = None,
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(
            path=path,
            depth=depth,
            candidates=candidates,
            widen=widen,
            vocabulary=vocabulary,
            quantize=quantize,
        )
        self.head: MedusaHeads
        self.device: torch.device
        self.dtype: torch.dtype
        self._state: Tensor  # [rows, H] of the token before the root, zero if there is none

    def _use(self, head: MedusaHeads, target: PagedLM) -> None:
        self._limit(head.config.heads)
        super()._use(head, target)
        head.kernels = target.kernels.on(target.device)
        self.device, self.dtype = target.device, target.dtype

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        self._state = torch.zeros(
            capacity.rows + 1, self.head.width, dtype=self.dtype, device=self.device
        )

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        for sequence in sequences:  # of a prompt of one token nothing will be read
            self._state[sequence.row] = 0
        return sequences

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        self._keep(rows, length - 1, seen)

    def begin(self, context: StepContext) -> Expand:
        return self._in_levels(context, self.head.logits(self._state[context.rows], self.levels))

    def note(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        last = (acceptance.length - 1).clamp(min=0)[:, None]  # idle rows have none
        self._keep(context.rows, acceptance.path.gather(1, last)[:, 0], seen)

    def _keep(self, rows: Tensor, place: Tensor, seen: Observation) -> None:
        """The state at node or token `place` [B] is the newest."""
        states = self._joined_states(seen)
        index = place[:, None, None].expand(-1, -1, states.shape[2])
        self._state[rows] = states.gather(1, index)[:, 0]
