"""drafter=compose: several drafters, one tree."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.drafters.choosers import Cascade, Chooser, Pulls, Union
from specdec.drafters.growth import Expand, Frontier, GrowingDrafter, ShapedDrafter, grow
from specdec.drafters.host import HostDrafter, Trie
from specdec.drafters.mixture import mix, sources_of
from specdec.drafters.state import Reset, check_reset
from specdec.drafters.tries import TrieTable
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.observation import Observation, Observes
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.reasons import part_of
from specdec.request import Capacity, Decoding
from specdec.tree import Acceptance, TokenTree

Variant = tuple[tuple[int, ...], int]
MODES = ("union", "cascade", "bandit")
USES = {"weights": "union", "costs": "bandit"}  # settings of one mode alone
NODES = 2  # of a trie, for each node of the budget
SIZES = (8, 16, 32, 64, 128)  # nodes of trees that only hold what was found
LONGEST_FIRST = ("never", "category", "prompt")


class Compose(ShapedDrafter):
    """Trees from the mixture of several draft distributions.

    At every node the candidates of the parts are merged, each token with the weighted sum of its
    probabilities, and the tree policy chooses among them: one budget, and no prefix twice. The
    mixture is what sampled children are drawn from, so the rules stay lossless.

    Modes (`choosers.py`):
        union: every part at every step, with `weights`; the shorter its match, the less a part
            that searches for matches counts.
        cascade: for each sequence the first part that is sure of itself: one that searches for
            matches, if it has found one of `min_match` tokens; a model, always, and so the last
            part, whatever it has found. As in
            SAM-Decoding (Hu et al. 2024), where a suffix automaton goes before a model.
        bandit: the part that pays best, in tokens for the time of its steps, given how long the
            match is; it learns that from steps in which one part drafted for all sequences.

    A part that is a model reads the tokens of a step as soon as they are accepted, while the host
    searches for matches.

    Args:
        parts: drafters by name, the most trusted first: those that search the text, and those
            that grow trees. All see the same tree policy; none drafts deeper than its own depth.
        mode: see above.
        weights: of the parts in a union; None weighs all alike.
        min_match: tokens, in a cascade.
        costs: time of a step with each part alone, in any unit, for the bandit; None measures it,
            and then the same seed need not give the same trees.
        reset: after what the bandit forgets.
        depth: levels of the tree; None leaves it to the policy.

    Raises:
        ValueError: a setting out of range, or parts that cannot be composed.
    """

    on_device = True

    def __init__(
        self,
        *,
        parts: dict[str, Drafter],
        mode: str = "cascade",
        weights: list[float] | None = None,
        min_match: int = 4,
        costs: list[float] | None = None,
        reset: Reset = "never",
        depth: int | None = None,
    ) -> None:
        super().__init__(depth=depth)
        _check(parts, mode, min_match, weights=weights, costs=costs)
        check_reset(reset)
        count = len(parts)
        self._start_weights = [1.0 / count] * count if weights is None else weights
        self.chooser: Chooser = {
            "union": lambda: Union(self._start_weights),
            "cascade": lambda: Cascade(count, min_match),
            "bandit": lambda: Pulls(count, costs, reset),
        }[mode]()
        names = [part.name or name for name, part in parts.items()]
        self.sources = tuple(names if len(set(names)) == count else parts)
        self.names = list(parts)
        self.parts = [p for p in parts.values() if isinstance(p, HostDrafter | GrowingDrafter)]
        self.reads_states = any(part.reads_states for part in self.parts)
        learning = [*(part.reset for part in self.parts), self.chooser.reset]
        self.reset = next((kept for kept in LONGEST_FIRST if kept in learning), None)
        self.device: torch.device
        self._kinds: list[Variant] = []  # the variants
        self._sizes: list[int] = []
        self._tables: dict[int, TrieTable] = {}  # of parts that search
        self._weights: Tensor  # [rows, P] of the parts, and the same on the host
        self._shares: Tensor
        self._tree: TokenTree  # of the last draft
        self._used, self._most = tuple(range(count)), 0
        self._nodes: dict[int, int] = {}  # of the largest trie that a part has found

    def check(self, tree: TreePolicy) -> None:
        super().check(tree)
        self._each(lambda part: part.check(tree))

    def find(self) -> None:
        self._each(lambda part: part.find())

    def load(self, target: PagedLM, models: Models) -> None:
        self.device = target.device
        self._each(lambda part: part.load(target, models))
        self._join_parts()

    def _each(self, do: Callable[[Drafter], None]) -> None:
        """What parts refuse has their names."""
        for name, part in zip(self.names, self.parts, strict=True):
            with part_of(f"drafter.parts.{name}"):
                do(part)

    def _join_parts(self) -> None:
        """What the parts ask for and say once they are loaded.

        Raises:
            ValueError: one reads states that the target does not compute, because another has.
        """
        self.observes, begun = Observes(), 0
        each = [part.page_successors for part in self.parts if part.reads_states]
        self.page_successors = max(each, default=0) if all(each) else 0
        for name, part in zip(self.names, self.parts, strict=True):
            self.observes |= part.observes
            notes = {
                f"drafter.parts.{name}.{of.partition('.')[2]}": note
                for of, note in part.notes.items()
            }
            self.notes = {**self.notes, **notes}
            if isinstance(part, GrowingDrafter) and part.fills_scratch:
                begun = part.layers
        below = [tap for tap in self.observes.taps if tap != "normal" and tap < begun]
        if below:
            raise ValueError(
                f"drafter.parts={self.names}: one drafts with the first {begun} layers, which are "
                f"not run again, and another reads the state after layer {below[0]}; leave one out"
            )

    def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
        super().prepare(capacity, tree)
        rows, device = capacity.rows + 1, self.device
        self._shares = torch.zeros(
            rows, len(self.parts), dtype=torch.float64, pin_memory=device.type == "cuda"
        )
        self._shares[:] = torch.tensor(self._start_weights)
        self._weights = self._shares.to(device, copy=True)
        width = max((tree.width(level) for level in range(self.levels)), default=1)
        for number, part in enumerate(self.parts):
            part.join(self.levels)
            part.prepare(capacity, tree)
            if isinstance(part, HostDrafter):
                self._tables[number] = TrieTable(
                    rows=rows,
                    nodes=NODES * tree.budget + 1,
                    width=width if tree.children == "top_k" else part.candidates,
                    device=device,
                )
        # Children drawn with replacement may make more nodes than were found.
        self._sizes = [n for n in SIZES if n <= tree.budget and tree.children == "top_k"]
        self.variants = self._kinds = self._kinds_of_steps()

    def _kinds_of_steps(self) -> list[Variant]:
        """Which parts draft, and nodes that suffice for what they have found (0: no limit
        known)."""
        if self.chooser.mixes and not self._tables:
            return []  # nothing to look at
        variants: list[Variant] = [(tuple(range(len(self.parts))), 0)]
        if not self.chooser.mixes:
            for number in range(len(self.parts)):
                sizes = self._sizes if number in self._tables else []
                variants += [((number,), size) for size in (0, *sizes)]
        return variants

    def shareable(self, prefix: Sequence[int]) -> int | None:
        found = [part.shareable(prefix) for part in self.parts]
        return min((count for count in found if count is not None), default=None)

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        taken = sequences
        for number, part in enumerate(self.parts):
            fitting = part.start(taken)
            if fitting is None:
                continue
            for sequence in taken:
                if sequence not in fitting:
                    for before in self.parts[:number]:
                        before.finish(sequence)
            taken = fitting
        return taken

    def prefill(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding]:
        read = sequences
        for part in self.parts:
            whole = part.prefill(sequences, tokens)
            if whole is not None:
                read = [sequence for sequence in read if sequence in whole]
        return read

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        for part in self.parts:
            if part.observes.prompts:
                part.read(rows, tokens, length, seen)

    def finish(self, sequence: Decoding) -> None:
        for part in self.parts:
            part.finish(sequence)
        self.chooser.finish(sequence)

    def forget(self) -> None:
        self.chooser.forget()
        for part in self.parts:
            part.forget()

    # On the host, before a step

    def look(self, sequences: Sequence[Decoding], wanted: Variant | None = None) -> Variant:
        self.chooser.begin(sequences)
        self._nodes = {}
        self._shares.zero_()
        used: set[int] = set()
        for sequence in sequences if self.levels else ():
            chosen = self._choose(sequence, wanted)
            for part, weight in chosen.items():
                self._shares[sequence.row, part] = weight
            used.update(chosen)
        self._weights.copy_(self._shares, non_blocking=True)
        for number in self._nodes:
            self._tables[number].send()
        variant = wanted or (tuple(sorted(used)), 0)
        if not wanted and len(used) == 1 and self._nodes:
            (nodes,) = self._nodes.values()
            variant = variant[0], next((n for n in self._sizes if n >= nodes), 0)
        self._used, self._most = variant if variant in self._kinds else self._kinds[0]
        self.chooser.chosen(len(self._used) == 1)
        return self._used, self._most

    def _choose(self, sequence: Decoding, wanted: Variant | None) -> dict[int, float]:
        """Which parts are to draft for a sequence, and their weights; what they have found is in
        their tables."""
        if wanted:
            return dict.fromkeys(wanted[0], 1.0)
        found: dict[int, Trie] = {}

        def match(number: int) -> float:
            part = self.parts[number]
            if not isinstance(part, HostDrafter):
                return math.inf
            found[number] = trie = part.trie(sequence)
            return part.match_length(sequence) if trie.children else 0

        chosen = self.chooser.choose(sequence, match)
        for number in chosen:
            if number in found:
                nodes = self._tables[number].write(sequence.row, found[number])
                self._nodes[number] = max(nodes, self._nodes.get(number, 0))
        return chosen

    # On the device

    def draft(self, context: StepContext) -> TokenTree:
        if not self.levels:
            return TokenTree.roots(context.roots)
        used = {number: self.parts[number] for number in self._used}
        weights = self._weights[context.rows]  # [B, P]
        answers = {number: self._begin(number, context) for number in used}
        # Draws depend on how many candidates there are, and must not on who else is in the batch.
        support = sum(part.candidates for part in self.parts)
        offered: list[tuple[Tensor, Tensor]] = []  # ids and sources [B, F, K] of each frontier

        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            found = {
                number: answers[number](frontier)
                for number, part in used.items()
                if frontier.level < part.levels
            }
            width = self.tree.width(frontier.level) if self.tree.children == "top_k" else support
            if len(used) == 1:
                ids, probs = found[self._used[0]]
            else:
                ids, probs, source = mix(found, weights, width)
                offered.append((ids, source))
            missing = (0, max(0, width - ids.shape[2]))
            return pad(ids, missing), pad(probs, missing)

        levels, most = max(part.levels for part in used.values()), self._most or None
        if most:
            levels = min(levels, most - 1)
        tree, expanded = grow(self.tree, levels, context, expand, most=most)
        if len(used) == 1:
            source = torch.full_like(tree.parents, self._used[0], dtype=torch.int8)
        else:
            source = sources_of(tree, expanded, offered)
        tree = replace(tree, source=source)
        for part in used.values():
            if isinstance(part, GrowingDrafter):
                tree = part.end(context, tree, expanded)
        self._tree = tree
        return tree

    def _begin(self, number: int, context: StepContext) -> Expand:
        part = self.parts[number]
        if isinstance(part, GrowingDrafter):
            return part.begin(context)
        return self._tables[number].expand(context)

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if not self.levels:
            return
        for number, part in enumerate(self.parts):
            if not isinstance(part, GrowingDrafter):
                continue
            if number in self._used:
                part.commit(context, acceptance, seen)
            else:
                part.follow(context, self._tree, acceptance, seen)


def _check(
    parts: dict[str, Drafter], mode: str, min_match: int, **lists: list[float] | None
) -> None:
    """Raise ValueError for settings out of range, and for parts that cannot be composed."""
    if mode not in MODES:
        raise ValueError(f"drafter.mode={mode}: must be one of {', '.join(MODES)}")
    if len(parts) < 2:
        raise ValueError(f"drafter.parts={list(parts)}: name at least two")
    for name, values in lists.items():
        if values is None:
            continue
        if len(values) != len(parts) or not all(0 < value < math.inf for value in values):
            raise ValueError(
                f"drafter.{name}={values}: must be a positive number for each of "
                f"{', '.join(parts)}"
            )
        if mode != USES[name]:
            raise ValueError(
                f"drafter.{name}={values}: drafter.mode={mode} uses none; leave it null, or use "
                f"drafter.mode={USES[name]}"
            )
    if min_match < 1:
        raise ValueError(f"drafter.min_match={min_match}: must be at least 1")
    last = len(parts) - 1
    for place, (name, part) in enumerate(parts.items()):
        if not isinstance(part, HostDrafter | GrowingDrafter) or not part.composable:
            mend = getattr(part, "mend", ShapedDrafter.mend)
            raise ValueError(
                f"drafter.parts.{name}: {type(part).__name__} needs trees of its own and cannot "
                f"be composed; {mend}"
            )
        if mode == "cascade" and isinstance(part, GrowingDrafter) and place < last:
            raise ValueError(
                f"drafter.parts.{name}: a model is always sure, so in a cascade nothing after it "
                f"is ever asked; put it last, or use drafter.mode=union"
            )
    if sum(isinstance(p, GrowingDrafter) and p.fills_scratch for p in parts.values()) > 1:
        raise ValueError(
            f"drafter.parts={list(parts)}: two draft in the same scratch of the target's cache; "
            f"leave one out"
        )
