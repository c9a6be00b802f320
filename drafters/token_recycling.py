"""drafter=token_recycling: the successors the target itself named for a token, last time."""

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.drafters.state import Reset, check_reset, state_key
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree

MOST = 1024  # successors of a token
UNKNOWN = -1  # in the table, where a token has fewer successors than there is room for


class TokenRecycling(GrowingDrafter):
    """Remembers for every token the target's most probable successors when it was last seen, in
    the text or in a tree, and grows trees of them (Token Recycling, Luo et al. 2024, section 3).

    A table [V, `successors`] of ids for each slot is all there is. It holds ranks and no
    probabilities, so those are a fixed prior: the successor of rank r weighs `decay`**r. Where all
    are known, tree=dynamic makes the same shape at every step, deep and wide below the best ranks,
    as the paper's static tree is. Where fewer are known, a node has fewer children.

    A slot, of 4 bytes an id, belongs to a prompt, to a category or to all, as `reset` says. Of
    categories 32 are remembered, or as many as there are rows: beyond that the one unused for
    longest is forgotten, of those without a running sequence.

    Args:
        depth: levels of the tree; None leaves it to the policy.
        successors: remembered for each token, k in the paper; sampled children come from them.
        decay: how much less probable each rank is than the one before.
        from_prompt: also learn what follows each token of a prompt, where nothing is known yet.
        prompt_candidates: also learn what the target itself finds probable after each token of a
            prompt, for which the output head sees all of it. Tokens found in shared pages pass
            through no layer and teach nothing: which ones they are depends on what runs beside,
            and so do texts above temperature 0, of which a seed makes others, as likely.
        reset: after what the table is emptied, as in `drafters/state.py`.

    Raises:
        ValueError: a setting out of range.
    """

    CATEGORIES = 32
    reset: Reset

    def __init__(
        self,
        *,
        depth: int | None = None,
        successors: int = 8,
        decay: float = 0.5,
        from_prompt: bool = True,
        prompt_candidates: bool = False,
        reset: Reset = "prompt",
    ) -> None:
        if not 1 <= successors <= MOST:
            raise ValueError(f"drafter.successors={successors}: must be from 1 to {MOST}")
        if not 0 < decay <= 1:
            raise ValueError(f"drafter.decay={decay}: must be above 0 and at most 1")
        check_reset(reset)
        super().__init__(depth=depth, candidates=successors)
        self.observes = Observes(tokens=successors, prompts=prompt_candidates)
        self.successors, self.from_prompt, self.reset = successors, from_prompt, reset
        weights = decay ** torch.arange(successors, dtype=torch.float64)
        self._shares = weights / weights.sum()  # [k]
        self.vocab_size = 0
        self.device: torch.device
        self._keys: _Slots
        self._slot: Tensor  # [rows] the slot of each cache row
        # [slots * V + 1, k] ids; the last one is written where there is nothing to learn.
        self._table: Tensor
        self._drafted: TokenTree

    def load(self, target: PagedLM, models: Models) -> None:
        self.vocab_size, self.device = target.vocab_size, target.device
        if self.successors > self.vocab_size:
            raise ValueError(
                f"drafter.successors={self.successors}: must be from 1 to the vocabulary's "
                f"{self.vocab_size}"
            )
        self._shares = self._shares.to(self.device)

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        most = {"prompt": capacity.rows, "category": max(self.CATEGORIES, capacity.rows)}
        self._keys = _Slots(most.get(self.reset, 1))
        self._slot = torch.zeros(capacity.rows + 1, dtype=torch.int64, device=self.device)
        shape = self._keys.count * self.vocab_size + 1, self.successors
        self._table = torch.full(shape, UNKNOWN, dtype=torch.int32, device=self.device)

    def start(self, sequences: Sequence[Decoding]) -> None:
        for sequence in sequences:
            slot, fresh = self._keys.open(state_key(sequence.request, self.reset))
            self._slot[sequence.row] = slot
            first = slot * self.vocab_size
            if fresh:
                self._table[first : first + self.vocab_size] = UNKNOWN
            if self.from_prompt:
                self._read_text(sequence.tokens, first)

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        assert seen.tokens is not None
        inside = torch.arange(tokens.shape[1], device=self.device) < length[:, None]
        for place in range(len(rows)):  # one by one: what `_learn` compares grows with the square
            one = slice(place, place + 1)
            self._learn(rows[one], tokens[one], inside[one], seen.tokens[one])

    def finish(self, sequence: Decoding) -> None:
        key = state_key(sequence.request, self.reset)
        self._keys.close(key, forget=self.reset == "prompt")

    def forget(self) -> None:
        self._keys = _Slots(self._keys.count)
        self._table.fill_(UNKNOWN)

    def begin(self, context: StepContext) -> Expand:
        first = self._slot[context.rows][:, None] * self.vocab_size  # [B, 1]

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            count = self.successors
            if self.tree.children == "top_k":
                count = min(count, self.tree.width(frontier.level))
            ids = self._table[first + frontier.tokens]  # [B, F, k]
            probs = self._shares.where(ids != UNKNOWN, 0.0)
            if self.tree.children != "top_k":
                probs = probs / probs.sum(-1, keepdim=True).clamp(min=self._shares[-1])
            return ids[..., :count].clamp(min=0).long(), probs[..., :count]

        return expand

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        self._drafted = tree
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self.levels:
            self.follow(context, self._drafted, acceptance, seen)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        """Every node of the trees, kept or not, says what follows its token."""
        assert seen.tokens is not None
        node = torch.arange(tree.nodes, device=self.device)
        real = (node < tree.size[:, None]) & (acceptance.length > 0)[:, None]  # [B, N]
        self._learn(context.rows, tree.tokens, real, seen.tokens)

    def _learn(self, rows: Tensor, tokens: Tensor, real: Tensor, best: Tensor) -> None:
        """What is most probable [B, N, K] after tokens [B, N] of the cache rows [B], where they
        are `real` [B, N]."""
        place = self._slot[rows][:, None] * self.vocab_size + tokens
        place = torch.where(real, place, len(self._table) - 1).flatten()  # [B * N]
        # Of the nodes with the same token the last one writes: on a GPU it might be any.
        later = (place[:, None] == place).triu(1).any(1)
        place = place.masked_fill(later, len(self._table) - 1)
        found = best[..., : self.successors].flatten(0, 1)
        self._table[place] = found.to(self._table.dtype)

    def _read_text(self, tokens: Sequence[int], first: int) -> None:
        """Learn the successors of each token of a text, the latest one best."""
        follows: dict[int, list[int]] = {}
        for token, after in zip(reversed(tokens[:-1]), reversed(tokens[1:]), strict=True):
            known = follows.setdefault(token, [])
            if len(known) < self.successors and after not in known:
                known.append(after)
        if not follows:
            return
        new = torch.tensor([k + [UNKNOWN] * (self.successors - len(k)) for k in follows.values()])
        place = first + torch.tensor(list(follows), device=self.device)
        old = self._table[place]
        self._table[place] = torch.where(old[:, :1] == UNKNOWN, new.to(old), old)


class _Slots:
    """Which slot belongs to which key; when all are taken, the key unused for longest that is not
    open gives up its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slot: dict[Hashable, int] = {}  # the key opened last stands last
        self._open: Counter[Hashable] = Counter()

    def open(self, key: Hashable) -> tuple[int, bool]:
        """(the slot of a key, whether it was another's or nobody's before)."""
        fresh = key not in self._slot
        if fresh and len(self._slot) < self.count:
            slot = min(set(range(self.count)) - set(self._slot.values()))
        else:
            slot = self._slot.pop(key if not fresh else self._idle())
        self._slot[key] = slot
        self._open[key] += 1
        return slot, fresh

    def close(self, key: Hashable, *, forget: bool) -> None:
        self._open[key] -= 1
        if forget and not self._open[key]:
            del self._slot[key], self._open[key]

    def _idle(self) -> Hashable:
        return next(key for key in self._slot if not self._open[key])
