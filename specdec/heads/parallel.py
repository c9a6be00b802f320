"""ParallelHead: P-EAGLE (speculators `models/peagle`, SpecForge `modeling/draft/peagle.py`), a
head of EAGLE-3 that answers all levels in one pass.

Behind the last pair stand as many masked ones as there are further levels: a mask token beside a
state that was learnt instead of one of the target. Each sees all pairs and the masked ones before
it, has the place that follows, and names the token there. So what is drafted depends on no draft.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specdec.heads.recurrent import Eagle3Config, Eagle3Head


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Eagle3Config):
    """What P-EAGLE has besides.

    Args:
        mask: id of the mask token in the target's vocabulary.
    """

    mask: int


class ParallelHead(Eagle3Head):
    """P-EAGLE. Parameters are made, not filled."""

    config: ParallelConfig

    def __init__(self, config: ParallelConfig) -> None:
        super().__init__(config)
        states = len(config.taps) * config.state_size
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, states))  # as published files have it

    def masked(self) -> tuple[Tensor, Tensor]:
        """Embedding and feature [1, 1, D] of a masked pair."""
        embedded: Tensor = self.embed_tokens.weight[self.config.mask]
        return embedded[None, None], self.fuse(self.mask_hidden)
