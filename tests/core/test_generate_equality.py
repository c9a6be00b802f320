"""Losslessness, end to end: at temperature 0 in float32 every drafter and tree gives the tokens of
transformers' own `generate`; here of the built-in pair and of a published model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.drafters.none import NoDrafter
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from tests.core.generated import (
    DEVICE,
    LONG,
    PLANS,
    TREES,
    ZOO_NEW,
    Pair,
    decode,
    drafter_of,
    generate,
)
from tests.models.tiny import disturbed

pytestmark = pytest.mark.usefixtures("load_once")

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


@pytest.mark.some(1)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_zoo_equals_generate(zoo: Pair, drafter: str, tree: str, batch_size: int) -> None:
    build_drafter, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    run = decode(zoo.target, build_drafter, shape, zoo.prompts, ZOO_NEW, batch_size=batch_size)
    assert run.outputs == zoo.outputs
    assert {sequence.finish_reason for sequence in run.sequences} == {"length"}
    accepted = sum(sum(step.accepted) for step in run.steps)
    assert (accepted > 0) == (drafter != "none")
    tokens = sum(sum(step.tokens) for step in run.steps)
    assert tokens == len(zoo.prompts) * ZOO_NEW


@pytest.mark.some(2)
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_zoo_stops_where_generate_stops(zoo: Pair, drafter: str, tree: str) -> None:
    assert zoo.stopped != zoo.outputs
    drafting, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    run = decode(zoo.target, drafting, shape, zoo.prompts, ZOO_NEW, batch_size=4, stop=[zoo.stop])
    assert run.outputs == zoo.stopped
    for sequence in run.sequences:
        assert (sequence.output_ids[-1] == zoo.stop) == (sequence.finish_reason == "stop")


# --- quantised caches


@pytest.fixture(scope="module", params=[torch.float8_e4m3fn, torch.int8], ids=str)
def quantised(request: pytest.FixtureRequest, zoo: Pair) -> tuple[torch.dtype, list[list[int]]]:
    """A type of pages, and the outputs of plain decoding over them."""
    run = decode(zoo.target, NoDrafter(), None, zoo.prompts[:2], LONG, kv_dtype=request.param)
    return request.param, run.outputs


@pytest.mark.some(1)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", ["chain", "dynamic"])
@pytest.mark.parametrize("drafter", ["small_llama", "ngram"])
def test_a_quantised_cache_gives_the_same_with_and_without_drafts(
    zoo: Pair,
    quantised: tuple[torch.dtype, list[list[int]]],
    drafter: str,
    tree: str,
    batch_size: int,
) -> None:
    kv_dtype, expected = quantised
    drafting, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    prompts = zoo.prompts[:2]
    run = decode(
        zoo.target, drafting, shape, prompts, LONG, batch_size=batch_size, kv_dtype=kv_dtype
    )
    assert run.outputs == expected
    assert sum(sum(step.accepted) for step in run.steps) > LONG


# --- a published model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.mark.some(2)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_published_story(
    stories: tuple[PagedLM, Path, list[int]], drafter: str, tree: str, batch_size: int
) -> None:
    target, draft, expected = stories
    drafting, shape = drafter_of(drafter, draft), TREES[tree]("top_k")
    run = decode(target, drafting, shape, [[1]] * batch_size, len(expected), batch_size=batch_size)
    assert run.outputs == [expected] * batch_size
    text = target.tokenizer.decode([1, *expected], skip_special_tokens=True)
    assert text.strip() == STORY


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[PagedLM, Path, list[int]]:
    if not STORIES.is_dir():
        pytest.skip("stories260k is not there")
    target = load_model(str(STORIES), Placement(device=DEVICE))
    draft = tmp_path_factory.mktemp("tiny")
    disturbed(target.model, 0.3).save_pretrained(draft)
    target.tokenizer.save_pretrained(draft)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).to(DEVICE)
    expected = generate(model, [1], 61)
    return target, draft, expected
