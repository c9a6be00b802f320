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

    It has its own paged cache. Each draft begins by committing what the last step added and no
    pass of the drafter has seen: the root, and perhaps the node before it. Then every level of the
    tree is one pass over its nodes, whose keys and values go to the tree scratch.

    Args:
        target: the target model.
        tree: the tree policy.
        path: model folder, hub id, zoo:NAME or standin:NAME.
        depth: levels of the tree; None leaves it to the policy.
        candidates: sampled children are drawn from the `candidates` most probable tokens,
            renormalised; that cut distribution is the one the acceptance rule is told about, so it
            costs nothing but acceptance.

    Raises:
        ValueError: a setting out of range, or another vocabulary than the target's.
    """

    sampled_children = True
    on_device = True

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
        self._news: Tensor  # [rows, 2] tokens of each cache row that are to be committed next
        self._count: Tensor  # [rows] how many of the two
        # Of the last draft: the trees, and [B, N] the scratch row of each node, -1 for none.
        self._drafted: tuple[TokenTree, Tensor]

    def prepare(self, capacity: Capacity) -> None:
        self.model.prepare(capacity)
        rows, device = capacity.rows + 1, self.lm.device
        self._news = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self._count = torch.ones(rows, dtype=torch.int64, device=device)

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        started = self.model.start(sequences)
        for sequence in started:
            self._news[sequence.row] = sequence.tokens[-1]
            self._count[sequence.row] = 1
        return started

    def finish(self, sequence: Decoding) -> None:
        self.model.finish(sequence)

    def draft(self, context: StepContext) -> TokenTree:
        if not self.levels:
            return TokenTree.roots(context.roots)
        sampled = self.tree.children != "top_k"
        news, count = self._news[context.rows], self._count[context.rows]
        if news.device.type == "cpu":  # where a look is free, and a narrower pass cheaper
            news = news[:, : int(count.max())]
        first_logits = self.lm.append(self.model.cache, context.rows, news, count)[:, None]
        parents: list[Tensor] = []  # of the nodes that have scratch rows, level by level

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            logits = first_logits  # [B, 1, V], after the root
            if frontier.level:
                parents.append(frontier.parents - 1)  # expanded node n has scratch row n - 1
                logits = self._forward(context, frontier, parents)
            if not sampled:
                return self._best(context, logits, self.tree.width(frontier.level), 1.0)
            sampling = context.sampling
            if sampling.filters or sampling.greedy:
                probs, ids = probabilities(logits[..., : self.vocab_size], sampling).topk(
                    min(self.candidates, self.vocab_size)
                )
            else:
                ids, probs = self._best(context, logits, self.candidates, sampling.temperature)
            return ids, probs / probs.sum(-1, keepdim=True)

        tree, expanded = grow(self.tree, self.levels, context, expand)
        self._drafted = tree, expanded - 1  # expanded node 0 is the root, committed already
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        if not self.levels:
            return
        tree, slots = self._drafted
        path, rows = acceptance.path, context.rows
        slots = slots.gather(1, path)[:, 1:]  # [B, depth]; the root is committed already
        accepted = (acceptance.length - 1).clamp(min=0)
        inside = torch.arange(slots.shape[1], device=slots.device) < accepted[:, None]
        length = (inside & (slots >= 0)).long().cumprod(1).sum(1)
        self.model.cache.append(rows, slots.clamp(min=0), length)
        # Only the last accepted node can be without keys and values: it was not expanded.
        missing = accepted > length
        last = tree.tokens.gather(1, path.gather(1, accepted[:, None]))[:, 0]
        first = torch.where(missing, last, acceptance.next_token)
        self._news[rows] = torch.stack([first, acceptance.next_token], dim=1)
        self._count[rows] = missing + 1

    def _best(
        self, context: StepContext, logits: Tensor, count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The most probable tokens [B, F, count] and their probabilities, given logits
        [B, F, V]."""
        count = min(count, self.vocab_size)
        ids, probs = context.kernels.top_tokens(
            logits.flatten(0, 1), count, temperature=temperature, vocab=self.vocab_size
        )
        shape = *logits.shape[:2], count
        return ids.view(shape), probs.view(shape)

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
