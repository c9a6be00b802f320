"""drafter=small_llama: a small causal language model of the target's vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.cached_model import CachedModel
from specdec.drafters.growth import Frontier, grow, plan
from specdec.model import PagedLM
from specdec.protocols import Capacity, Decoding, Drafter, StepContext, TreePolicy
from specdec.sampling import probabilities
from specdec.tree import Acceptance, TokenTree


class SmallLlama(Drafter):
    """Drafts with a causal LM, any that shares the target's vocabulary (Leviathan et al. 2023;
    SpecInfer).

    It has its own paged cache. Each draft begins by committing what the last step added (usually
    one or two tokens, the root among them); then every level of the tree is one pass over its
    nodes, whose keys and values go to the tree scratch.

    Args:
        target: the target model.
        tree: the tree policy.
        path: model folder, hub id or zoo:NAME.
        depth: levels of the tree; None leaves it to the policy.
        candidates: sampled children are drawn from the `candidates` most probable tokens,
            renormalised; that cut distribution is the one the acceptance rule is told about, so it
            costs nothing but acceptance.

    Raises:
        ValueError: a setting out of range, or another vocabulary than the target's.
    """

    sampled_children = True

    def __init__(
        self,
        *,
        target: PagedLM,
        tree: TreePolicy,
        path: str,
        depth: int | None = None,
        candidates: int = 64,
    ) -> None:
        self.tree = tree
        self.levels = plan(tree, depth, candidates)
        self.candidates = candidates
        self.lm = PagedLM.load(
            path,
            dtype=target.dtype,
            device=target.device,
            setting="drafter.path",
            kernels=target.kernels,
        )
        check_vocabulary(self.lm, target, setting=f"drafter.path={path}")
        self.vocab_size = min(self.lm.vocab_size, target.vocab_size)
        self.model = CachedModel(self.lm)
        self._slots = torch.empty(
            0
        )  # [B, N] scratch row of each node of the last draft, -1 for none

    def prepare(self, capacity: Capacity) -> None:
        self.model.prepare(capacity)

    def start(self, sequences: Sequence[Decoding]) -> None:
        self.model.start(sequences)

    def finish(self, sequence: Decoding) -> None:
        self.model.finish(sequence)

    def draft(self, context: StepContext) -> TokenTree:
        if not self.levels:
            return TokenTree.roots(context.roots)
        cache, rows = self.model.cache, context.rows
        sampled = self.tree.children != "top_k"
        news = [s.tokens[cache.committed(s.row) :] for s in context.sequences]
        first_logits = self.lm.extend(cache, rows, news)[:, None]  # [B, 1, V], after the root
        parents: list[Tensor] = []  # of the nodes that have scratch rows, level by level

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            logits = first_logits
            if frontier.level:
                parents.append(frontier.parents - 1)  # expanded node n has scratch row n - 1
                logits = self._forward(context, frontier, parents)
            logits = logits[..., : self.vocab_size]
            if sampled:
                probs, ids = probabilities(logits, context.sampling).topk(
                    min(self.candidates, self.vocab_size)
                )
                return ids, probs / probs.sum(-1, keepdim=True)
            probs, ids = (
                logits.float()
                .softmax(-1)
                .topk(min(self.tree.width(frontier.level), self.vocab_size))
            )
            return ids, probs

        tree, expanded = grow(self.tree, self.levels, context, expand)
        self._slots = expanded - 1  # expanded node 0 is the root, which is committed already
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        if not self.levels:
            return
        slots = self._slots.gather(1, acceptance.path)[
            :, 1:
        ]  # [B, depth]; the root is committed already
        inside = torch.arange(slots.shape[1], device=slots.device) < acceptance.length[:, None] - 1
        # A node of the last level, or one not expanded, has no keys and values; it comes with the
        # next draft.
        length = (inside & (slots >= 0)).long().cumprod(1).sum(1)
        self.model.commit(context.rows, slots.clamp(min=0), length)

    def _forward(self, context: StepContext, frontier: Frontier, parents: list[Tensor]) -> Tensor:
        """[B, F, V] logits after the nodes of a level.

        Args:
            parents: [B, F] of each level so far: the scratch row of each node's parent. The root
                is committed here, unlike in the target: its children are roots, at offset 0.
        """
        structure = context.kernels.tree_structure(torch.cat(parents, dim=1))
        first = frontier.first - 1
        logits = self.lm.forward(
            self.model.cache,
            context.rows,
            frontier.tokens,
            structure.depths[:, first:],
            ancestors=structure.ancestors[:, first:],
            first=first,
            key_offsets=structure.depths,
        )
        assert logits is not None
        return logits


def check_vocabulary(draft: PagedLM, target: PagedLM, *, setting: str) -> None:
    """Raise ValueError, naming the setting, unless equal token ids mean equal tokens in both
    models."""
    if draft.tokenizer is not None and target.tokenizer is not None:
        mine, theirs = draft.tokenizer.get_vocab(), target.tokenizer.get_vocab()
        if mine == theirs:
            return
        differing = len(mine.items() ^ theirs.items())
        detail = f"{len(mine)} and {len(theirs)} tokens, {differing} entries differ"
    elif draft.vocab_size == target.vocab_size:
        return
    else:
        detail = f"{draft.vocab_size} and {target.vocab_size} tokens"
    raise ValueError(
        f"{setting}: its vocabulary is not the target's ({detail}); "
        f"choose a draft with the same tokenizer"
    )
