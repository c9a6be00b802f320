"""drafter=lookahead: n-grams that the target makes on the side, in a window beside the guesses."""

from collections.abc import Iterable, Sequence
from functools import partial
from random import Random

from specdec.drafters.host import HostDrafter, HostTree, tensors_of
from specdec.drafters.state import Memory, Reset, check_reset
from specdec.observation import Observation, Observes
from specdec.protocols import StepContext, TreePolicy
from specdec.request import Decoding
from specdec.tree import MOST_LEVELS, Acceptance, TokenTree

EXPLORED = 1e-6  # draft probability of a node of the window: not certain, and not impossible


class Lookahead(HostDrafter):
    """Lookahead decoding (Fu et al., ICML 2024, section 3): one pass of the target verifies
    n-grams that it made in earlier steps and makes new ones.

    The window is `window` columns of `ngram` - 1 tokens, its levels. Column 0 begins with the
    root, column i with a guess of the token i places further: these first tokens are a chain, and
    the other levels of a column are a branch below its first. What the target finds most probable
    at the end of each branch is a new token. Together with its column it is an n-gram for the
    pool, once no token after the column's first is random; and it is the column's new last level,
    while the first is dropped. That moves every column on by a token, as the text is. If a step
    yields k tokens, the first k - 1 columns are behind the text and are dropped too, and as many
    of random tokens of the prompt come in at the far end. All columns begin as such; they depend
    on the request alone.

    The pool has the `guesses` latest n-grams of each first token; those of the root are the
    guesses. The policy grows its tree of them first, within its budget, and whole columns fill
    what is left of that, the first ones first: a small budget is spent on what is known, and one
    below `ngram` - 2 explores nothing. A node that is both is one.

    Args:
        depth: levels of the guesses; None leaves it to the policy.
        window: columns, W in the paper.
        ngram: tokens of an n-gram, N in the paper.
        guesses: n-grams remembered for each first token, G in the paper.
        from_prompt: n-grams of prompt and output go into the pool too.
        reset: after what the pool is emptied, as in `drafters/state.py`.

    Raises:
        ValueError: a setting out of range, or children that are to be sampled.
    """

    composable = False

    def __init__(
        self,
        *,
        depth: int | None = None,
        window: int = 8,
        ngram: int = 4,
        guesses: int = 8,
        from_prompt: bool = True,
        reset: Reset = "prompt",
    ) -> None:
        super().__init__(depth=depth)
        if not 1 <= window <= MOST_LEVELS:
            raise ValueError(f"drafter.window={window}: must be from 1 to {MOST_LEVELS}")
        if not 2 <= ngram <= MOST_LEVELS:
            raise ValueError(f"drafter.ngram={ngram}: must be from 2 to {MOST_LEVELS}")
        if window + ngram - 3 > MOST_LEVELS:
            raise ValueError(
                f"drafter.window={window}: with drafter.ngram={ngram} the last column is at depth "
                f"{window + ngram - 3}, and a tree has at most {MOST_LEVELS} levels; lower either"
            )
        if guesses < 1:
            raise ValueError(f"drafter.guesses={guesses}: must be at least 1")
        check_reset(reset)
        self.observes = Observes(tokens=1)
        self.window, self.ngram, self.from_prompt, self.reset = window, ngram, from_prompt, reset
        self._pools: Memory[_Pool] = Memory(reset, partial(_Pool, guesses))
        self._windows: dict[int, _Window] = {}  # by row

    def check(self, tree: TreePolicy) -> None:
        super().check(tree)
        if tree.children != "top_k":
            raise ValueError(
                f"tree.children={tree.children}: drafter=lookahead draws no children; "
                f"use tree.children=top_k with acceptance=target_only"
            )

    def start(self, sequences: Sequence[Decoding]) -> None:
        for sequence in sequences:
            self._windows[sequence.row] = _Window(sequence, self.window, self.ngram - 1)

    def finish(self, sequence: Decoding) -> None:
        del self._windows[sequence.row]
        self._pools.finish(sequence)

    def forget(self) -> None:
        self._pools.clear()

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        pool, tokens = self._pools.of(sequence), sequence.tokens
        if self.from_prompt:
            window = self._windows[sequence.row]
            for end in range(max(window.read + 1, self.ngram), len(tokens) + 1):
                pool.add(tokens[end - self.ngram : end])
            window.read = len(tokens)
        for age, path in enumerate(pool.after(tokens[-1])):
            yield path[:levels], 0.5**age

    def draft(self, context: StepContext) -> TokenTree:
        if not self.levels:
            return TokenTree.roots(context.roots)
        sequences = context.sequences
        trees = self.grown(sequences, [self.trie(sequence) for sequence in sequences])
        most = self.widest() + 2
        for sequence, tree in zip(sequences, trees, strict=True):
            self._windows[sequence.row].add_to(tree, self.tree.budget + 1, most)
        depth = max(self.levels, self.window + self.ngram - 3)
        return tensors_of(trees, depth, most, context.roots.device)

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if not self.levels:
            return
        assert seen.tokens is not None
        best, length = seen.tokens[..., 0].tolist(), acceptance.length.tolist()
        for sequence, after, kept in zip(context.sequences, best, length, strict=True):
            found = self._windows[sequence.row].move(after, kept)
            for ngram in found:
                self._pools.of(sequence).add(ngram)


