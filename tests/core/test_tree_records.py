"""Recorded trees: probabilities are those of transformers' own passes of both models, and the
paths are what the texts consist of."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from specdec.decode import Decoder
from specdec.drafters.ngram import NGram
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.flight import Step
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.processors import Processors
from specdec.request import Decoding
from specdec.sampling import SamplingParams
from specdec.tree_records import TreeRecord
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.core.generated import DEVICE
from tests.decoding import decoder_of, requests_of

TEXTS = ("def fibonacci(n):\n    ", "It was a dark night", "<|user|>\nName three colours.\n")
NEW, TREES, CANDIDATES = 7, 2, 8
Law = Callable[[tuple[int, ...]], Tensor]
# On a GPU through Triton, CUDA graphs and steps in flight, which there are not in float64.
DTYPE, ERROR = (torch.float32, 2e-3) if DEVICE.type == "cuda" else (torch.float64, 2e-5)


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target", Placement(device=DEVICE, dtype=DTYPE))


@pytest.fixture(scope="module")
def logits() -> dict[str, Law]:
    """Of both models after some tokens, by transformers: [1, V]."""

    def law(name: str) -> Law:
        model = AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=torch.float64)
        model.to(DEVICE)

        @cache
        @torch.inference_mode()
        def after(tokens: tuple[int, ...]) -> Tensor:
            found: Tensor = model(torch.tensor([tokens], device=DEVICE)).logits[:, -1]
            return found

        return after

    return {name: law(name) for name in ("target", "draft")}


def prompts_of(target: PagedLM) -> list[list[int]]:
    return [target.tokenizer(text).input_ids for text in TEXTS]


def decoded(
    decoder: Decoder, prompts: Sequence[Sequence[int]]
) -> tuple[list[Decoding], list[TreeRecord]]:
    """With the first prompt once more, so that a row is refilled."""
    steps: list[Step] = []
    requests = requests_of([*prompts, prompts[0]], NEW)
    done = sorted(decoder.run(requests, on_step=steps.append), key=lambda s: s.request.id)
    if DEVICE.type == "cuda":
        assert decoder.graphs.counts["verify"]["replayed"] > 0
    return done, [tree for step in steps for tree in step.trees]


def contexts(tree: TreeRecord, sequence: Decoding) -> list[tuple[int, ...]]:
    """What each node comes after: the text so far, which ends with the root, and its ancestors."""
    begun = len(sequence.request.prompt_ids) + sum(sequence.accepted_lengths[: tree.step])
    text, ways = tuple(sequence.tokens[:begun]), list[tuple[int, ...]]()
    assert text[-1] == tree.tokens[0]
    for parent in tree.parents:
        ways.append(text if parent < 1 else (*ways[parent], tree.tokens[parent]))
    return ways


def close(found: Sequence[float | None], expected: Sequence[float]) -> None:
    assert found == pytest.approx(expected, rel=ERROR, abs=ERROR * 1e-6)


@pytest.mark.some(2)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_are_those_of_the_models(
    target: PagedLM, logits: dict[str, Law], rows: int, temperature: float
) -> None:
    """The draft's at temperature 1 are those that children are drawn from: of the most probable
    tokens, renormalised; at 0 its own."""
    drafter = SmallLlama(path=str(zoo_path("draft")), candidates=CANDIDATES)
    children: Any = "sample" if temperature else "top_k"
    decoder = decoder_of(
        target,
        drafter,
        Static(widths=[2, 1], children=children),
        RecursiveRejection() if temperature else None,
        temperature=temperature,
        rows=rows,
        trees=TREES,
    )
    done, trees = decoded(decoder, prompts_of(target))
    assert {len(tree.tokens) for tree in trees} == {5}
    for tree in trees:
        ways = contexts(tree, done[tree.request])
        assert tree.target[0] is tree.draft[0] is None
        theirs, ours = [], []
        for way, token in list(zip(ways, tree.tokens, strict=True))[1:]:
            theirs.append(logits["target"](way).softmax(-1)[0, token].item())
            law = logits["draft"](way).softmax(-1)[0]
            cut = law.topk(CANDIDATES).values.sum() if temperature else 1.0
            ours.append((law[token] / cut).item())
        close(tree.target[1:], theirs)
        close(tree.draft[1:], ours)


def test_the_target_is_as_the_rule_sees_it(target: PagedLM, logits: dict[str, Law]) -> None:
    """After a repetition penalty over the path, temperature and top-k, as `generate` has them."""
    steps = (
        RepetitionPenaltyLogitsProcessor(1.7),
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(4),
    )
    decoder = decoder_of(
        target,
        SmallLlama(path=str(zoo_path("draft"))),
        Dynamic(budget=5, width=3, depth=3),
        sampling=SamplingParams(temperature=0.8, top_k=4, seed=3),
        processors=Processors(vocab=target.vocab_size, repetition_penalty=1.7),
        trees=2,
    )
    done, trees = decoded(decoder, prompts_of(target)[:1])
    cut = 0
    for tree in trees:
        expected = []
        for way, token in zip(contexts(tree, done[tree.request]), tree.tokens, strict=True):
            scores = logits["target"](way)
            for step in steps:
                scores = step(torch.tensor([way], device=DEVICE), scores)
            expected.append(scores.softmax(-1)[0, token].item())
        close(tree.target[1:], expected[1:])
        cut += expected[1:].count(0.0)
    assert cut, "no node was cut by top-k"


@pytest.mark.some(1)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_consist_of_the_recorded_paths(
    target: PagedLM, rows: int, temperature: float
) -> None:
    """Of the first steps of each text there is every tree, in order, once."""
    decoder = decoder_of(
        target,
        SmallLlama(path=str(zoo_path("draft"))),
        Dynamic(budget=8, width=3, depth=4),
        temperature=temperature,
        rows=rows,
        trees=TREES,
    )
    done, trees = decoded(decoder, prompts_of(target))
    for sequence in done:
        mine = [tree for tree in trees if tree.request == sequence.request.id]
        assert [tree.step for tree in mine] == list(range(min(TREES, sequence.steps)))
        said: list[int] = []
        for tree in mine:
            assert [tree.parents[node] for node in tree.path] == [-1, *tree.path[:-1]]
            said += [*(tree.tokens[node] for node in tree.path[1:]), tree.next_token]
        kept = sum(sequence.accepted_lengths[:TREES])
        assert said[:kept] == sequence.output_ids[:kept]
        assert len(said) == kept or sequence.steps <= TREES


def test_probabilities_that_a_drafter_does_not_have_are_none(target: PagedLM) -> None:
    decoder = decoder_of(target, NGram(), Chain(budget=3), rows=2, trees=NEW)
    _, trees = decoded(decoder, [[5, 6, 7, 8, 5, 6], [9, 3, 9, 3, 9]])
    drafted = [tree for tree in trees if len(tree.tokens) > 1]
    assert drafted
    for tree in drafted:
        given = tree.draft[1:]
        assert all(one is None or one == 1.0 for one in given)
        assert all(0.0 < one < 1.0 for one in tree.target[1:] if one is not None)


def test_nothing_is_recorded_unless_asked_for(
    target: PagedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.decode.figures_of", None)  # would be called in vain
    decoder = decoder_of(target, NGram(), Chain(budget=3), rows=2)
    assert decoded(decoder, [[5, 6, 7, 8, 5, 6]])[1] == []
