"""drafter=token_recycling and drafter=lookahead: what they learn, how long they keep it, and that
the outputs stay the target's.

A scripted target follows tables, so what is to be learnt can be worked out in plain Python.
"""

from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.decode import Decoder
from specdec.drafters.growth import Frontier
from specdec.drafters.lookahead import Lookahead
from specdec.drafters.none import NoDrafter
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.observation import Observation
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from tests.decoding import FakeVerifier, decoder_of, prepared, requests_of

CPU = torch.device("cpu")
V = 40
SCORES = torch.rand(V, V, generator=torch.Generator().manual_seed(5))  # of the next token, by last
SMALL = SimpleNamespace(vocab_size=V, device=CPU)
Build = Callable[..., Any]


class Scripted(FakeVerifier):
    """A target whose next token depends on the last one alone."""

    def logits(self, context: StepContext, tree: TokenTree) -> Tensor:
        tree.check()
        return SCORES[tree.tokens]


def ranked(token: int, count: int) -> list[int]:
    """The scripted target's best tokens after this one."""
    return sorted(range(V), key=lambda after: -float(SCORES[token, after]))[:count]


def following(token: int, count: int) -> list[int]:
    """Its text after this token."""
    text = [token]
    for _ in range(count):
        text += ranked(text[-1], 1)
    return text[1:]


def decoder(
    drafter: Drafter,
    tree: TreePolicy | None = None,
    *,
    batch_size: int = 1,
    target: PagedLM | None = None,
    **more: Any,
) -> Decoder:
    """Over the scripted target, or a real one."""
    if target is None:
        drafter.load(SMALL, None)  # type: ignore[arg-type]
    return decoder_of(
        Scripted() if target is None else target,
        drafter,
        tree,
        rows=batch_size,
        max_tokens=200,
        **more,
    )


