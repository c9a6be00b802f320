"""The verifier: one forward pass of the target over all nodes of all trees."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.arrivals import Join, Prefill, Shareable
from specdec.cache import PagedKVCache
from specdec.cached_model import CachedModel, Reading
from specdec.kernels.choose import Kernels
from specdec.models.paged import PagedLM
from specdec.models.states import States
from specdec.observation import Observation, Observes, Tap, observe
from specdec.prefixes import Prefixes
from specdec.protocols import Read, StepContext
from specdec.request import PREFILL_CHUNK, Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class TreeVerifier:
    """Scores token trees with the target model and keeps the accepted paths in its cache.

    Args:
        target: the target model.
        prefill_chunk, prefill_beside: as in `CacheSettings`.
        prefixes: as in `CachedModel`.
    """

    def __init__(
        self,
        target: PagedLM,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_beside: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        for name, value in {"chunk": prefill_chunk, "beside": prefill_beside}.items():
            if value is not None and value < 1:
                raise ValueError(f"cache.prefill_{name}={value}: must be at least 1")
        self.target = CachedModel(target, prefixes=prefixes)
        self._pace: dict[str, Any] = {"chunk": prefill_chunk, "beside": prefill_beside}
        self.device: torch.device = target.device
        self.kernels: Kernels = target.kernels
        self.max_context: int = target.max_context
        self._observes = Observes()

    def prepare(self, capacity: Capacity, observes: Observes) -> None:
        self.target.prepare(capacity)
        self._observes = observes

    @property
    def cache(self) -> PagedKVCache:
        return self.target.cache

    def start(
        self,
        sequences: Sequence[Decoding],
        join: Join,
        read: Read,
        prefill: Prefill,
        shareable: Shareable,
    ) -> Reading:
        kernels, asked, how = self.kernels.on(self.device), self._observes, dict(self._pace)

        def see(
            rows: Tensor,
            tokens: Tensor,
            length: Tensor,
            logits: Tensor | None,
            states: Mapping[Tap, Tensor],
        ) -> None:
            read(rows, tokens, length, observe(asked, logits, states, kernels))

        if asked.prompts:
            how |= {"see": see, "logits": asked.tokens > 0, "taps": asked.taps}
        return Reading(self.target, sequences, join, prefill, shareable, **how)

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        """Logits by tree attention (SpecInfer, Miao et al. 2024, section 4)."""
        structure = context.kernels.tree_structure(tree.parents)
        lm, begun = self.target.lm, tree.begun
        where = (self.cache, context.rows)
        states = States(self._observes.taps)
        how: dict[str, Any] = {"ancestors": structure.ancestors, "states": states}
        if begun is None:
            logits = lm.forward(*where, tree.tokens, structure.depths, **how)
        else:
            rest = range(begun.layers, lm.layers)
            logits, _ = lm.forward_layers(*where, begun.hidden, structure.depths, rest, **how)
        assert logits is not None
        return logits, observe(self._observes, logits, states.found, context.kernels)

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        self.target.cache.append(context.rows, acceptance.path, acceptance.length)

    def finish(self, sequence: Decoding) -> None:
        self.target.finish(sequence)
