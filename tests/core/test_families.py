"""As `test_generate_equality.py`, for one small random model of each family of architectures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.models.load import load_model
from specdec.models.placement import Placement
from tests.core.generated import (
    DEPTH,
    DEVICE,
    PLANS,
    TREES,
    Pair,
    decode,
    drafter_of,
    family_prompts,
    generate,
    middle_token,
)
from tests.models.tiny import HEADS, disturbed, save, tiny

pytestmark = pytest.mark.usefixtures("load_once")

NEW = 8
WINDOW = 6

SHALLOW = {"num_hidden_layers": 2, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS,
    "gemma2": HEADS
    | MIXED
    | {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": HEADS | MIXED | {"query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
    },
    "gpt_oss": HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Family(Pair):
    name: str
    itself: Path  # the target's own folder, the draft that is always right


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = tiny(request.param, **SHALLOW | FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    itself = save(model, folder / "itself")
    draft = save(disturbed(model, 0.3), folder / "draft")
    reference = AutoModelForCausalLM.from_pretrained(
        itself, dtype=torch.float32, attn_implementation="eager"
    ).to(DEVICE)
    prompts = family_prompts()
    outputs = [generate(reference, prompt, NEW) for prompt in prompts]
    stop = middle_token(outputs)
    stopped = [generate(reference, prompt, NEW, [stop]) for prompt in prompts]
    target = load_model(str(itself), Placement(device=DEVICE))
    return Family(target, draft, prompts, outputs, stop, stopped, request.param, itself)


@pytest.mark.some(6)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_family_equals_generate(family: Family, drafter: str, tree: str, batch_size: int) -> None:
    drafting, shape = drafter_of(drafter, family.draft), TREES[tree]("top_k")
    run = decode(family.target, drafting, shape, family.prompts, NEW, batch_size=batch_size)
    assert run.outputs == family.outputs
    if batch_size > 1 and tree == "dynamic":  # rows end apart
        run = decode(
            family.target,
            drafting,
            shape,
            family.prompts,
            NEW,
            batch_size=batch_size,
            stop=[family.stop],
        )
        assert run.outputs == family.stopped


@pytest.mark.some(5)
def test_disturbed_draft_is_accepted_in_part(family: Family) -> None:
    """Else the cases above would exercise one branch of the loop only."""
    drafter, shape = drafter_of("small_llama", family.draft), TREES["chain"]("top_k")
    run = decode(family.target, drafter, shape, family.prompts, NEW, batch_size=4)
    accepted = {count for step in run.steps for count in step.accepted}
    assert len(accepted) > 1


@pytest.mark.some(5)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_drafts_for_itself_is_always_right(family: Family, batch_size: int) -> None:
    drafter, shape = drafter_of("small_llama", family.itself), TREES["chain"]("top_k")
    whole_steps = 3 * (DEPTH + 1)
    run = decode(family.target, drafter, shape, family.prompts, whole_steps, batch_size=batch_size)
    assert [output[:NEW] for output in run.outputs] == family.outputs
    assert [sequence.steps for sequence in run.sequences] == [3] * len(family.prompts)
    assert {count for step in run.steps for count in step.tokens} == {DEPTH + 1}
