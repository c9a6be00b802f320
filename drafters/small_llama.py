"""drafter=small_llama: a small causal language model of the target's vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.cached_model import CachedModel
from specdec.drafters.growth import Frontier, grow, plan
from specdec.kernels.layout import pack_bits
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
            path, dtype=target.dtype, device=target.device, setting="drafter.path"
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
        ancestry = _Ancestry()

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            logits = (
                first_logits if frontier.level == 0 else self._forward(rows, frontier, ancestry)
            )
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

    def _forward(self, rows: Sequence[int], frontier: Frontier, ancestry: "_Ancestry") -> Tensor:
        """[B, F, V] logits after the nodes of a level."""
        ancestry.add(frontier)
        # The root is committed here, unlike in the target: it is neither a scratch row nor an
        # offset.
        logits = self.lm.forward(
            self.model.cache,
            rows,
            frontier.tokens,
            torch.full_like(frontier.tokens, frontier.level - 1),
            ancestors=pack_bits(ancestry.visible[:, frontier.first - 1 :]),
            first=frontier.first - 1,
            key_offsets=ancestry.offsets,
        )
        assert logits is not None
        return logits


class _Ancestry:
    """Who sees whom among the R nodes expanded so far in one draft; node number n of the tree is
    row n - 1.

    Attributes:
        visible: [B, R, R] bool, a node's ancestors and itself.
        offsets: [B, R] int64, positions counted from the committed tokens.
    """

    def __init__(self) -> None:
        self.visible: Tensor
        self.offsets: Tensor

    def add(self, frontier: Frontier) -> None:
        batch, count = frontier.tokens.shape
        own = torch.eye(count, dtype=torch.bool, device=frontier.tokens.device).expand(
            batch, -1, -1
        )
        offsets = torch.full_like(frontier.tokens, frontier.level - 1)
        if frontier.level == 1:
            self.visible, self.offsets = own, offsets
            return
        rows = self.visible.shape[2]
        parents = (frontier.parents - 1)[..., None].expand(-1, -1, rows)
        inherited = torch.cat([self.visible.gather(1, parents), own], dim=2)
        self.visible = torch.cat(
            [torch.nn.functional.pad(self.visible, (0, count)), inherited], dim=1
        )
        self.offsets = torch.cat([self.offsets, offsets], dim=1)


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
