"""drafter=compose: credit, who is asked when, and what cannot be composed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.drafters.choosers import TRUSTED_HALF, Pulls
from specdec.drafters.compose import Compose
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.host import HostDrafter
from specdec.drafters.lookahead import Lookahead
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.synthetic import Synthetic
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.flight import Step
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.observation import Observation
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.request import Decoding, Request
from specdec.tree import TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.decoding import BLIND, decoder_of, requests_of
from tests.drafters.learning import decoder, following, run, spied

pytestmark = pytest.mark.usefixtures("load_once")

REPEATING = "".join(f"def add_{i}(a, b):\n    return a + b\n\n\n" for i in range(6))

TEXTS = (REPEATING + "def add_", "It was a dark night, and the old captain stood at the")

NEW = 32


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None = None,
    *,
    batch_size: int = 1,
    temperature: float = 0.0,
) -> tuple[list[list[int]], list[Step]]:
    rule = RecursiveRejection() if temperature else None
    decoder = decoder_of(
        target, drafter, tree, rule, temperature=temperature, seed=1, rows=batch_size
    )
    prompts = [target.tokenizer(text).input_ids for text in TEXTS]
    steps: list[Step] = []
    done = {
        s.request.id: s.output_ids
        for s in decoder.run(requests_of(prompts, NEW), on_step=steps.append)
    }
    return [done[i] for i in range(len(TEXTS))], steps


class Scripted(HostDrafter):
    """Proposes nothing, or a path with a match as long as it is told."""

    def __init__(self, *, matches: Sequence[int]) -> None:
        super().__init__()
        self.matches, self.asked = list(matches), -1

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        self.asked += 1
        if self.match_length(sequence):
            yield [7] * levels, 1.0

    def match_length(self, sequence: Decoding) -> int:
        return self.matches[self.asked % len(self.matches)]


def test_a_cascade_asks_the_model_where_no_match_is_long_enough(target: PagedLM) -> None:
    tree = Chain(budget=2)
    searching = Scripted(matches=[0, 3, 4, 5])
    model = SmallLlama(path="zoo:draft")
    parts = {"text": searching, "model": model}
    drafter = Compose(parts=parts, mode="cascade", min_match=4)
    chosen = []
    look = drafter.look

    def noted(*arguments: Any) -> Any:
        variant = look(*arguments)
        chosen.append(variant[0])
        return variant

    drafter.look = noted  # type: ignore[method-assign]
    _, steps = decode(target, drafter, tree)
    assert chosen[:8] == [(1,), (1,), (0,), (0,)] * 2
    for used, step in zip(chosen, steps, strict=True):
        idle = ("model", "text")[used[0]]
        assert step.sources[0][idle] == (0, 0)
        assert sum(drafted for drafted, _ in step.sources[0].values()) == step.nodes[0]
        assert sum(kept for _, kept in step.sources[0].values()) == step.accepted[0]


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", ["union", "cascade", "bandit"])
@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_rows_of_a_batch_draft_as_if_alone(target: PagedLM, mode: str, children: str) -> None:
    """Though the parts used are those of all rows together."""
    temperature = 0.0 if children == "top_k" else 1.0
    found = []
    for batch_size in (1, 2):
        tree = Static(widths=[2, 1, 1], children=children)
        parts = {
            "ngram": NGram(),
            "small_llama": SmallLlama(path="zoo:draft"),
        }
        drafter = Compose(
            parts=parts,
            mode=mode,
            min_match=2,
            costs=[1.0, 1.4] if mode == "bandit" else None,
            reset="prompt",
        )
        outputs, steps = decode(
            target, drafter, tree, batch_size=batch_size, temperature=temperature
        )
        credit = [
            (request, sources)
            for step in steps
            for request, sources in zip(step.requests, step.sources, strict=True)
        ]
        found.append((outputs, sorted(credit, key=lambda one: one[0])))
    assert found[0] == found[1]
    for name in ("ngram", "small_llama"):
        assert sum(sources[name][0] for _, sources in found[0][1]) > 0


def test_children_are_drawn_of_as_many_candidates_whoever_is_asked(target: PagedLM) -> None:
    """Draws depend on the number, and which parts are asked on who else is in the batch."""
    parts = {"ngram": NGram(), "model": SmallLlama(path="zoo:draft", candidates=9)}
    drafter = spied(Compose, parts=parts, mode="cascade", min_match=2)
    used: list[tuple[int, ...]] = []
    look = drafter.look

    def noted(*arguments: Any) -> Any:
        variant = look(*arguments)
        used.append(variant[0])
        return variant

    drafter.look = noted
    tree = Static(widths=[2, 1], children="sample")
    decode(target, drafter, tree, batch_size=2, temperature=1.0)
    assert len({*used}) > 1
    support = sum(part.candidates for part in parts.values())
    proposals = [tree.proposal for tree in drafter.trees]
    assert {one.ids.shape[2] for one in proposals if one is not None} == {support}


def test_a_model_that_waits_reads_what_others_have_drafted(target: PagedLM) -> None:
    """Its trees are those of the model alone, whatever happened in between."""
    tree = Dynamic(budget=6)

    def trees(matches: list[int]) -> list[Any]:
        parts = {
            "text": Scripted(matches=matches),
            "model": SmallLlama(path="zoo:draft"),
        }
        drafter = Compose(parts=parts, mode="cascade", min_match=1)
        seen, draft = {}, drafter.draft

        def recorded(context: StepContext) -> TokenTree:
            made = draft(context)
            if drafter._used == (1,):
                text = tuple(context.sequences[0].tokens)
                seen[text] = made.tokens.tolist(), made.parents.tolist()
            return made

        drafter.draft = recorded  # type: ignore[method-assign]
        decode(target, drafter, tree)
        return seen  # type: ignore[return-value]

    alone, mixed = trees([0]), trees([5, 5, 0])
    common = [text for text in mixed if text in alone]
    assert len(common) >= 3
    for text in common:
        assert mixed[text] == alone[text]


@pytest.mark.slow
def test_in_a_union_a_long_match_counts_more(target: PagedLM) -> None:
    tree = Chain(budget=2)
    weights = []
    for match in (0, 1, TRUSTED_HALF, 1000):
        parts = {
            "text": Scripted(matches=[match]),
            "model": SmallLlama(path="zoo:draft"),
        }
        drafter = Compose(parts=parts, mode="union", weights=[3.0, 1.0])
        decode(target, drafter, tree)
        weights.append(drafter._weights[0].tolist())
    assert weights[0] == [0.0, 1.0]
    assert [w[0] for w in weights[1:]] == pytest.approx([3 / 9, 1.5, 3.0], rel=0.01)


def test_classes_of_match_lengths_are_told_apart(target: PagedLM) -> None:
    """Where its matches are long the text pays, elsewhere the model."""
    tree = Chain(budget=2)
    parts = {
        "ngram": NGram(),
        "small_llama": SmallLlama(path="zoo:draft"),
    }
    drafter = Compose(parts=parts, mode="bandit", costs=[1.0, 1.3])
    assert drafter.reset == "never"
    _, steps = decode(target, drafter, tree)
    chooser = drafter.chooser
    assert isinstance(chooser, Pulls)
    arms = chooser._bandits.of(_sequence()).arms
    assert len(arms) > 3
    assert not any(math.isinf(arm.cost) for arm in arms.values())
    drafter.forget()
    assert not chooser._bandits.of(_sequence()).arms
    assert steps


def _sequence() -> Decoding:
    return Decoding(Request(id=99, prompt_ids=[1], max_new_tokens=1), 0, [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "all"}, r"drafter\.mode=all: must be one of union, cascade, bandit"),
        ({"weights": [1.0]}, r"drafter\.weights=\[1\.0\]: must be a positive number for each of"),
        ({"costs": [1.0, 0.0]}, r"drafter\.costs=\[1\.0, 0\.0\]: must be a positive number"),
        ({"weights": [1.0, 2.0]}, r"drafter\.mode=cascade uses none; .* drafter\.mode=union"),
        ({"mode": "union", "costs": [1.0, 2.0]}, r"=union uses none; .* drafter\.mode=bandit"),
        ({"min_match": 0}, r"drafter\.min_match=0: must be at least 1"),
        ({"reset": "often"}, r"drafter\.reset=often: must be one of"),
        ({"depth": 0}, r"drafter\.depth=0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    parts = {"one": NGram(), "two": NGram()}
    with pytest.raises(ValueError, match=message):
        Compose(parts=parts, **change)  # type: ignore[arg-type]


def test_parts_that_cannot_be_composed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drafter\.parts=\['one'\]: name at least two"):
        Compose(parts={"one": NGram()})
    parts = {"one": NGram(), "two": Lookahead()}
    with pytest.raises(ValueError, match=r"drafter\.parts\.two: Lookahead needs trees of its own"):
        Compose(parts=parts)


def test_a_depth_that_contradicts_the_tree_is_refused() -> None:
    drafter = Compose(parts={"a": NGram(), "b": NGram()}, depth=2)
    with pytest.raises(ValueError, match=r"^drafter\.depth=2: tree\.widths"):
        drafter.check(Static(widths=[1, 1, 1]))


class Told(NGram):
    """Wants to know what became of its own trees."""

    def commit(self, context: StepContext, acceptance: Any, seen: Observation) -> None: ...


def test_parts_that_would_be_told_nothing_or_never_be_asked_are_refused() -> None:
    text, model = NGram(), SmallLlama(path="zoo:draft")
    rates = Synthetic()
    for part in (Told(), rates):
        with pytest.raises(ValueError, match=r"drafter\.parts\.two: .* needs trees of its own"):
            Compose(parts={"one": text, "two": part})
    with pytest.raises(ValueError, match=r"drafter\.parts\.one: a model is always sure"):
        Compose(parts={"one": model, "two": text})
    exits = {f"exit {n}": EarlyExit(exit_layer=n) for n in (1, 2)}
    with pytest.raises(ValueError, match=r"two draft in the same scratch"):
        Compose(parts=exits, mode="union")


class Plain(HostDrafter):
    """As in CONTRIBUTING: it knows of no matches."""

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        yield sequence.tokens[-4:][:levels], 1.0


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", ["union", "cascade", "bandit"])
def test_a_drafter_that_knows_of_no_matches_is_asked(target: PagedLM, mode: str) -> None:
    tree = Static(widths=[2, 1])
    parts: Any = {
        "plain": Plain(),
        "small_llama": SmallLlama(path="zoo:draft"),
    }
    drafter = Compose(parts=parts, mode=mode, costs=[1.0, 1.0] if mode == "bandit" else None)
    _, steps = decode(target, drafter, tree)
    assert sum(step.sources[0]["plain"][0] for step in steps) > 0


def test_a_part_goes_as_deep_as_it_may(target: PagedLM) -> None:
    tree = Dynamic(budget=16, depth=4)
    text = NGram(depth=2)
    model = SmallLlama(path="zoo:draft")
    drafter = Compose(parts={"a": text, "b": model}, depth=8)
    _, steps = decode(target, drafter, tree)
    assert (drafter.levels, text.levels, model.levels) == (8, 2, 8)
    assert max(depth for step in steps for depth in step.depths) == 8


class Knowing(HostDrafter):
    """Knows of a long match, and how so many tokens go on."""

    def __init__(self, count: int = 7) -> None:
        super().__init__()
        self.count = count

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        yield [*range(1, self.count + 1)][:levels], 1.0

    def match_length(self, sequence: Decoding) -> int:
        return 9


@pytest.mark.parametrize("budget", [7, 8])
@pytest.mark.parametrize("mode", ["union", "cascade", "bandit"])
def test_all_levels_that_were_found_are_drafted(mode: str, budget: int) -> None:
    """Also where the nodes found just fill a tree of one of the known sizes."""
    parts = {"seven": Knowing(7), "ngram": NGram()}
    costs = [1.0, 1e9] if mode == "bandit" else None
    drafter = spied(Compose, parts=parts, mode=mode, costs=costs)
    run(drafter, [[11, 12]], Chain(budget=budget), new=12)
    paths = [rows[0] for _, rows, _ in drafter.noted]
    assert paths[0][1:] == [1, 2, 3, 4, 5, 6, 7]
    if mode == "cascade":
        assert all(path[1:] == [1, 2, 3, 4, 5, 6, 7] for path in paths)


@pytest.mark.parametrize(
    ("tree", "known", "nodes"),
    [
        (Dynamic(budget=7, depth=8), 7, 8),
        (Dynamic(budget=40, depth=8), 7, 8),
        (Dynamic(budget=40, depth=12), 12, 16),
        (Static(widths=[2, 2, 2], children="sample_with_replacement"), 3, 15),
    ],
    ids=["a small budget", "few", "more", "drawn with replacement"],
)
def test_trees_have_few_nodes_where_little_was_found(
    tree: TreePolicy, known: int, nodes: int
) -> None:
    """Eight with the root for seven, which is also the largest tree of seven and a known size;
    also where nobody looks at what the device has found. Of what is drawn with replacement there
    may be more."""
    drafter = Compose(parts={"known": Knowing(known), "ngram": NGram()}, mode="cascade")
    sizes, draft = [], drafter.draft

    def noted(context: StepContext) -> TokenTree:
        tree = draft(replace(context, kernels=BLIND))
        sizes.append(tree.nodes)
        return tree

    drafter.draft = noted  # type: ignore[method-assign]
    run(drafter, [[11, 12]], tree, new=12)
    assert set(sizes) == {nodes}


def test_every_way_to_draft_is_warmed_up() -> None:
    drafter = Compose(parts={"known": Knowing(), "ngram": NGram()}, mode="cascade")
    loop, seen, look = decoder(drafter, Dynamic(budget=20, depth=8)), set(), drafter.look

    def noted(sequences: Any, wanted: Any = None) -> Any:
        seen.add(look(sequences, wanted))
        return look(sequences, wanted)

    drafter.look = noted  # type: ignore[method-assign]
    loop.warm_up([11, 12])
    assert seen == {((0, 1), 0), *(((part,), nodes) for part in (0, 1) for nodes in (0, 8, 16))}


def test_a_bandit_of_parts_that_have_found_nothing_drafts_nothing() -> None:
    drafter = Compose(parts={n: Scripted(matches=[0]) for n in ("a", "b")}, mode="bandit")
    assert run(drafter, [[11, 12]], Chain(budget=2), new=6) == [following(12, 6)]


def test_a_part_whose_model_is_missing_is_named(tmp_path: Path) -> None:
    parts = {"text": NGram(), "model": SmallLlama(path=str(tmp_path / "none"))}
    with pytest.raises(ValueError, match=r"drafter\.parts\.model\.path="):
        Compose(parts=parts).find()


class Choosy(HostDrafter):
    """Has room for so many sequences, and notes which it was told to forget."""

    def __init__(self, *, room: int) -> None:
        super().__init__()
        self.room = room
        self.finished: list[int] = []

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding]:
        return sequences[: self.room]

    def finish(self, sequence: Decoding) -> None:
        self.finished.append(sequence.request.id)

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        return []


def test_parts_that_have_taken_a_sequence_are_told_that_another_has_not() -> None:
    parts = {name: Choosy(room=room) for name, room in {"a": 9, "b": 3, "c": 1}.items()}
    sequences = [Decoding(request, request.id, [1]) for request in requests_of([[1]] * 4, 1)]
    assert Compose(parts={**parts}, mode="union").start(sequences) == sequences[:1]
    assert {name: sorted(part.finished) for name, part in parts.items()} == {
        "a": [1, 2, 3],
        "b": [1, 2],
        "c": [],
    }


@pytest.mark.some(1)
@pytest.mark.parametrize("parts", [("small_llama", "early_exit"), ("token_recycling", "ngram")])
def test_any_drafters_make_a_union(target: PagedLM, parts: tuple[str, str]) -> None:
    tree = Dynamic(budget=8)
    kinds: Any = {
        "small_llama": lambda: SmallLlama(path="zoo:draft"),
        "early_exit": EarlyExit,
        "token_recycling": TokenRecycling,
        "ngram": NGram,
    }
    drafter = Compose(parts={name: kinds[name]() for name in parts}, mode="union")
    outputs, steps = decode(target, drafter, tree, batch_size=2)
    assert bool(drafter.variants) == ("ngram" in parts)  # else nothing to look at
    plain, _ = decode(target, NoDrafter())
    assert outputs == plain
    credit = {name: sum(s[name][1] for step in steps for s in step.sources) for name in parts}
    assert all(credit.values())
