"""What drafters with a head over the target's states have in common."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.cache import CacheFullError
from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.heads.formats import levels_of, load_head
from specdec.heads.mtp_files import HowMTP
from specdec.heads.narrow import ids_of
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Observation, Observes, Tap
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree


class HeadDrafter(GrowingDrafter):
    """A drafter with a head that is read from files.

    Args:
        path: folder or hub id of a head in any published layout, or zoo:NAME.
        taps: the states it reads, by number of layers passed, if its files are not to be believed.
        depth: levels of the tree; None leaves it to the policy.
        candidates: as in `SmallLlama`.
        rope_theta: base of its rotary angles; None for the head's own.
        widen: on a stand-in, a head of its small model gets the size of published ones; False
            leaves it small, a lower limit of what heads cost.
        vocabulary: the tokens that it may name: the lowest ids, so many, or those of a .json file;
            None is all that it can.
        quantize: fp8 quantises the weights of its layers, and of its output matrix where that is
            not the target's.

    Attributes:
        kind: of head, as `load_head` has it.
        answers: how messages say that a head names tokens of so many levels and no more; empty if
            it goes on as long as it is asked.

    Raises:
        ValueError: a setting out of range, files that are no such head, or a head of another
            target; a tree with more levels than it has answers for.
    """

    sampled_children = True
    reads_states = True
    page_successors = 1  # of an entry, made of a state and the token after it
    kind: ClassVar[str]
    how: HowMTP | None = None  # of MTP layers
    answers: ClassVar[str] = ""

    def __init__(
        self,
        *,
        path: str,
        taps: list[Tap] | None = None,
        depth: int | None = None,
        candidates: int = 64,
        rope_theta: float | None = None,
        widen: bool = True,
        vocabulary: int | str | None = None,
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise ValueError(f"drafter.rope_theta={rope_theta}: must be above 0, or null")
        self.path, self.taps, self.rope_theta, self.widen = path, taps, rope_theta, widen
        self.vocabulary, self.quantize = vocabulary, quantize
        self.head: Any
        self._wanted = depth
        self._policy: TreePolicy | None = None  # of the last check
        self._tree: TokenTree  # of the last draft

    def check(self, tree: TreePolicy) -> None:
        self._policy = tree
        try:
            super().check(tree)
        except ValueError:
            if self.depth == self._wanted:
                raise
            said = self.answers.format(self.depth)
            raise ValueError(
                f"drafter.path={self.path}: {said}, and the tree has {tree.levels(None)} levels; "
                f"choose a shallower one"
            ) from None

    def find(self) -> None:
        if self.vocabulary is not None:
            ids_of(self.vocabulary)
        self._find_head()
        if self._policy is not None:
            self.check(self._policy)

    def _find_head(self) -> None:
        count = levels_of(self.path, (self.kind,), "drafter.path")
        if count is not None:
            self._limit(count)

    def _limit(self, levels: int) -> None:
        """So many levels it has answers for."""
        if self._wanted is not None and self._wanted > levels:
            raise ValueError(
                f"drafter.depth={self._wanted}: drafter.path={self.path} "
                f"{self.answers.format(levels)}; choose at most so many"
            )
        self.depth = self._wanted or levels

    def load(self, target: PagedLM, models: Models) -> None:
        path, setting = self._files(target)
        head: Any = load_head(
            path,
            target,
            kinds=(self.kind,),
            setting=setting,
            taps=self.taps,
            rope_theta=self.rope_theta,
            how=self.how,
            widened=self.widen,
            vocabulary=self.vocabulary,
            quantize=self.quantize,
        )
        self._use(head, target)
        self.notes = {"drafter.path": str(head.description)}

    def _files(self, target: PagedLM) -> tuple[str, str]:
        """Where its head lies, and the setting that says so."""
        return self.path, "drafter.path"

    def _use(self, head: Any, target: PagedLM) -> None:
        target.check_taps(head.config.taps, f"drafter.path={self.path}")
        self.head = head
        self.observes = Observes(taps=head.config.taps, prompts=True)
        self.candidates = min(self.candidates, head.drafts)

    def end(self, context: StepContext, tree: TokenTree, expanded: Tensor) -> TokenTree:
        self._tree = tree
        return tree

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self.levels:
            self.note(context, self._tree, acceptance, seen)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        self.note(context, tree, acceptance, seen)

    def note(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        """Keep the states of what was accepted, for the next draft."""
        raise NotImplementedError

    def _joined_states(self, seen: Observation) -> Tensor:
        """[B, N, taps * H]."""
        config = self.head.config  # of a stand-in that has a small head, H are the first numbers
        found = [seen.states[tap][..., : config.state_size] for tap in config.taps]
        return torch.cat(found, dim=-1)

    def _named(self, ids: Tensor) -> Tensor:
        """The target's ids of tokens of the head."""
        names: Tensor | None = self.head.names
        return ids if names is None else names[ids]

    def _in_levels(self, context: StepContext, logits: Tensor) -> Expand:
        """Answers that are the same for all nodes of a level: logits [B, levels, VD]."""
        tree = self.tree
        widest = max(range(logits.shape[1]), key=tree.width)
        every_ids, every_probs = self.candidates_after(context, logits, widest, self.head.drafts)
        every_ids = self._named(every_ids)

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            level, nodes = frontier.level, frontier.tokens.shape[1]
            count = tree.width(level) if tree.children == "top_k" else None
            ids, probs = (x[:, level : level + 1, :count] for x in (every_ids, every_probs))
            return ids.repeat(1, nodes, 1), probs.repeat(1, nodes, 1)

        return expand


