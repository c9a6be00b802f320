"""The plug points: Drafter, TreePolicy, AcceptanceRule, and the Verifier they meet.

Legend: B sequences of the running batch, N nodes, V vocabulary, K draft candidates.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
from torch import Tensor

from specdec.arrivals import Intake, Join, Prefill, Shareable
from specdec.cache import PagedKVCache
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.observation import Observation, Observes
from specdec.request import Capacity, Decoding
from specdec.sampling import SamplingParams
from specdec.tree import MOST_LEVELS, MOST_NODES, Acceptance, Children, TokenTree

if TYPE_CHECKING:
    from specdec.decode import Decoder
    from specdec.models.load import Models
    from specdec.models.paged import PagedLM

Read = Callable[[Tensor, Tensor, Tensor, Observation], None]


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


class Drafter:
    """Guesses a tree of next tokens for each sequence. Of its methods it must have `draft` alone.

    It is made of the settings of its YAML, `YourDrafter(**settings)`, and may refuse them. Then
    come `check`, before any model is loaded, `load`, and for every run `prepare`.

    Attributes:
        name: what messages call it; the runner gives that of its YAML.
        depth: levels it drafts at most, a setting of most; None leaves it to the tree policy.
        sampled_children: what `tree.children=auto` becomes at temperature above 0: True if its
            probabilities are good enough to sample children from, False to take its most probable
            tokens.
        acceptance: the one rule that it works with, by name; None for any.
        on_device: where `draft` and `commit` find what they need. False: in the tokens of
            `context.sequences`; the tensors of the context and of the tree are then the host's,
            and a step begins when the tokens of the last one have arrived. True: in tensors of the
            device alone; then on a GPU neither may wait for it, they are captured in CUDA graphs,
            and the host prepares a step while the last one runs.
        variants: for one that needs both, with `on_device`: `look` is called before each `draft`,
            when the tokens of the last step have arrived; it may look at them and write to
            tensors, and what it returns, one of the variants, is what `draft` and `commit` depend
            on besides tensors.
        most_nodes: of its trees, roots included, if it works on the host; None if it cannot say.
        sources: the names that the numbers in `TokenTree.source` stand for.
        observes: what it wants to see of the target; `commit` and `read` get it.
        reset: after what it forgets what it learns online ("prompt", "category" or "never", as in
            `drafters/state.py`); None if it learns nothing. The summary of a run repeats it.
        own_model: the model it drafts with, if that is none but its own; known when it is loaded.
        reads_states: whether it observes hidden states of prompts; known before it is loaded.
        page_successors: if so, pages are shared where so many tokens after them are equal too, on
            which depends what it keeps of a page; 0 if it needs the states of whole prompts.
        notes: by setting, in words, what loading has found out; a run and its summary say it.
    """

    name = ""
    depth: int | None = None
    sampled_children = False
    acceptance: str | None = None
    on_device = False
    variants: Sequence[Hashable] = ()
    most_nodes: int | None = None
    sources: Sequence[str] = ()
    observes = Observes()
    reset: str | None = None
    own_model: "PagedLM | None" = None
    reads_states = False
    page_successors = 0
    notes: Mapping[str, str] = {}  # replaced, never written to

    def check(self, tree: "TreePolicy") -> None:
        """Raise ValueError, naming the setting, for trees that it cannot draft: here those that
        its depth contradicts."""
        if tree.budget:
            levels_of(tree, self.depth)

    def find(self) -> None:
        """Raise ValueError, naming the setting, if a file or folder is missing that `load` will
        need. Before any model is loaded."""

    def load(self, target: "PagedLM", models: "Models") -> None:
        """Once, before the first `prepare`: get what it needs besides its settings, such as the
        vocabulary of the target, or a model from `models`, which loads each once.

        Raises:
            ValueError: it cannot draft for this target; one line that names the setting.
        """

    def prepare(self, capacity: Capacity, tree: "TreePolicy") -> None:
        """Once per run, before the first prompt: make room for so many sequences, and draft trees
        of this policy, which `check` has passed."""

    def shareable(self, prefix: Sequence[int]) -> int | None:
        """Of how many tokens of this prompt it has all it needs in pages of its own, so that the
        target may read from there on; None: of any."""

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding] | None:
        """These sequences are about to join the batch; all but the last of their tokens are
        context. Returned are those there is room for, in order, or None: all."""

    def prefill(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding] | None:
        """After `start`, beside each pass of the target over their prompts: read so many tokens
        more of each, if it reads them itself. Returned are those read whole, or None: all."""

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        """After `start`, if it `observes` prompts: the target has read more of some of them, in
        order. Of cache rows [B] these are the first `length` [B] of tokens [B, N], all int64;
        `seen` is what it observes after each of them."""

    def look(self, sequences: Sequence[Decoding], wanted: Any = None) -> Hashable:
        """On the host, for a drafter with `variants`: which of them the next `draft` of these
        sequences is; `wanted` (None: the drafter's own choice) while warming up."""
        raise NotImplementedError

    def draft(self, context: StepContext) -> TokenTree:
        """A tree for each sequence, rooted at its last committed token; the root alone is a legal
        answer."""
        raise NotImplementedError

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        """The rule has kept this much of the trees of the last `draft`, at whose nodes so much was
        `seen`. `context` is that of the draft."""

    def finish(self, sequence: Decoding) -> None:
        """This sequence has left the batch."""

    def forget(self) -> None:
        """Drop all that was learnt online. Called when a run begins, no sequence is running."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Loaded:
    """What a tree policy may look at before a run.

    Args:
        target: the target model.
        drafter: loaded.
        capacity: of the run.
        decoder: (tree, capacity) to a decoder like the run's but for these; it ends those made
            before, so that it is for measuring.
    """

    target: "PagedLM"
    drafter: Drafter
    capacity: Capacity
    decoder: "Callable[[TreePolicy, Capacity], Decoder]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How far trees have grown when a policy is asked.

    Args:
        level: depth of the nodes that are getting children; 0 is the root.
        levels: how many there will be.
        offered: children offered to each node, of every level up to this one: no more than the
            policy's width, fewer where the draft has fewer candidates.
        sampled: whether which tokens the children are is drawn afterwards.
        kernels: the module that computes.
    """

    level: int
    levels: int
    offered: tuple[int, ...]
    sampled: bool
    kernels: ModuleType


class TreePolicy:
    """Decides which candidates become nodes, level by level (`drafters/growth.py` does the rest).
    This one makes each a node, expands every node and keeps all.

    A policy is a pure object: its answers depend on what it is asked alone, so that any number of
    drafters may share it.

    Args:
        budget: nodes drafted per sequence at most, the root not counted; 0 turns drafting off.
        children: how children are chosen: "top_k" (a node's most probable tokens), "sample" (drawn
            without replacement) or "sample_with_replacement".

    Attributes:
        takes_all: whether nobody need ask: `select`, `expand` and `keep` are those of this class.
        one_shape: whether what it answers does not follow from scores.
        notes: by setting, in words, what it has chosen its trees by; known after `fit`, and said.

    Raises:
        ValueError: a setting out of range.
    """

    takes_all = False
    one_shape = False
    notes: Mapping[str, str] = {}  # replaced, never written to

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if {"select", "expand", "keep"} & vars(cls).keys():  # whatever the base class has said
            cls.takes_all, cls.one_shape = False, bool(vars(cls).get("one_shape"))

    def __init__(self, *, budget: int, children: str = "top_k") -> None:
        check_basics(budget, children)
        self.budget = budget
        self.children: Children = children  # type: ignore[assignment]  # checked above

    def fit(self, run: "Loaded") -> None:
        """Before a run, when its models are loaded: a policy may look at them, and measure what
        trees cost. Its answers may be others from then on, though no tree may get larger.

        Raises:
            ValueError: it cannot be used with these; one line that names the setting.
        """

    def levels(self, depth: int | None) -> int:
        """Levels to grow when the drafter asks for `depth` (None: as the policy likes).

        Raises:
            ValueError: the two contradict each other.
        """
        raise NotImplementedError

    def width(self, level: int) -> int:
        """Children a node of this level may have at most; level 0 is the root."""
        raise NotImplementedError

    def select(self, at: Growth, scores: Tensor) -> Tensor | None:
        """[B, F, width] bool: which child slots of the F nodes of a level become nodes, -inf ones
        never; None for all.

        Slot r stands for the r-th most probable child; scores are logs of the cumulative draft
        probability. With sampled children only the number of slots per node counts: which tokens
        fill them is drawn afterwards, so that the choice cannot depend on them and the recursive
        rules stay lossless.
        """
        return None

    def expand(self, at: Growth, scores: Tensor) -> Tensor | None:
        """[B, F'] indices of the new nodes below this level ([B, C] scores) that get children in
        their turn; None for all."""
        return None

    def keep(self, scores: Tensor, kernels: ModuleType) -> Tensor | None:
        """[B, T] bool: which nodes stay, the root left out, given top-k children ([B, T] scores);
        None for all.

        Must keep the parent of whatever it keeps. Never called with sampled children.
        """
        return None


def check_basics(budget: int, children: str) -> None:
    """Raise ValueError, naming the setting, unless any policy could have these."""
    if budget < 0:
        raise ValueError(f"tree.budget={budget}: must be 0 (no drafting) or positive")
    if budget > MOST_NODES:
        raise ValueError(f"tree.budget={budget}: must be at most {MOST_NODES}, of any tree")
    if children not in get_args(Children):
        known = ", ".join(get_args(Children))
        raise ValueError(f"tree.children={children}: must be one of {known}")


def check_positive(**settings: int | None) -> None:
    """Raise ValueError, naming the setting of a tree, if one of these is below 1; None is none."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"tree.{name}={value}: must be at least 1")


def check_depth(depth: int | None, setting: str) -> None:
    """Raise ValueError, naming the setting, if this is below 1 or more levels than any tree has;
    None is none."""
    if depth is not None and depth < 1:
        raise ValueError(f"{setting}={depth}: must be at least 1")
    if depth is not None and depth > MOST_LEVELS:
        raise ValueError(f"{setting}={depth}: must be at most {MOST_LEVELS}, of any tree")


def levels_of(tree: TreePolicy, depth: int | None) -> int:
    """Levels to grow when the drafter asks for `depth`; 0 if the budget turns drafting off.

    Raises:
        ValueError: a depth that contradicts the policy, or a policy that likes too many.
    """
    levels = tree.levels(depth) if tree.budget else 0
    if levels > MOST_LEVELS:
        mend = f"with drafter.depth={MOST_LEVELS} or less the tree may be shallower"
        raise ValueError(
            f"tree.budget={tree.budget}: {type(tree).__name__} has {levels} levels, a tree has "
            f"at most {MOST_LEVELS}; {mend}"
        )
    return levels


class AcceptanceRule:
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
        raise NotImplementedError

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        """Walk the trees, given the target's logits [B, N, V] at every node."""
        raise NotImplementedError


class Verifier(Protocol):
    """The target model: scores every node of every tree in one pass and keeps what the rule
    accepted."""

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> Kernels:
        """Which implementation computes; the loop and the rules use the same."""

    @property
    def max_context(self) -> int:
        """Positions the target has."""

    @property
    def cache(self) -> PagedKVCache | None:
        """The target's keys and values, None if it has none."""

    def prepare(self, capacity: Capacity, observes: Observes) -> None:
        """Once per run: make room, and know what the drafter wants to see."""

    def start(
        self,
        sequences: Sequence[Decoding],
        join: Join,
        read: Read,
        prefill: Prefill,
        shareable: Shareable,
    ) -> Intake:
        """Begin to take these sequences in, in order, as far as there is room.

        Args:
            join: called with those that found room; returns those that the drafter takes too.
            read: as `Drafter.read`, called if that is asked for.
            prefill: of the drafter likewise, to be called until it has returned them all.
            shareable: of the drafter likewise, asked before a sequence gets room.
        """

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        """[B, N, V] logits of the target at every node, and what the drafter wants to see."""

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        """The rule has kept this much of the trees of the last `verify`."""

    def finish(self, sequence: Decoding) -> None:
        """As `Drafter.finish`."""
