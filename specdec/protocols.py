"""The plug points: Drafter, TreePolicy, AcceptanceRule, Recorder. Each contract is in its
docstring.

Legend: B sequences of the running batch, N nodes, V vocabulary, K draft candidates.
"""

import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.kernels import reference
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to decode.

    Args:
        id: what seeds its random numbers; unique in a run.
        prompt_ids: at least one token.
        max_new_tokens: decoding ends there at the latest.
        category: of prompts, for drafters that learn by category.
    """

    id: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    category: str | None = None

    @property
    def max_tokens(self) -> int:
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(slots=True, eq=False)
class Decoding:
    """A request being decoded: its tokens so far and what it has cost. `row` is its place in every
    cache."""

    request: Request
    row: int
    tokens: list[int]  # prompt and output; the last one has no keys and values yet
    steps: int = 0
    drafted: int = 0  # nodes proposed, the root not counted
    accepted_lengths: list[int] = field(default_factory=list)  # new tokens of each step
    finish_reason: str | None = None  # "stop", "length" or "context"

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepContext:
    """What a drafter and a rule may know in one step, for the B sequences of the running batch.

    On a GPU a batch is padded to one of a few sizes; places without a sequence have the idle row
    of the caches.

    Args:
        sequences: host side, at most B. For a drafter that works on the device the last step may
            still be on its way: their `tokens` are then one step old.
        roots: [B] int64, the last committed token of each.
        sampling: how the target's tokens are chosen.
        uniforms: (stream, count) -> [B, count] float64 on the device, numbers in [0, 1) that
            depend on the sequence and the step alone; streams as in `specdec.sampling`.
        rows: [B] int64, the cache row of each; empty where there is no cache.
        kernels: the module that computes, from `Kernels.on`.
        keys: [B, 3] int64, what `uniforms` is a function of, for kernels that make the same
            numbers themselves: seed, sequence and step as the bits of uint64.
        cache: the target's, whose scratch is the drafter's until the trees are verified; None
            where the verifier has none.
    """

    sequences: Sequence[Decoding]
    roots: Tensor
    sampling: SamplingParams
    uniforms: Callable[[int, int], Tensor]
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kernels: ModuleType = reference
    keys: Tensor | None = None
    cache: PagedKVCache | None = None


class DraftError(RuntimeError):
    """A drafter failed.

    Args:
        requests: ids of what it drafted for.
        reason: what happened, and where.
    """

    def __init__(self, drafter: str, requests: Sequence[int], reason: str) -> None:
        super().__init__(f"{drafter} failed on request {', '.join(map(str, requests))}: {reason}")
        self.drafter, self.requests, self.reason = drafter, list(requests), reason

    @classmethod
    def caused_by(
        cls, error: Exception, drafter: "Drafter", sequences: Sequence[Decoding]
    ) -> "DraftError":
        """What `drafter` raised while it drafted for these, with the line it happened in."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return cls(
            drafter.name or type(drafter).__name__,
            [sequence.request.id for sequence in sequences],
            f"{type(error).__name__}: {error} ({where})",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much the caches of a run must hold.

    Args:
        rows: sequences at a time.
        max_tokens: the longest sequence.
        page_size: tokens of a page.
        pages: pages of each cache; None is enough for `rows` sequences of `max_tokens`, or what
            the memory of the GPU holds.
        kv_dtype: what the pages hold keys and values as; None for the type of each model.

    Raises:
        ValueError: so few pages that not even one such sequence fits.
    """

    rows: int
    max_tokens: int
    page_size: int = 16
    pages: int | None = None
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        needed = self.pages_of_a_row
        if self.pages is not None and self.pages < needed:
            raise ValueError(
                f"cache.pages={self.pages}: {self.max_tokens} tokens of a sequence need {needed}; "
                f"raise cache.pages or lower max_new_tokens"
            )

    @property
    def pages_of_a_row(self) -> int:
        return -(-self.max_tokens // self.page_size)

    @property
    def pool_pages(self) -> int:
        return self.rows * self.pages_of_a_row if self.pages is None else self.pages


class Drafter:
    """Guesses a tree of next tokens for each sequence. `draft` is the only method a drafter must
    have.

    The runner builds it as `YourDrafter(target=..., tree=..., **settings of its YAML)`, where
    `target` is the target's `PagedLM` and `tree` the tree policy.

    `sampled_children` says what `tree.children=auto` becomes at temperature above 0: True if its
    probabilities are good enough to sample children from, False to take its most probable tokens.

    `on_device` says where `draft` and `commit` find what they need. False: in the tokens of
    `context.sequences`; the tensors of the context and of the tree are then the host's, and a step
    begins when the tokens of the last one have arrived. True: in tensors of the device alone; then
    on a GPU neither may wait for it, they are captured in CUDA graphs, and the host prepares a
    step while the last one runs. A drafter that needs both says True and has `variants`: then
    `look` is called before each `draft`, when the tokens of the last step have arrived; it may
    look at them and write to tensors, and what it returns, one of the variants, is what `draft`
    and `commit` depend on besides tensors.

    `most_nodes` is the size of its trees at most, the root included, if it works on the host;
    None if it cannot say.

    `sources` are the names that the numbers in `TokenTree.source` stand for.

    `observes` is how many of the target's most probable tokens at every node it wants to learn
    from: `commit` then finds them in `Acceptance.candidates`.

    `reset` says after what it forgets what it learns online ("prompt", "category" or "never", as
    in `drafters/state.py`); None if it learns nothing. The summary of a run repeats it.
    """

    sampled_children = False
    on_device = False
    name = ""  # what messages call it; the runner gives that of its YAML
    variants: Sequence[Hashable] = ()
    most_nodes: int | None = None
    sources: Sequence[str] = ()
    observes = 0
    reset: str | None = None

    def prepare(self, capacity: Capacity) -> None:
        """Once per run, before the first prompt: make room for this many sequences."""

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding] | None:
        """These sequences have just joined the batch; all but the last of their tokens are
        context. Returned are those there is room for, in order, or None: all."""

    def look(self, sequences: Sequence[Decoding], wanted: Any = None) -> Hashable:
        """On the host, for a drafter with `variants`: which of them the next `draft` of these
        sequences is; `wanted` (None: the drafter's own choice) while warming up."""
        raise NotImplementedError

    def draft(self, context: StepContext) -> TokenTree:
        """A tree for each sequence, rooted at its last committed token; the root alone is a legal
        answer."""
        raise NotImplementedError

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        """The rule has kept this much of the trees of the last `draft`. `context` is that of the
        draft."""

    def finish(self, sequence: Decoding) -> None:
        """This sequence has left the batch."""

    def forget(self) -> None:
        """Drop all that was learnt online. Called when a run begins, no sequence is running."""


class TreePolicy(Protocol):
    """Decides which candidates become nodes, level by level (`drafters/growth.py` does the rest).

    Attributes:
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        children: how children are chosen.
    """

    budget: int
    children: Children

    def levels(self, depth: int | None) -> int:
        """Levels to grow when the drafter asks for `depth` (None: as the policy likes).

        Raises:
            ValueError: the two contradict each other.
        """

    def width(self, level: int) -> int:
        """Children a node of this level may have at most; level 0 is the root."""

    def select(self, level: int, levels: int, scores: Tensor, *, sampled: bool) -> Tensor:
        """[B, F, width] bool: which child slots of the F nodes of a level become nodes, -inf ones
        never.

        Slot r stands for the r-th most probable child; scores are logs of the cumulative draft
        probability. With `sampled` children only the number of slots per node counts: which tokens
        fill them is drawn afterwards, so that the choice cannot depend on them and the recursive
        rules stay lossless.
        """

    def expand(self, level: int, scores: Tensor) -> Tensor | None:
        """[B, F'] indices of the new nodes ([B, C] scores) that get children in their turn; None
        for all."""

    def keep(self, scores: Tensor) -> Tensor | None:
        """[B, T] bool: which nodes stay, the root left out, given top-k children ([B, T] scores);
        None for all.

        Must keep the parent of whatever it keeps. Never called with sampled children.
        """


class AcceptanceRule(Protocol):
    """Keeps the longest path of each tree that it may keep, and one token of the target's own.

    Attributes:
        name: what records and messages call it.
        needs_proposal: True if it reads the draft probabilities (`TokenTree.proposal`).
        chains: True if above temperature 0 it judges chains alone.
        synthetic: True if its outputs are not meant to be the target's; everything a run leaves
            then says so.
    """

    name: str
    needs_proposal: bool = False
    chains: bool = False
    synthetic: bool = False

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        """Why outputs would not follow the target's distribution with such children; None: they
        do."""

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        """Walk the trees, given the target's logits [B, N, V] at every node."""


class Verifier(Protocol):
    """The target model: scores every node of every tree in one pass and keeps what the rule
    accepted."""

    @property
    def cache(self) -> PagedKVCache | None:
        """The target's keys and values, None if it has none."""

    def prepare(self, capacity: Capacity) -> None:
        """As `Drafter.prepare`."""

    def start(self, sequences: Sequence[Decoding]) -> list[Decoding]:
        """Take these sequences in, in order, as far as there is room; those taken are returned."""

    def verify(self, context: StepContext, tree: TokenTree) -> Tensor:
        """[B, N, V] logits of the target at every node."""

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        """The rule has kept this much of the trees of the last `verify`."""

    def finish(self, sequence: Decoding) -> None:
        """As `Drafter.finish`."""
