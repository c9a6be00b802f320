"""SparkHead: DSpark (deepseek-ai/DeepSpec `modeling/dspark`), a block head whose logits are
corrected by the token that is drafted before: in a tree the parent's, so that every node has
candidates of its own.

Legend: B sequences, F nodes of a level, r rank, V and VD tokens of target and head, D its width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.heads.block import BlockConfig, BlockHead

Markov = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True, kw_only=True)
class SparkConfig(BlockConfig):
    """What DSpark has besides.

    Args:
        rank: r, of the correction; 0: there is none.
        markov: how it is made of the embedding of the parent's token: as it is, gated by what the
            slot says, or by a recurrent state along the path.
        confidence: whether there is a head for the chance that a child is accepted.
        confidence_markov: whether that reads the parent's token too.
    """

    rank: int = 0
    markov: Markov = "vanilla"
    confidence: bool = False
    confidence_markov: bool = False


class MarkovHead(nn.Module):
    """What the parent's token adds to the logits of its children."""

    def __init__(self, config: SparkConfig) -> None:
        super().__init__()
        rank, width = config.rank, config.layer.hidden_size
        self.markov_w1 = nn.Embedding(config.target_vocab, rank)
        self.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False)
        if config.markov == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        if config.markov == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)


class ConfidenceHead(nn.Module):
    """The chance that a child is accepted, as a logit."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)


class SparkHead(BlockHead):
    """DSpark. Parameters are made, not filled."""

    config: SparkConfig

    def __init__(self, config: SparkConfig) -> None:
        super().__init__(config)
        self.markov_head = MarkovHead(config) if config.rank else None
        inputs = self.width + (config.rank if config.confidence_markov else 0)
        self.confidence_head = ConfidenceHead(inputs) if config.confidence else None

    def latent(
        self, normal: Tensor, tokens: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the correction of nodes' children is made of.

        Args:
            normal: [B, F, D], what the output head reads of their level.
            tokens: [B, F] int64, of the nodes.
            state: [B, F, r] that their parents leave, if it is recurrent.

        Returns:
            ([B, F, r]; the state [B, F, r] that they leave, None if it is not recurrent.)
        """
        head: Any = self.markov_head
        embedded: Tensor = head.markov_w1(tokens)
        if self.config.markov == "vanilla":
            return embedded, None
        if self.config.markov == "gated":
            gate = head.gate_proj(torch.cat([normal, embedded], dim=-1)).sigmoid()
            return gate * embedded, None
        if state is None:
            state = torch.zeros_like(embedded)
        joined = head.joint_proj(torch.cat([state, embedded, normal], dim=-1))
        gate, candidate, out = joined.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return out.tanh(), gate * state + (1 - gate) * candidate.tanh()

    def corrected(
        self, logits: Tensor, normal: Tensor, tokens: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, F, VD] of nodes' children, and their state as of `latent`.

        Args:
            logits: [B, 1, VD], of their level.
            normal: [B, 1, D], likewise.
        """
        head: Any = self.markov_head
        if head is None:
            return logits.expand(-1, tokens.shape[1], -1), None
        normal = normal.expand(-1, tokens.shape[1], -1)
        latent, state = self.latent(normal, tokens, state)
        added = self.kernels.project(latent.flatten(0, 1).contiguous(), head.markov_w2.weight)
        return logits + added.view(*tokens.shape, -1), state

    def confidence(self, normal: Tensor, tokens: Tensor) -> Tensor:
        """[B, F] logits, in float32, of the chance that a child of these nodes is accepted.

        Args:
            normal: [B, 1 or F, D], of their level.
        """
        inputs = normal.expand(-1, tokens.shape[1], -1)
        if self.config.confidence_markov:
            before: Any = self.markov_head
            inputs = torch.cat([inputs, before.markov_w1(tokens)], dim=-1)
        head: Any = self.confidence_head
        logit: Tensor = head.proj(inputs)[..., 0]
        return logit.float()
