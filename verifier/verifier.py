"""The verifier: one forward pass of the target over all nodes of all trees."""

from collections.abc import Sequence

from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.cached_model import CachedModel
from specdec.models.paged import PagedLM
from specdec.protocols import Capacity, Decoding, StepContext
from specdec.tree import Acceptance, TokenTree


class TreeVerifier:
    """Scores token trees with the target model and keeps the accepted paths in its cache.

    Args:
        target: the target model.
        prefill_chunk: prompt tokens of a sequence that go through the model at a time.
    """

    def __init__(self, target: PagedLM, *, prefill_chunk: int = 512) -> None:
        self.target = CachedModel(target, prefill_chunk=prefill_chunk)

    def prepare(self, capacity: Capacity) -> None:
        self.target.prepare(capacity)

    @property
    def cache(self) -> PagedKVCache:
        return self.target.cache

    def start(self, sequences: Sequence[Decoding]) -> list[Decoding]:
        return self.target.start(sequences)

    def verify(self, context: StepContext, tree: TokenTree) -> Tensor:
        """[B, N, V] logits of the target at every node (SpecInfer, Miao et al. 2024, section 4:
        tree attention)."""
        structure = context.kernels.tree_structure(tree.parents)
        lm, begun = self.target.lm, tree.begun
        where = (self.cache, context.rows)
        if begun is None:
            logits = lm.forward(
                *where, tree.tokens, structure.depths, ancestors=structure.ancestors
            )
        else:
            rest = range(begun.layers, lm.layers)
            logits, _ = lm.forward_layers(
                *where, begun.hidden, structure.depths, rest, ancestors=structure.ancestors
            )
        assert logits is not None
        return logits

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        self.target.cache.append(context.rows, acceptance.path, acceptance.length)

    def finish(self, sequence: Decoding) -> None:
        self.target.finish(sequence)
