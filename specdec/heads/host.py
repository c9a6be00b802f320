"""Host: what a head needs to know of its target to be read."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from specdec.models.paged import PagedLM
from specdec.models.quantised import output_of
from specdec.models.shards import whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A target, seen by a head that is being read.

    Args:
        name: for messages.
        architecture: its class in transformers.
        layers, state_size, vocab_size: n, H and V.
        embedding, output: [V or more, H] and [V, H], the target's own.
        output_bias: whether its output head adds one.
        device, dtype: of the head to be.
    """

    name: str
    architecture: str
    layers: int
    state_size: int
    vocab_size: int
    embedding: Tensor
    output: Tensor
    output_bias: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, target: PagedLM) -> Self:
        """The target itself."""
        output = target.model.get_output_embeddings()
        return cls(
            name=target.name,
            architecture=type(target.model).__name__,
            layers=target.layers,
            state_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            embedding=whole(target.model.get_input_embeddings().weight.detach()),
            output=whole(output_of(target.model).detach()),
            output_bias=getattr(output, "bias", None) is not None,
            device=target.device,
            dtype=target.dtype,
        )

    @classmethod
    def small(cls, target: PagedLM) -> Self:
        """The small model that a stand-in was made of: its matrices are parts of the large ones,
        and so are what heads of it share."""
        assert target.standin is not None
        small, whole = target.standin.small, cls.of(target)
        rows, width = small.vocab_size, small.hidden_size
        return replace(
            whole,
            name=f"the small model of {whole.name}",
            layers=small.num_hidden_layers,
            state_size=width,
            vocab_size=rows,
            embedding=whole.embedding[:rows, :width],
            output=whole.output[:rows, :width],
        )