class CachedHeadDrafter(HeadDrafter):
    """A drafter whose head has layers, and a cache that follows the target's.

    What a step adds is noted when it is accepted, and read when the next draft begins, with the
    states that the target had there: what a head makes of its own drafts lies in the scratch and
    is thrown away (keeping it costs 8 to 15 % of the accepted length, vllm-project/vllm#14649).
    """

    model: Any  # a PagedHead
    # Of each cache row: what the next draft reads first, joined states.
    _states: Tensor  # [rows, W, taps * H]
    _count: Tensor  # [rows]

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        if not self.levels:
            return
        self.model.prepare(capacity)
        self._share = capacity.share
        known = self.head.config.layer.max_position_embeddings
        if capacity.max_tokens > known:
            said = (
                f"{self.head.description}; it knows {known:,} positions and drafts worse past them"
            )
            self.notes = {"drafter.path": said}
        config, rows = self.head.config, capacity.rows + 1
        width, device = self._width, self.model.device
        self._count = torch.zeros(rows, dtype=torch.int64, device=device)
        size = len(config.taps) * config.state_size
        self._states = torch.zeros(rows, width, size, dtype=self.model.dtype, device=device)

    @property
    def _width(self) -> int:
        """Most tokens that a step adds."""
        return (self._joined or self.levels) + 1

    def shareable(self, prefix: Sequence[int]) -> int | None:
        return self.model.cache.shareable(prefix) if self.levels else None

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        if not self.levels:
            return sequences
        cache, taken = self.model.cache, []
        for sequence in sequences:
            tokens = min(sequence.request.max_tokens, cache.max_tokens)
            prefix = sequence.tokens[:-1] if self._share else ()
            try:
                cache.open(sequence.row, tokens=tokens, prefix=prefix, found=sequence.found)
            except CacheFullError:
                break
            self._join(sequence)
            taken.append(sequence)
        return taken

    def _join(self, sequence: Decoding) -> None:
        """It has a row; nothing of it is read but what was found."""
        self._count[sequence.row] = 0

    def _offer(self, rows: Tensor) -> None:
        """Later prompts may share what these rows have read of theirs."""
        if self._share:
            self.model.cache.offer(rows.tolist())

    def finish(self, sequence: Decoding) -> None:
        if self.levels:
            self.model.cache.close(sequence.row)

    def follow(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        self.catch_up(context.rows)  # no draft has read what the step before added
        self.note(context, tree, acceptance, seen)

    def catch_up(self, rows: Tensor) -> Any:
        """Read what was noted, and commit it."""
        raise NotImplementedError

    def note(
        self, context: StepContext, tree: TokenTree, acceptance: Acceptance, seen: Observation
    ) -> None:
        states = self._joined_states(seen)
        index = acceptance.path[..., None].expand(-1, -1, states.shape[2])
        width, rows = acceptance.path.shape[1], context.rows
        self._states[rows, :width] = states.gather(1, index)
        self._count[rows] = acceptance.length

    def _noted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, W, taps * H] that the last step added, and how many of them count [B]; W is
        no larger than it must be where the host may look."""
        states, count = self._states[rows], self._count[rows]
        if self.model.looks:  # where a look is free, and a narrower pass cheaper
            states = states[:, : max(1, int(count.max()))]
        return states, count
