"""What is found out at load: the shapes of keys and values, and which models are refused because
they would be computed wrongly."""

from typing import Any

import pytest
import torch

from specdec.cache import KVShape
from specdec.models.paged import PagedLM
from specdec.models.probe import PROBE_TOKENS
from tests.models.tiny import (
    ACCEPTED,
    FLOAT32_ROUNDING,
    HEADS,
    PROMPT,
    WINDOW,
    error,
    own_attention,
    paged_and_own,
    tiny,
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", KVShape(layers=4, kv_heads=2, key_dim=8, value_dim=8)),
        ("gpt_neox", KVShape(layers=4, kv_heads=4, key_dim=8, value_dim=8)),
        ("deepseek_v3", KVShape(layers=4, kv_heads=4, key_dim=24, value_dim=12)),
    ],
)
def test_shape_of_keys_and_values(kind: str, expected: KVShape) -> None:
    lm = PagedLM(tiny(kind, **ACCEPTED[kind]))
    assert lm.kv_shape == expected
    cache = lm.new_cache(rows=1, pages=3, page_size=4, max_tokens=12)
    assert cache.keys.shape == (4, 3, expected.kv_heads, 4, expected.key_dim)
    assert cache.values.shape == (4, 3, expected.kv_heads, 4, expected.value_dim)


def test_wrapping_leaves_the_weights_alone() -> None:
    model = tiny("gpt_oss", **ACCEPTED["gpt_oss"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PagedLM(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- refused

MASKED = "its layers do not hand their sliding window on"
ABSOLUTE = "its positions are absolute"
NO_KEYWORD = "its layers do not hand keywords on to the attention function"
UNREACHED = "of its 4 layers use the registered attention"

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", {"is_decoder": True}, ABSOLUTE),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "it biases attention by distance (ALiBi)"),
    "diffllama": ("diffllama", {}, "a layer attends more than once"),
    "doge": ("doge", {}, "it masks attention by itself"),
    "falcon_alibi": ("falcon", {"alibi": True}, "it biases attention by distance (ALiBi)"),
    "falcon": ("falcon", {"alibi": False}, UNREACHED),
    "gpt2": ("gpt2", {}, ABSOLUTE),
    "gptj": ("gptj", {"rotary_dim": 4}, UNREACHED),
    "jamba": (
        "jamba",
        {"mamba_d_state": 4, "num_experts": 2, "use_mamba_kernels": False},
        "layers of type linear_attention have no paged keys and values",
    ),
    "llama4_text": (
        "llama4_text",
        HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2},
        "layers of type chunked_attention have no paged keys and values",
    ),
    "mpt": ("mpt", {"n_layers": 2, "n_heads": 4}, "it biases attention by distance (ALiBi)"),
    "opt": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        ABSOLUTE,
    ),
    "phimoe": ("phimoe", {"sliding_window": WINDOW, "num_local_experts": 4}, MASKED),
    "qwen2_moe": (
        "qwen2_moe",
        ACCEPTED["qwen2_moe"]
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        MASKED,
    ),
    "stablelm": ("stablelm", {}, NO_KEYWORD),
}


REASONS = {reason for _, _, reason in REFUSED.values()}


@pytest.mark.parametrize("window", [128, 129, 10**12])
@pytest.mark.parametrize("kind", ["llama", "phimoe", "mistral", "gemma2", "qwen2"])
def test_a_window_as_long_as_the_context_hides_nothing(kind: str, window: int) -> None:
    """Even one that the layers keep to themselves; `tiny` models have 128 positions."""
    settings: dict[str, Any] = {"sliding_window": window}
    if kind in ACCEPTED:
        settings = ACCEPTED[kind] | settings
    model = tiny(kind, **settings)
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize("window", [1, 2, PROBE_TOKENS, PROMPT - 1, PROMPT])
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_windows_of_any_size_hide_what_they_do_in_transformers(kind: str, window: int) -> None:
    model = tiny(kind, sliding_window=window, use_sliding_window=True, max_window_layers=1)
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize("case", REFUSED)
def test_models_are_refused_or_right(case: str) -> None:
    """Which of the two, and for which reason, is a matter of the release of transformers."""
    kind, settings, _ = REFUSED[case]
    model = tiny(kind, **settings)
    try:
        lm = PagedLM(model, name="target.path=somewhere")
    except ValueError as refusal:
        message = str(refusal)
    else:
        for ours, expected in paged_and_own(lm, own_attention(tiny(kind, **settings))):
            assert error(ours, expected) < FLOAT32_ROUNDING
        return
    assert message.startswith(f"target.path=somewhere: {type(model).__name__} cannot run")
    assert any(reason in message for reason in REASONS)
    assert "\n" not in message


# --- what says nothing of attention, and logits that are none


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2"])
@pytest.mark.parametrize("zero", [[0], [0, 7, 14, 21, 28, 35, 42, 49], list(range(90))])
def test_rows_of_zeros_in_the_embedding(kind: str, zero: list[int]) -> None:
    """As of padding tokens."""
    model = tiny(kind, **HEADS)
    with torch.no_grad():
        model.get_input_embeddings().weight[zero] = 0.0
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert float((ours - expected).norm()) < 1e-5 * float(expected.norm().clamp(min=1.0))


def test_embedding_of_zeros_alone() -> None:
    model = tiny("llama")
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="its embeddings are all zero"):
        PagedLM(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_that_are_not_finite(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    limit = torch.finfo(dtype).max
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(0.9 * limit)
    with pytest.raises(ValueError, match="NaN or infinite logits in float") as refusal:
        PagedLM(model, name="drafter.path=somewhere")
    message = str(refusal.value)
    assert message.startswith("drafter.path=somewhere: ")
    assert "\n" not in message


def test_tokens_may_have_minus_infinity() -> None:
    """A model that never says some of them."""
    model = tiny("phi")  # its head has a bias
    with torch.no_grad():
        model.lm_head.bias[3:9] = float("-inf")
    PagedLM(model)


def test_a_process_that_rounds_products_loads_models_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As training does on a GPU, where TensorFloat32 is off by more than the probe allows."""
    seen = []
    model = tiny("llama")
    forward = type(model).forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", noting)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        PagedLM(model)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