class _Window:
    """The columns of one sequence; they begin with random tokens of the prompt.

    Args:
        levels: tokens of a column.
    """

    def __init__(self, sequence: Decoding, columns: int, levels: int) -> None:
        self.read = 0  # tokens of the text whose n-grams are in the pool
        self.levels = levels
        self._prompt = sequence.request.prompt_ids
        self._random = Random(sequence.request.id)
        self._columns = [self._filled() for _ in range(columns)]
        self._known = [0] * columns  # last tokens of each that are the target's
        self._ends: list[int] = []  # nodes at which the first columns end in the last tree

    def add_to(self, tree: HostTree, nodes: int, most: int) -> None:
        """Add as many columns as fit into a tree of so many nodes."""
        edges = zip(tree.parents, tree.tokens, strict=True)
        place = {edge: node for node, edge in enumerate(edges)}
        self._columns[0][0] = tree.root
        self._ends = []
        chain: list[int] = []
        for number, column in enumerate(self._columns):
            chain += column[:1] if number else []
            node, missing = 0, [*chain, *column[1:]]
            while missing and (node, missing[0]) in place:
                node = place[node, missing.pop(0)]
            if len(tree.tokens) + len(missing) > nodes:
                break
            for token in missing:
                support = tree.supports.setdefault(node, [])
                if len(support) < most and all(token != known for known, _ in support):
                    tree.supports[node] = [*support, (token, EXPLORED)]
                place[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
                node = place[node, token]
            self._ends.append(node)

    def move(self, after: Sequence[int], kept: int) -> list[list[int]]:
        """Take the tokens after the nodes of the last tree in, and move on by `kept` tokens.

        Returns:
            The n-grams that are complete.
        """
        found = []
        for number, end in enumerate(self._ends):
            ngram = [*self._columns[number], after[end]]
            if self._known[number] >= self.levels - 1:
                found.append(ngram)
            self._columns[number] = ngram[1:]
            self._known[number] += 1
        for _ in range(kept - 1):
            self._columns = [*self._columns[1:], self._filled()]
            self._known = [*self._known[1:], 0]
        return found

    def _filled(self) -> list[int]:
        return [self._random.choice(self._prompt) for _ in range(self.levels)]


class _Pool:
    """N-grams by their first token, of each the latest `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[int, dict[tuple[int, ...], None]] = {}  # the latest last

    def add(self, ngram: Sequence[int]) -> None:
        first, *rest = ngram
        known = self._known.setdefault(first, {})
        known.pop(tuple(rest), None)
        known[tuple(rest)] = None
        if len(known) > self.size:
            del known[next(iter(known))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What follows in the n-grams that begin with this token, the latest first."""
        return list(reversed(self._known.get(token, {})))
