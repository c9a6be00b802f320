"""drafter=compose: several drafters, one tree."""

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.drafters.bandit import Bandit
from specdec.drafters.growth import Expand, Frontier, GrowingDrafter, grow, plan
from specdec.drafters.host import HostDrafter, Trie
from specdec.drafters.mixture import mix, sources_of
from specdec.drafters.state import Memory, Reset, check_reset
from specdec.drafters.tries import TrieTable
from specdec.models.paged import PagedLM
from specdec.protocols import Capacity, Decoding, Drafter, StepContext, TreePolicy
from specdec.tree import Acceptance, TokenTree

Variant = tuple[tuple[int, ...], int]
MODES = ("union", "cascade", "bandit")
LENGTHS = (1, 2, 4, 8, 16)  # where classes of match lengths begin that a bandit tells apart
NODES = 2  # of a trie, for each node of the budget
TRUSTED_HALF = 8  # a match of so many tokens counts half of its weight in a union
SIZES = (8, 16, 32)  # nodes of trees that only hold what was found
LONGEST_FIRST = ("never", "category", "prompt")


class Compose(Drafter):
    """Trees from the mixture of several draft distributions.

    At every node the candidates of the parts are merged, each token with the weighted sum of its
    probabilities, and the tree policy chooses among them: one budget, and no prefix twice. The
    mixture is what sampled children are drawn from, so the rules stay lossless.

    Modes:
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
        target: the target model.
        tree: the tree policy, also of the parts; a part draws no deeper than its own depth.
        parts: drafters by name, the most trusted first: those that search the text, and those
            that grow trees.
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
        target: PagedLM,
        tree: TreePolicy,
        parts: dict[str, Drafter],
        mode: str = "cascade",
        weights: list[float] | None = None,
        min_match: int = 4,
        costs: list[float] | None = None,
        reset: Reset = "never",
        depth: int | None = None,
    ) -> None:
        self.tree = tree
        self.levels = plan(tree, depth, 1)
        if mode not in MODES:
            raise ValueError(f"drafter.mode={mode}: must be one of {', '.join(MODES)}")
        if len(parts) < 2:
            raise ValueError(f"drafter.parts={list(parts)}: name at least two")
        for name, values in {"weights": weights, "costs": costs}.items():
            if values is not None and (len(values) != len(parts) or min(values) <= 0):
                raise ValueError(
                    f"drafter.{name}={values}: must be a positive number for each of "
                    f"{', '.join(parts)}"
                )
        if min_match < 1:
            raise ValueError(f"drafter.min_match={min_match}: must be at least 1")
        check_reset(reset)
        self.mode, self.min_match, self.costs = mode, min_match, costs
        self.device = target.device
        names = [part.name or name for name, part in parts.items()]
        self.sources = tuple(names if len(set(names)) == len(names) else parts)
        self.parts: list[HostDrafter | GrowingDrafter] = []
        for name, part in parts.items():
            if not isinstance(part, HostDrafter | GrowingDrafter) or not _answers(part):
                raise ValueError(
                    f"drafter.parts.{name}: {type(part).__name__} needs trees of its own and "
                    f"cannot be composed; choose another drafter"
                )
            last = len(self.parts) == len(parts) - 1
            if mode == "cascade" and isinstance(part, GrowingDrafter) and not last:
                raise ValueError(
                    f"drafter.parts.{name}: a model is always sure, so in a cascade nothing after "
                    f"it is ever asked; put it last, or use drafter.mode=union"
                )
            self.parts.append(part)
            if self.levels:
                part.levels = min(self.levels, part.depth or self.levels)
            if isinstance(part, GrowingDrafter):
                part.join(self.levels)
        if sum(isinstance(p, GrowingDrafter) and p.fills_scratch for p in self.parts) > 1:
            raise ValueError(
                f"drafter.parts={list(parts)}: two early exits need the same scratch of the "
                f"target's cache; leave one out"
            )
        self.observes = max(part.observes for part in self.parts)
        count = len(self.parts)
        self.weights = [1.0 / count] * count if weights is None else weights
        every = tuple(range(count))
        # Children drawn with replacement may make more nodes than were found.
        self._sizes = [n for n in SIZES if n <= tree.budget and tree.children == "top_k"]
        # Which parts draft, and nodes that suffice for what they have found (0: no limit known).
        self.variants: list[Variant] = [(every, 0)]
        if mode == "union" and not any(isinstance(part, HostDrafter) for part in self.parts):
            self.variants = []  # nothing to look at
        if mode != "union":
            for number, part in enumerate(self.parts):
                sizes = self._sizes if isinstance(part, HostDrafter) else []
                self.variants += [((number,), size) for size in (0, *sizes)]
        learning = [part.reset for part in self.parts] + [reset if mode == "bandit" else None]
        self.reset = next((kept for kept in LONGEST_FIRST if kept in learning), None)
        self._tables: dict[int, TrieTable] = {}  # of parts that search
        self._weights: Tensor  # [rows, P] of the parts, and the same on the host
        self._shares: Tensor
        self._bandits = Memory(reset, Bandit)
        self._pulled: list[tuple[Decoding, int, tuple[int, int]]] = []  # of the last look
        self._looked = 0.0
        self._tree: TokenTree  # of the last draft
        self._used, self._most = every, 0
        self._nodes: dict[int, int] = {}  # of the largest trie that a part has found

    def prepare(self, capacity: Capacity) -> None:
        rows, device = capacity.rows + 1, self.device
        self._shares = torch.zeros(
            rows, len(self.parts), dtype=torch.float64, pin_memory=device.type == "cuda"
        )
        self._shares[:] = torch.tensor(self.weights)
        self._weights = self._shares.to(device, copy=True)
        width = max((self.tree.width(level) for level in range(self.levels)), default=1)
        for number, part in enumerate(self.parts):
            part.prepare(capacity)
            if isinstance(part, HostDrafter):
                self._tables[number] = TrieTable(
                    rows=rows,
                    nodes=NODES * self.tree.budget + 1,
                    width=width if self.tree.children == "top_k" else part.candidates,
                    device=device,
                )

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

    def finish(self, sequence: Decoding) -> None:
        for part in self.parts:
            part.finish(sequence)
        self._bandits.finish(sequence)

    def forget(self) -> None:
        self._bandits.clear()
        self._pulled = []
        for part in self.parts:
            part.forget()

    # On the host, before a step

    def look(self, sequences: Sequence[Decoding], wanted: Variant | None = None) -> Variant:
        self._reward(sequences)
        self._pulled, self._nodes = [], {}
        self._shares.zero_()
        used: set[int] = set()
        for sequence in sequences if self.levels else ():
            chosen = dict.fromkeys(wanted[0], 1.0) if wanted else self._choose(sequence)
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
        self._used, self._most = variant if variant in self.variants else self.variants[0]
        self._looked = time.perf_counter()
        return self._used, self._most

    def _choose(self, sequence: Decoding) -> dict[int, float]:
        """Which parts are to draft for a sequence, and their weights; what they have found is in
        their tables."""
        found: dict[int, tuple[Trie | None, float]] = {}
        for number in range(len(self.parts)):
            found[number] = self._search(number, sequence)
            if self.mode == "cascade" and found[number][1] >= self.min_match:
                break
        last = len(self.parts) - 1
        chosen = {number if self.mode == "cascade" else last: 1.0}
        if self.mode == "union":
            chosen = {
                number: weight * (match / (match + TRUSTED_HALF) if match < math.inf else 1.0)
                for (number, (_, match)), weight in zip(found.items(), self.weights, strict=True)
            }
        elif self.mode == "bandit":
            longest = max((found[number][1] for number in self._tables), default=0)
            kind = bisect_right(LENGTHS, longest)
            arms = [(number, kind) for number, (_, match) in found.items() if match]
            if arms:
                arm = arms[self._bandits.of(sequence).choose(arms)]
                self._pulled.append((sequence, sequence.steps, arm))
                chosen = {arm[0]: 1.0}
        for number in chosen:
            trie = found[number][0]
            if trie is not None:
                nodes = self._tables[number].write(sequence.row, trie)
                self._nodes[number] = max(nodes, self._nodes.get(number, 0))
        return chosen

    def _search(self, number: int, sequence: Decoding) -> tuple[Trie | None, float]:
        """What a part has found, and how long its match is; a model needs none."""
        part = self.parts[number]
        if not isinstance(part, HostDrafter):
            return None, math.inf
        trie = part.trie(sequence)
        return trie, part.match_length(sequence) if trie.children else 0

    def _reward(self, sequences: Sequence[Decoding]) -> None:
        """Tell the bandit what the last choices have yielded."""
        passed = time.perf_counter() - self._looked
        # The time is that of one part alone, and no prompt was taken in meanwhile.
        alone = [pulled[0] for pulled in self._pulled] == list(sequences) and len(self._used) == 1
        for sequence, steps, arm in self._pulled:
            stepped = sequence.steps == steps + 1 and not sequence.finish_reason
            if stepped and (alone or self.costs):
                cost = self.costs[arm[0]] if self.costs else passed
                self._bandits.of(sequence).learn(arm, sequence.accepted_lengths[-1], cost)

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

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        if not self.levels:
            return
        for number, part in enumerate(self.parts):
            if not isinstance(part, GrowingDrafter):
                continue
            if number in self._used:
                part.commit(context, acceptance)
            else:
                part.follow(context, self._tree, acceptance)


def _answers(part: HostDrafter | GrowingDrafter) -> bool:
    """Whether what it does for a tree of its own it can do for one of several drafters."""
    kind = type(part)
    commits = kind.commit is not Drafter.commit
    if isinstance(part, HostDrafter):
        return part.composable and not commits and kind.draft is HostDrafter.draft
    return part.composable and commits == (type(part).follow is not GrowingDrafter.follow)
