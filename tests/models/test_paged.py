"""PagedLM: models that run over the paged cache give the logits of their own attention, whatever
the precision and the positions."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.kernels.choose import Kernels
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from tests.models.tiny import (
    ACCEPTED,
    FLOAT32_ROUNDING,
    PROMPT,
    error,
    logits_of,
    own_attention,
    paged_and_own,
    texts,
    tiny,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of Triton kernels
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": PROMPT,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_logits_are_those_of_the_model_s_own_attention(kind: str) -> None:
    model = tiny(kind, **ACCEPTED[kind])
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "jetmoe", "qwen2_moe"])
def test_mixtures_of_experts_run_in_float64(kind: str) -> None:
    model = tiny(kind, **ACCEPTED[kind])
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model.double()), own):
        assert ours.dtype == torch.float64
        assert error(ours, expected) < FLOAT32_ROUNDING


# What differs inside the kernels: keys longer than values, soft-capping, windows and sinks. The
# interpreter is too slow for all of them.
INTERPRETED = ("deepseek_v3", "gemma2", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCEPTED if DEVICE.type == "cuda" else INTERPRETED)
def test_triton_gives_the_logits_of_the_model_s_own_attention(kind: str) -> None:
    model = tiny(kind, **ACCEPTED[kind]).to(DEVICE)
    own = own_attention(model)
    lm = PagedLM(model, kernels=Kernels(impl="triton"))
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_triton_reads_quantised_pages_as_well_as_the_reference(kv_dtype: torch.dtype) -> None:
    model = tiny("llama").to(DEVICE)
    own = own_attention(model)
    errors = {}
    for impl in ("reference", "triton"):
        lm = PagedLM(model, kernels=Kernels(impl=impl))
        errors[impl] = [error(*pair) for pair in paged_and_own(lm, own, kv_dtype)]
    for ours, theirs in zip(errors["triton"], errors["reference"], strict=True):
        assert FLOAT32_ROUNDING < ours <= 2 * theirs


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "dynamic", "longrope"])
def test_scaled_positions_are_those_of_the_model(kind: str) -> None:
    original = {"original_max_position_embeddings": 8}
    extra: dict[str, dict[str, Any]] = {
        "yarn": original,
        "llama3": original | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": LONGROPE,
    }
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | extra.get(kind, {})
    model = tiny("llama", rope_parameters=rope)
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": PROMPT}),
        # Its angles grow with the longest position of a pass, so one past the end would turn all.
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                "max_position_embeddings": PROMPT,
            },
        ),
    ],
)
def test_draft_nodes_past_the_context_disturb_nothing(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, **{"sliding_window": None} | settings)
    own = own_attention(model)
    lm = PagedLM(model)
    assert lm.max_context == PROMPT
    first, _ = texts()
    cache = lm.new_cache(rows=1, pages=6, page_size=4, max_tokens=PROMPT)
    cache.open(0, tokens=PROMPT)
    lm.prefill(cache, [0], [first[:22]])
    chain = torch.arange(6)[None]  # positions 22 .. 27, of which 22 and 23 exist
    out = lm.forward(cache, [0], torch.tensor([[*first[22:], 5, 6, 7, 8]]), chain)
    assert out is not None
    assert error(out[0, :2], logits_of(own, first)[22:]) < FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_model_s_own(dtype: torch.dtype) -> None:
    lm = load_model("zoo:target", Placement(dtype=dtype))
    own = AutoModelForCausalLM.from_pretrained(
        zoo_path("target"), dtype=dtype, attn_implementation="eager"
    )
    exact = copy.deepcopy(own).double()
    assert lm.dtype == dtype
    assert lm.new_cache(rows=1, pages=1, page_size=4, max_tokens=4).keys.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("target"))
    prompt = tokenizer("def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n").input_ids
    cache = lm.new_cache(rows=1, pages=len(prompt), page_size=4, max_tokens=2 * len(prompt))
    cache.open(0, tokens=len(prompt))
    half = len(prompt) // 2
    lm.prefill(cache, [0], [prompt[:half]], chunk=5)
    rest = torch.tensor([prompt[half:]])
    ours = lm.forward(cache, [0], rest, torch.arange(rest.shape[1])[None])
    assert ours is not None
    assert ours.dtype == dtype
    assert ours.isfinite().all()
    truth = logits_of(exact, prompt)[half:]
    theirs = logits_of(own, prompt)[half:]
    assert (ours[0].double() - truth).norm() <= 2 * (theirs - truth).norm()
