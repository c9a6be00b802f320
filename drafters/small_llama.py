"""drafter=small_llama: a small causal language model of the target's vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.cached_model import CachedModel
from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.heads.formats import check_whole
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Observation
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class SmallLlama(GrowingDrafter):
    """Drafts with a causal LM, any that shares the target's vocabulary (Leviathan et al. 2023;
    SpecInfer). One of the two may have rows for more tokens than the other, as in the families of
    Qwen: it drafts what both have, and reads a token of the target's alone as another.

    It has its own paged cache. Each draft begins by committing what the last step added and no
    pass of the drafter has seen: the root, and perhaps the node before it. Then every level of the
    tree is one pass over its nodes, whose keys and values go to the tree scratch.

    Args:
        path: model folder, hub id, zoo:NAME or standin:NAME.
        quantize: fp8 quantises the weights of its layers as they are loaded.
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
        path: str,
        quantize: Quantize = "none",
        depth: int | None = None,
        candidates: int = 64,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        self.path, self.quantize = path, quantize
        self.lm: PagedLM
        self.model: CachedModel
        # In a composition the tokens of a step are read at its end, while the host is busy, not
        # when the next draft begins; and nodes may lie deeper than this model drafts.
        self._reads_ahead, self._deeper = False, 0
        self._news: Tensor  # [rows, W] tokens of each cache row that are to be committed next
        self._count: Tensor  # [rows] how many of them
        self._logits: Tensor  # [rows, V] after the last token read ahead
        self._run = 0  # scratch rows of the draft
        # Of the last draft: the trees, and [B, N] the scratch row of each node, -1 for none.
        self._drafted: tuple[TokenTree, Tensor]

    def find(self) -> None:
        check_whole(self.path, "drafter.path")

    def load(self, target: PagedLM, models: Models) -> None:
        self.lm = self.own_model = models.load(
            self.path, setting="drafter.path", quantize=self.quantize
        )
        self._match(target)
        self.candidates = min(self.candidates, self.vocab_size)
        self.model = CachedModel(self.lm)

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        if self._joined is not None:
            self._reads_ahead, self._deeper = True, self._joined - self.levels
        self._make_room(capacity)

    def _make_room(self, capacity: Capacity) -> None:
        self.model.prepare(capacity)
        rows, device = capacity.rows + 1, self.lm.device
        width = self._spelled(max(2, self.levels + self._deeper + 1))
        self._news = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self._count = torch.ones(rows, dtype=torch.int64, device=device)
        if self._reads_ahead:
            self._logits = torch.zeros(
                rows, self.lm.vocab_size, dtype=self.lm.dtype, device=device
            )

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        if not self.levels:
            return sequences  # no draft will be asked for
        started = self.model.start([self._reread(sequence) for sequence in sequences])
        for sequence in started:
            self._news[sequence.row, 0] = sequence.tokens[-1]
            self._count[sequence.row] = 1
        taken = {s.row for s in started}
        return [sequence for sequence in sequences if sequence.row in taken]

    def prefill(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding]:
        if not self.levels:
            return sequences
        read = [sequence.row for sequence in self.model.read(sequences, tokens)]
        if read and self._reads_ahead:
            rows = torch.tensor(read, device=self.lm.device)
            self._logits[rows] = self._read(rows, 1)
        return [sequence for sequence in sequences if self.model.has_read(sequence)]

    def finish(self, sequence: Decoding) -> None:
        if self.levels:
            self.model.finish(sequence)

    def begin(self, context: StepContext) -> Expand:
        if self._reads_ahead:
            first_logits = self._logits[context.rows]
        else:
            first_logits = self._read(context.rows, self._spelled(2))
        self._run = 0
        parents: list[Tensor] = []  # of the nodes that have scratch rows, level by level

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            logits = first_logits[:, None]  # [B, 1, V], after the root
            if frontier.level:
                parents.append(frontier.parents - 1)  # expanded node n has scratch row n - 1
                logits = self._forward(context, frontier, parents)
            ids, probs = self.candidates_after(
                context, self._shared(logits), frontier.level, self.vocab_size
            )
            return self._named(ids), probs

        return expand

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        # Expanded node 0 is the root, committed already.
        slots = expanded - 1
        if self._deeper:
            slots = slots.masked_fill(slots >= self._run, -1)
        self._drafted = tree, slots
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if not self.levels:
            return
        tree, slots = self._drafted
        path, rows = acceptance.path, context.rows
        slots = slots.gather(1, path)[:, 1:]  # [B, depth]; the root is committed already
        accepted = (acceptance.length - 1).clamp(min=0)
        inside = torch.arange(slots.shape[1], device=slots.device) < accepted[:, None]
        known = (inside & (slots >= 0)).long().cumprod(1).sum(1)
        self.model.cache.append(rows, slots.clamp(min=0), known)
        # Only the last accepted node can be without keys and values, because it was not expanded,
        # and those that lie deeper than this model drafts.
        tokens = acceptance.new_tokens(tree)
        place = known[:, None] + torch.arange(2 + self._deeper, device=known.device)
        place = place.clamp(max=tokens.shape[1] - 1)
        self._note(rows, tokens.gather(1, place), acceptance.length - known)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        self._note(context.rows, acceptance.new_tokens(tree), acceptance.length)

    def _note(self, rows: Tensor, tokens: Tensor, count: Tensor) -> None:
        """The first `count` [B] of the target's tokens [B, n] are to be read next."""
        self._put(rows, *self._spell(tokens, count.clamp(min=1)))  # idle rows have none

    def _put(self, rows: Tensor, tokens: Tensor, count: Tensor) -> None:
        """The same of its own tokens [B, m]."""
        self._news[rows, : tokens.shape[1]] = tokens
        self._count[rows] = count
        if self._reads_ahead:
            self._logits[rows] = self._read(rows, tokens.shape[1])

    def _read(self, rows: Tensor, width: int) -> Tensor:
        """Commit what was noted: [B, V] logits after the last token."""
        news, count = self._news[rows, :width], self._count[rows]
        if self.lm.looks:  # where a look is free, and a narrower pass cheaper
            news = news[:, : int(count.max())]
        return self.lm.append(self.model.cache, rows, news, count)

    def _forward(self, context: StepContext, frontier: Frontier, parents: list[Tensor]) -> Tensor:
        """[B, F, V] logits after the nodes of a level.

        Args:
            parents: [B, F] of each level so far: the scratch row of each node's parent. The root
                is committed here, unlike in the target: its children are roots, at offset 0.
        """
        structure = context.kernels.tree_structure(torch.cat(parents, dim=1))
        first = frontier.first - 1
        self._run = first + frontier.tokens.shape[1]
        logits = self.lm.forward(
            self.model.cache,
            context.rows,
            self._own(frontier.tokens),
            structure.depths[:, first:],
            ancestors=structure.ancestors[:, first:],
            first=first,
            key_offsets=structure.depths,
        )
        assert logits is not None
        return logits

    # The same tokens as the target's; a draft of another tokenizer knows better.

    def _match(self, target: PagedLM) -> None:
        """Make sure that the two models speak of the same tokens, `vocab_size` of them."""
        check_vocabulary(self.lm, target, setting=f"drafter.path={self.path}")
        self.vocab_size = min(self.lm.vocab_size, target.vocab_size)
        self._fewer = self.lm.vocab_size < target.vocab_size

    def _reread(self, sequence: Decoding) -> Decoding:
        """A sequence that joins, in its own tokens."""
        if not self._fewer:
            return sequence
        last = self.vocab_size - 1
        return replace(sequence, tokens=[min(token, last) for token in sequence.tokens])

    def _spelled(self, count: int) -> int:
        """How many of its own tokens so many of the target's are at most."""
        return count

    def _spell(self, tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The first `count` [B] of the target's tokens [B, n], in its own: [B, m], and how many of
        them."""
        return self._own(tokens), count

    def _own(self, tokens: Tensor) -> Tensor:
        """Its own ids of tokens of the target; its last one for those it has no row for."""
        return tokens.clamp(max=self.vocab_size - 1) if self._fewer else tokens

    def _shared(self, logits: Tensor) -> Tensor:
        """The columns of the tokens it may draft, `vocab_size` of them."""
        return logits

    def _named(self, columns: Tensor) -> Tensor:
        """The target's ids of these."""
        return columns


def check_vocabulary(draft: PagedLM, target: PagedLM, *, setting: str) -> None:
    """Raise ValueError, naming the setting, unless token ids that both models have rows for mean
    equal tokens."""
    if draft.tokenizer is not None and target.tokenizer is not None:
        mine, theirs = draft.tokenizer.get_vocab(), target.tokenizer.get_vocab()
        rows = min(draft.vocab_size, target.vocab_size)
        own = {i: token for token, i in mine.items() if i < rows}
        other = {i: token for token, i in theirs.items() if i < rows}
        both = own.keys() & other.keys()
        differing = 2 * sum(own[i] != other[i] for i in both)
        if both and not differing:
            return
        detail = f"{len(mine)} and {len(theirs)} tokens, {differing} entries differ"
    elif draft.vocab_size == target.vocab_size:
        return
    else:
        detail = f"{draft.vocab_size} and {target.vocab_size} tokens"
    raise ValueError(
        f"{setting}: its vocabulary is not the target's ({detail}); "
        f"choose a draft with the same tokenizer, or drafter=translated"
    )
