"""drafter=lookahead: its window and pool against plain Python, and what fills a tree."""

from collections.abc import Sequence
from random import Random

import pytest

from specdec.drafters.lookahead import Lookahead
from specdec.drafters.trees.dynamic import Dynamic
from specdec.protocols import AcceptanceRule
from specdec.request import Decoding
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from tests.decoding import requests_of
from tests.drafters.learning import PROMPTS, V, following, ranked, run, spied


class Window:
    """The window and pool in plain Python, for a tree with room for all columns."""

    def __init__(self, prompt: Sequence[int], seed: int, columns: int, n: int) -> None:
        self.prompt, self.random, self.n = prompt, Random(seed), n
        self.rows = [self.fresh() for _ in range(columns)]
        self.pool: list[tuple[int, ...]] = []

    def fresh(self) -> list[tuple[int, bool]]:
        """Tokens, and whether the target made them."""
        return [(self.random.choice(self.prompt), False) for _ in range(self.n - 1)]

    def step(self, root: int, kept: int) -> None:
        self.rows[0][0] = root, self.rows[0][0][1]
        for column in self.rows:
            column.append((ranked(column[-1][0], 1)[0], True))
            if all(made for _, made in column[1:]):
                gram = tuple(token for token, _ in column)
                if gram in self.pool:
                    self.pool.remove(gram)
                self.pool.append(gram)
            del column[0]
        for _ in range(kept - 1):
            del self.rows[0]
            self.rows.append(self.fresh())

    def after(self, token: int, guesses: int) -> list[tuple[int, ...]]:
        return [gram[1:] for gram in self.pool if gram[0] == token][-guesses:][::-1]


@pytest.mark.parametrize(("columns", "n"), [(1, 2), (4, 2), (3, 3), (6, 4), (2, 5)])
def test_the_pool_is_that_of_the_paper(columns: int, n: int) -> None:
    guesses, tree = 3, Dynamic(budget=256, width=8, depth=n)
    drafter = spied(
        Lookahead,
        window=columns,
        ngram=n,
        guesses=guesses,
        from_prompt=False,
    )
    for prompt in PROMPTS[:1] + PROMPTS[3:]:
        plain = Window(prompt, 0, columns, n)

        def check(plain: Window = plain) -> None:
            plain.step(drafter.noted[-1][1][0][0], drafter.kept[-1][0])
            pool = drafter._pools._states[0]
            for token in range(V):
                assert pool.after(token) == plain.after(token, guesses)

        drafter.learnt = check
        assert run(drafter, [prompt], tree) == [following(prompt[-1], 30)]
        # From the second token on an n-gram is the target's own text.
        assert all(list(gram[2:]) == following(gram[1], n - 2) for gram in plain.pool)


def test_lookahead_learns_a_target_that_repeats_itself() -> None:
    drafter = spied(Lookahead, from_prompt=False)
    run(drafter, [[8, 1, 2, 4]], Dynamic(budget=60, width=8, depth=4), new=60)
    lengths = [kept for (kept,) in drafter.kept]
    assert lengths[0] <= 2  # only a column may have been right by chance
    assert sum(lengths[4:]) / len(lengths[4:]) > 1.5
    assert max(lengths) >= 4  # a whole n-gram


def test_the_text_goes_into_the_pool() -> None:
    drafter = Lookahead(window=1, ngram=3, guesses=2)
    sequence = Decoding(requests_of([[1, 2, 3, 1, 2, 4, 1, 2, 5, 1]], 30)[0], 0, [])
    sequence.tokens += sequence.request.prompt_ids
    drafter.start([sequence])
    assert [path for path, _ in drafter.propose(sequence, 2)] == [(2, 5), (2, 4)]
    sequence.tokens += [2, 4, 1]
    assert [path for path, _ in drafter.propose(sequence, 1)] == [(2,), (2,)]
    assert [path for path, _ in drafter.propose(sequence, 2)] == [(2, 4), (2, 5)]


def test_columns_fill_what_guesses_leave() -> None:
    """Budgets from nothing to all: the guesses come first, then whole columns, nothing twice."""
    window, n = 4, 4
    for budget in range(1, 20):
        policy = Dynamic(budget=budget, width=3, depth=5)
        drafter = spied(Lookahead, window=window, ngram=n)
        run(drafter, PROMPTS[:1], policy, new=20)
        for tree in drafter.trees:
            assert tree.proposal is not None
            listed = tree.proposal.ids, tree.proposal.probs
            for node in range(1, int(tree.size[0])):
                parent, token = int(tree.parents[0, node]), tree.tokens[0, node]
                here = (listed[0][0, parent] == token) & (listed[1][0, parent] > 0)
                assert here.sum() == 1
        unguessed = spied(Lookahead, window=window, ngram=n, from_prompt=False)
        run(unguessed, [[20, 21, 22, 23, 24, 25, 26, 27]], policy, new=1)
        (tree,) = unguessed.trees
        columns = 0 if budget < n - 2 else min(window, 1 + (budget - n + 2) // (n - 1))
        most = n - 2 + (columns - 1) * (n - 1) if columns else 0
        # Random columns may begin alike; then there is room for another one.
        assert most - (n - 1) <= tree.nodes - 1 <= budget


@pytest.mark.parametrize("rule", [Greedy(), TargetOnly(), RecursiveRejection()])
def test_lookahead_with_every_rule_at_temperature_zero(rule: AcceptanceRule) -> None:
    drafter = spied(Lookahead)
    tree = Dynamic(budget=30, width=4, depth=4)
    found = run(drafter, PROMPTS, tree, rule=rule, batch_size=2)
    assert found == [following(prompt[-1], 30) for prompt in PROMPTS]
    assert sum(map(sum, drafter.kept)) > sum(map(len, drafter.kept))