def spied(kind: type, **settings: Any) -> Any:
    """A drafter that notes its trees, row by row, and what was kept of them."""

    class Spied(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(**settings)
            self.trees: list[TokenTree] = []
            self.noted: list[tuple[list[int], list[list[int]], list[int]]] = []
            self.kept: list[list[int]] = []

        def draft(self, context: StepContext) -> TokenTree:
            tree: TokenTree = super().draft(context)
            tree.check()
            assert tree.nodes <= self.tree.budget + 1
            if self.most_nodes is not None:
                assert tree.nodes <= self.most_nodes
            self.trees.append(tree)
            ids = [sequence.request.id for sequence in context.sequences]
            sizes = tree.size.tolist()
            rows = [row[:n] for row, n in zip(tree.tokens.tolist(), sizes, strict=True)]
            parents = [row[:n] for row, n in zip(tree.parents.tolist(), sizes, strict=True)]
            self.noted.append((ids, rows, parents))
            return tree

        def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
            super().commit(context, acceptance, seen)
            self.kept.append(acceptance.length.tolist())
            self.learnt()

        def learnt(self) -> None:
            """Called after each step."""

    return Spied()


PROMPTS = [[3, 7, 3, 9, 3, 7, 1, 3], [5, 6], [8], [11, 12, 13, 11, 12, 14, 11]]
KINDS = {"token_recycling": TokenRecycling, "lookahead": Lookahead}


def run(
    drafter: Drafter, prompts: Sequence[Sequence[int]], tree: TreePolicy | None = None, **more: Any
) -> list[list[int]]:
    new, categories = more.pop("new", 30), more.pop("categories", ())
    done = decoder(drafter, tree, **more).run(requests_of(prompts, new, categories))
    return [s.output_ids for s in sorted(done, key=lambda s: s.request.id)]


# --- trees

WIDTHS = {0: [1], 1: [1], 2: [2], 9: [3, 2], 40: [4, 3, 2]}  # of static trees, by budget
TREES: dict[str, Callable[[int], TreePolicy]] = {
    "chain": lambda budget: Chain(budget=budget),
    "static": lambda budget: Static(widths=WIDTHS[budget], budget=budget),
    "dynamic": lambda budget: Dynamic(budget=budget, width=4, depth=5),
}


@pytest.mark.parametrize("budget", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", KINDS)
def test_trees_are_valid_within_budget_and_the_same_again(
    name: str, tree: str, budget: int
) -> None:
    expected = [following(prompt[-1], 30) for prompt in PROMPTS]
    drafters = [spied(KINDS[name]) for _ in range(2)]
    for drafter in drafters:
        for _ in range(2):  # a second run of the same drafter begins with nothing
            assert run(drafter, PROMPTS, TREES[tree](budget), batch_size=3) == expected
    first, second = (drafter.noted for drafter in drafters)
    assert first == second
    assert first[: len(first) // 2] == first[len(first) // 2 :]
    steps = sum(map(len, drafters[0].kept)) // 2
    assert (steps < 4 * 30) == (budget > 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_a_batch_is_the_row_alone(name: str) -> None:
    def trees(batch_size: int) -> dict[int, list[Any]]:
        drafter = spied(KINDS[name])
        run(drafter, PROMPTS, Dynamic(budget=20, width=4, depth=5), batch_size=batch_size)
        found: dict[int, list[Any]] = {}
        for ids, tokens, parents in drafter.noted:
            for i, *row in zip(ids, tokens, parents, strict=True):
                found.setdefault(i, []).append(row)
        return found

    assert trees(1) == trees(3)


# --- what is learnt


@pytest.mark.parametrize("from_prompt", [True, False])
@pytest.mark.parametrize("reset", ["prompt", "category", "never"])
def test_the_table_holds_what_the_target_named_last(reset: str, from_prompt: bool) -> None:
    """In each slot every token has what plain Python remembers: the prompt's bigrams, then the
    target's best at whatever node stood last. The scripted target always names the same."""
    count = 4
    drafter = spied(
        TokenRecycling,
        successors=count,
        reset=reset,
        from_prompt=from_prompt,
    )
    categories = ["a", "b", "a", "b"]
    known: dict[Any, dict[int, list[int]]] = {}

    def key(i: int) -> Any:
        return {"prompt": i, "category": categories[i], "never": None}[reset]

    def check() -> None:
        ids, tokens, _ = drafter.noted[-1]
        for i, row in zip(ids, tokens, strict=True):
            if from_prompt and (i, "read") not in known:
                known[i, "read"] = {}
                bigrams = list(zip(PROMPTS[i], PROMPTS[i][1:], strict=False))[::-1]
                mine = known.setdefault(key(i), {})
                before = set(mine)
                for token, after in bigrams:
                    if token not in before and after not in mine.setdefault(token, []):
                        mine[token] = [*mine[token], after][:count]
            for token in row:
                known.setdefault(key(i), {})[token] = ranked(token, count)
        for i in ids:
            row = next(s.row for s in loop.running if s.request.id == i)
            slot = int(drafter._slot[row])
            table = drafter._table[slot * V : (slot + 1) * V].tolist()
            mine = known.get(key(i), {})
            for token in range(V):
                assert table[token] == (mine.get(token, []) + [-1] * count)[:count]

    drafter.learnt = check
    loop = decoder(drafter, Dynamic(budget=12, width=3, depth=4))
    assert len(list(loop.run(requests_of(PROMPTS, 12, categories)))) == 4


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_of_several_nodes_with_a_token_the_last_is_remembered(last: int) -> None:
    drafter = prepared(TokenRecycling(successors=2, reset="never"), Chain(budget=3), SMALL)
    tokens = torch.tensor([[7, 7, 7, 7], [7, 8, 7, 9]])
    sizes = torch.tensor([4, last], dtype=torch.int32)
    tree = TokenTree(tokens=tokens, parents=torch.tensor([[-1, 0, 1, 2]] * 2), size=sizes, depth=3)
    candidates = torch.arange(24).view(2, 4, 3)
    drafter.follow(
        context_of([0, 1]),
        tree,
        Acceptance(
            path=torch.zeros(2, 4, dtype=torch.int64),
            length=torch.tensor([1, min(last, 1)]),  # a size of 0 is an idle row
            next_token=torch.zeros(2, dtype=torch.int64),
        ),
        Observation(tokens=candidates),
    )
    flat = [(7, [0, 1]), (7, [3, 4]), (7, [6, 7]), (7, [9, 10])]
    flat += [(7, [12, 13]), (8, [15, 16]), (7, [18, 19]), (9, [21, 22])][:last]
    expected = dict(flat)
    for token in range(V):
        assert drafter._table[token].tolist() == expected.get(token, [-1, -1])


def context_of(rows: Sequence[int], roots: Sequence[int] | None = None) -> StepContext:
    return StepContext(
        sequences=[],
        roots=torch.tensor(list(roots or rows)),
        sampling=SamplingParams(),
        uniforms=lambda stream, count: torch.zeros(len(rows), count, dtype=torch.float64),
        rows=torch.tensor(list(rows)),
    )


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_probabilities_are_a_prior_over_the_known_ranks(children: Children) -> None:
    drafter = prepared(
        TokenRecycling(successors=3, decay=0.5, reset="never"),
        Static(widths=[2, 1], children=children),
        SMALL,
    )
    drafter._table[4] = torch.tensor([9, 8, 7])
    drafter._table[5] = torch.tensor([6, -1, -1])
    expand = drafter.begin(context_of([0], roots=[4]))
    tokens = torch.tensor([[4, 5, 6]])
    frontier = Frontier(
        level=0, first=0, tokens=tokens, parents=tokens - 1, alive=torch.ones_like(tokens).bool()
    )
    ids, probs = expand(frontier)
    if children == "top_k":
        assert ids[0].tolist() == [[9, 8], [6, 0], [0, 0]]
        expected = [[4 / 7, 2 / 7], [4 / 7, 0.0], [0.0, 0.0]]
    else:
        assert ids[0].tolist() == [[9, 8, 7], [6, 0, 0], [0, 0, 0]]
        expected = [[4 / 7, 2 / 7, 1 / 7], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(probs[0], torch.tensor(expected, dtype=torch.float64))


class NoLook(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "item"}
        return func(*args, **(kwargs or {}))


def test_table_lookups_and_updates_can_be_captured() -> None:
    drafter = prepared(TokenRecycling(successors=2), Chain(budget=3), SMALL, rows=2)
    there = drafter._table.data_ptr()
    tokens = torch.tensor([[4, 5, 6], [4, 4, 4]])
    tree = TokenTree(
        tokens=tokens, parents=torch.tensor([[-1, 0, 1]] * 2), size=torch.tensor([3, 0]), depth=2
    )
    acceptance = Acceptance(
        path=torch.zeros(2, 3, dtype=torch.int64),
        length=torch.tensor([2, 0]),
        next_token=torch.tensor([1, 1]),
    )
    seen = Observation(tokens=torch.arange(18).view(2, 3, 3))
    context = context_of([0, 2])  # the last one is idle
    frontier = Frontier(
        level=0, first=0, tokens=tokens, parents=tokens, alive=torch.ones_like(tokens).bool()
    )
    with NoLook():
        drafter.begin(context)(frontier)
        drafter.end(context, tree, tokens)
        drafter.commit(context, acceptance, seen)
    assert drafter._table.data_ptr() == there
    assert (drafter._table[:-1] >= 0).any(1).nonzero()[:, 0].tolist() == [4, 5, 6]


# --- lookahead


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
    guesses, tree = 3, Dynamic(budget=400, width=8, depth=n)
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


# --- how long it is remembered


def first_kept(name: str, reset: str, categories: Sequence[str]) -> list[int]:
    """Tokens of the first step of each of three requests, all of whom ask the same."""
    drafter = spied(KINDS[name], reset=reset, from_prompt=False)
    loop = decoder(drafter, Dynamic(budget=30, width=4, depth=3))
    done = loop.run(requests_of([[3, 9]] * 3, 20, categories))
    return [s.accepted_lengths[0] for s in sorted(done, key=lambda s: s.request.id)]


@pytest.mark.parametrize("name", KINDS)
def test_knowledge_lasts_as_long_as_reset_says(name: str) -> None:
    categories = ["a", "b", "a"]
    assert max(first_kept(name, "prompt", categories)) <= 2
    first, second, third = first_kept(name, "category", categories)
    assert max(first, second) <= 2 < third
    first, second, third = first_kept(name, "never", categories)
    assert first <= 2 < min(second, third)


@pytest.mark.parametrize("reset", ["prompt", "category", "never"])
@pytest.mark.parametrize("name", KINDS)
def test_forgetting_leaves_nothing(name: str, reset: str) -> None:
    drafter = spied(KINDS[name], reset=reset)
    loop = decoder(drafter, Dynamic(budget=20, width=4, depth=4), batch_size=2)
    found = []
    for _ in range(3):
        before = len(drafter.noted)
        outputs = [s.output_ids for s in loop.run(requests_of(PROMPTS, 20, ["a", "b", "a", "b"]))]
        found.append((outputs, drafter.noted[before:]))
        if len(found) == 1:
            drafter.forget()
    assert found[0] == found[1]
    assert (found[1] == found[2]) == (reset == "prompt")


def test_the_category_unused_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenRecycling, "CATEGORIES", 3)
    drafter = prepared(TokenRecycling(reset="category"), Chain(budget=2), SMALL, rows=2)
    assert len(drafter._table) == 3 * V + 1

    def begin(category: str | None, row: int = 0) -> Decoding:
        request = Request(id=0, prompt_ids=[1], max_new_tokens=9, category=category)
        sequence = Decoding(request, row, [1])
        drafter.start([sequence])
        return sequence

    def known(row: int = 0) -> bool:
        slot = int(drafter._slot[row])
        return bool(drafter._table[slot * V + 30, 0] >= 0)

    def learn(row: int = 0) -> None:
        drafter._table[int(drafter._slot[row]) * V + 30] = 2

    running = begin("a")
    learn()
    for name in ("b", None):
        one = begin(name, 1)
        assert not known(1)
        learn(1)
        drafter.finish(one)
    one = begin("b", 1)  # b is used again, so None is now the oldest but a, which is running
    assert known(1)
    drafter.finish(one)
    one = begin("c", 1)
    assert not known(1)
    assert known(0)
    drafter.finish(one)
    drafter.finish(running)
    for name, remembered in (("b", True), ("a", True), (None, False), ("c", False)):
        one = begin(name)
        assert known() == remembered, name
        drafter.finish(one)


def test_more_rows_than_categories_are_kept_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenRecycling, "CATEGORIES", 1)
    drafter = spied(TokenRecycling, reset="category")
    found = run(drafter, PROMPTS, Chain(budget=2), batch_size=4, categories=["a", "b", "c", "d"])
    assert found == [following(prompt[-1], 30) for prompt in PROMPTS]


# --- settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("token_recycling", {"successors": 0}, "drafter.successors=0: must be at least 1"),
        ("token_recycling", {"successors": V + 1}, f"drafter.successors={V + 1}: must be"),
        ("token_recycling", {"decay": 0.0}, "drafter.decay=0.0: must be above 0"),
        ("token_recycling", {"decay": 1.1}, "drafter.decay=1.1: must be"),
        ("token_recycling", {"reset": "daily"}, "drafter.reset=daily: must be one of"),
        ("token_recycling", {"depth": 0}, "drafter.depth=0: must be at least 1"),
        ("lookahead", {"window": 0}, "drafter.window=0: must be at least 1"),
        ("lookahead", {"ngram": 1}, "drafter.ngram=1: must be at least 2"),
        ("lookahead", {"guesses": 0}, "drafter.guesses=0: must be at least 1"),
        ("lookahead", {"reset": "daily"}, "drafter.reset=daily: must be one of"),
        (
            "lookahead",
            {"tree": Chain(budget=2, children="sample")},
            "tree.children=sample: .* use tree.children=top_k",
        ),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    own = dict(settings)
    tree = own.pop("tree", Chain(budget=2))
    with pytest.raises(ValueError, match=message):
        prepared(KINDS[name](**own), tree, SMALL)


# --- a real target


@pytest.fixture(scope="module")
def zoo() -> tuple[PagedLM, list[list[int]], list[list[int]]]:
    target = load_model("zoo:target")
    texts = [
        'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
        "It was a dark night",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
        "<|user|>\nName three colours.\n<|assistant|>\n",
    ]
    prompts = [target.tokenizer(text).input_ids for text in texts]
    return target, prompts, run(NoDrafter(), prompts, target=target, new=16)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_plain_decoding(
    zoo: Any, name: str, tree: str, batch_size: int
) -> None:
    target, prompts, expected = zoo
    drafter = spied(KINDS[name])
    found = run(drafter, prompts, TREES[tree](9), target=target, new=16, batch_size=batch_size)
    assert found == expected
    assert sum(map(len, drafter.kept)) < 4 * 16


@pytest.mark.parametrize("reset", ["prompt", "never"])
@pytest.mark.parametrize("name", KINDS)
def test_a_seed_decides_what_is_sampled(zoo: Any, name: str, reset: str) -> None:
    """What is learnt from other prompts makes other trees, and so other steps."""
    target, prompts, _ = zoo
    found = [
        run(
            KINDS[name](reset=reset),
            prompts[:2],
            Dynamic(budget=12),
            target=target,
            new=8,
            rule=TargetOnly(),
            temperature=1.0,
            batch_size=batch_size,
        )
        for batch_size in ((1, 2) if reset == "prompt" else (2, 2))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_recycled_tokens_can_be_sampled(zoo: Any, children: Children) -> None:
    target, prompts, _ = zoo
    tree = Static(widths=[3, 2], children=children)
    drafter = spied(TokenRecycling)
    more: dict[str, Any] = {"rule": RecursiveRejection(), "temperature": 1.0, "new": 8}
    found = [run(drafter, prompts[:2], tree, target=target, batch_size=b, **more) for b in (1, 2)]
    assert found[0] == found[1]
    assert max(tree.nodes for tree in drafter.trees) > 4
