"""PagedLM: which models run over the paged cache and give the logits of their own attention, which
are refused, and what a user who names a wrong one is told."""

import copy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from specdec.cache import KVShape
from specdec.drafters.small_llama import SmallLlama
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from tests.decoding import loaded

VOCABULARY = 96
WINDOW = 12  # longer than the probe at load, shorter than the prompts below
PROMPT = 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of Triton kernels
FLOAT32_ROUNDING = 1e-5  # relative; a key too many or too few changes logits by more than 1e-2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": PROMPT,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def tiny(kind: str, **settings: Any) -> Any:
    """A random float32 model of a type; weights large enough for attention to matter."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                fan_in = 1 if "embed" in path else parameter.shape[-1]
                parameter.copy_(1.2 * noise / fan_in**0.5)
    return model.float().eval()


def own_attention(model: Any) -> Any:
    """A copy that keeps transformers' attention when the original is wrapped."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        inputs = torch.tensor([tokens], device=model.device)
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits[0]
    return logits.double()


def texts() -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(3, VOCABULARY, (2, PROMPT), generator=generator).tolist()
    return drawn[0], drawn[1]


def paged_and_own(
    lm: PagedLM, own: Any, kv_dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(ours, expected) logits: two branches of a tree beside a chain in another row, then what
    follows a commit. Prompts go in by chunks that do not fit the pages."""
    first, second = texts()
    size = {"rows": 2, "pages": 20, "page_size": 4, "max_tokens": PROMPT + 8}
    cache = lm.new_cache(**size, kv_dtype=kv_dtype)
    for row in (0, 1):
        cache.open(row, tokens=PROMPT + 8)
    lm.prefill(cache, [0, 1], [first[:13], second[:7]], chunk=5)

    branch = [4, 9, 17]  # leaves `first` after its 14th token
    branched = [*first[:14], *branch]
    tokens = [
        [first[13], branch[0], first[14], branch[1], first[15], first[16], branch[2], first[17]],
        second[7:15],
    ]
    parents = [[-1, 0, 0, 1, 2, 4, 3, 5], [-1, 0, 1, 2, 3, 4, 5, 6]]
    tree = reference.tree_structure(torch.tensor(parents, device=lm.device))
    nodes = torch.tensor(tokens, device=lm.device)
    out = lm.forward(cache, [0, 1], nodes, tree.depths, ancestors=tree.ancestors)
    assert out is not None
    paths = torch.tensor([[0, 2, 4, 5, 7], [0, 1, 2, 3, 4]], device=lm.device)
    cache.commit([0, 1], paths, torch.tensor([5, 5], device=lm.device))
    after = lm.extend(cache, [0, 1], [first[18:], second[12:18]])
    cache.check()
    whole, other = logits_of(own, first), logits_of(own, second)
    return [
        (out[0, [0, 2, 4, 5, 7]], whole[13:18]),
        (out[0, [1, 3, 6]], logits_of(own, branched)[14:17]),
        (out[1], other[7:15]),
        (after, torch.stack([whole[PROMPT - 1], other[17]])),
    ]


def error(ours: Tensor, expected: Tensor) -> float:
    """The worst token's, relative."""
    return float(((ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# --- accepted, and right

ACCEPTED: dict[str, dict[str, Any]] = {
    "afmoe": HEADS | MIXED | {"num_experts": 4, "num_experts_per_tok": 2},  # takes views
    "apertus": {},
    "cohere2": MIXED,
    "deepseek_v3": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "exaone4": HEADS | MIXED,
    "gemma3n_text": HEADS
    | MIXED
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    | {"laurel_rank": 4, "num_kv_shared_layers": 2},
    "gemma2": HEADS | MIXED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "glm4": HEADS,
    "gpt_neox": {},
    "gpt_oss": HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # views too
    "llama": {},
    "minicpm3": LATENT,
    "ministral": HEADS | MIXED,
    "modernbert-decoder": {
        "sliding_window": WINDOW,
        "local_attention": WINDOW,
        "global_attn_every_n_layers": 2,
    },  # its get_decoder() is a head
    "olmo3": MIXED,
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 24, "use_sliding_window": False},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_logits_are_those_of_the_model_s_own_attention(kind: str) -> None:
    model = tiny(kind, **ACCEPTED[kind])
    own = own_attention(model)
    for ours, expected in paged_and_own(PagedLM(model), own):
        assert error(ours, expected) < FLOAT32_ROUNDING


# What differs inside the kernels: keys longer than values, soft-capping, windows and sinks. The
# interpreter is too slow for all of them.
INTERPRETED = ("deepseek_v3", "gemma2", "gpt_oss")


@pytest.mark.parametrize("kind", ACCEPTED if DEVICE.type == "cuda" else INTERPRETED)
def test_triton_gives_the_logits_of_the_model_s_own_attention(kind: str) -> None:
    model = tiny(kind, **ACCEPTED[kind]).to(DEVICE)
    own = own_attention(model)
    lm = PagedLM(model, kernels=Kernels(impl="triton"))
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    "kv_dtype", [pytest.param(torch.float8_e4m3fn, marks=pytest.mark.slow), torch.int8], ids=str
)
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


VERSIONED = ("gptj",)  # refused or right, as the release of transformers has it


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_computed_wrongly_are_refused(case: str) -> None:
    kind, settings, reason = REFUSED[case]
    model = tiny(kind, **settings)
    own = own_attention(model) if case in VERSIONED else None
    try:
        lm = PagedLM(model, name="target.path=somewhere")
    except ValueError as refusal:
        message = str(refusal)
    else:
        assert own is not None, "was not refused"
        for ours, expected in paged_and_own(lm, own):
            assert error(ours, expected) < FLOAT32_ROUNDING
        return
    assert "cannot run over the paged cache" in message
    assert message.startswith(f"target.path=somewhere: {type(model).__name__} cannot run")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "settings", "architecture", "reason"),
    [
        ("t5", {"d_kv": 8}, "T5ForConditionalGeneration", "it is an encoder-decoder model"),
        ("bloom", {}, "BloomForCausalLM", "it biases attention by distance (ALiBi)"),
        ("mamba2", {"num_heads": 8, "head_dim": 8}, "Mamba2ForCausalLM", "linear_attention"),
        ("llama4_text", {}, "Llama4ForCausalLM", "layers of type chunked_attention"),
    ],
)
def test_what_the_configuration_tells_is_refused_before_weights_are_read(
    kind: str, settings: dict[str, Any], architecture: str, reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **SIZES | settings)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)  # and no weights
    message = refusal_of(str(tmp_path))
    assert message.startswith(f"drafter.path={tmp_path}: {architecture} cannot run")
    assert reason in message


# --- paths


def load(path: str) -> PagedLM:
    return load_model(path, setting="drafter.path")


def refusal_of(path: str) -> str:
    """What a user is told: one line that begins with the setting."""
    with pytest.raises(ValueError, match=r"drafter\.path=") as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"drafter.path={path}: ")
    assert "\n" not in message
    return message


def save(model: Any, folder: Path, *, word: str = "w") -> Path:
    """A model folder with a tokenizer of as many words as the model has tokens."""
    words = {f"{word}{i}": i for i in range(model.get_input_embeddings().weight.shape[0])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=f"{word}0")), unk_token=f"{word}0"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_zoo_name_and_its_folder_are_the_same_model() -> None:
    by_name, by_folder = load("zoo:draft"), load(str(zoo_path("draft")))
    assert by_name.config.hidden_size == 192
    assert by_name.dtype == torch.float32
    assert by_name.vocab_size == len(by_name.tokenizer) == 8192
    mine, theirs = by_name.model.state_dict(), by_folder.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)


def test_saved_folder_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny("llama")
    own = own_attention(model)
    lm = load(str(save(model, tmp_path)))
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal_of(str(tmp_path / "nowhere"))
    assert "no such folder" in refusal_of("./nowhere")


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "cannot be loaded as a causal LM" in refusal_of(str(tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    assert "cannot be loaded as a causal LM" in refusal_of(str(tmp_path))


def test_unknown_built_in_name() -> None:
    message = refusal_of("zoo:targets")
    assert "draft" in message
    assert "target" in message


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in refusal_of("nobody-at-all/no-such-model")


# --- vocabularies


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        "target": save(tiny("llama"), root / "target"),
        "same": save(tiny("llama", num_hidden_layers=1), root / "same"),
        "smaller": save(tiny("llama", vocab_size=VOCABULARY - 6), root / "smaller"),
        "other words": save(tiny("llama"), root / "other", word="v"),
    }


@pytest.mark.parametrize(
    ("draft", "detail"),
    [("smaller", "90 and 96 tokens, 6 entries differ"), ("other words", "192 entries differ")],
)
def test_draft_of_another_vocabulary_is_refused(
    folders: dict[str, Path], draft: str, detail: str
) -> None:
    target = load(str(folders["target"]))
    with pytest.raises(ValueError, match="its vocabulary is not the target's") as refusal:
        loaded(SmallLlama(path=str(folders[draft])), target)
    message = str(refusal.value)
    assert message.startswith(f"drafter.path={folders[draft]}: ")
    assert detail in message
    assert "\n" not in message


def test_draft_of_the_same_vocabulary_is_taken(folders: dict[str, Path]) -> None:
    target = load(str(folders["target"]))
    drafter = loaded(SmallLlama(path=str(folders["same"])), target)
    assert drafter.lm.kv_shape.layers == 1


def test_sizes_are_compared_where_a_tokenizer_is_missing(folders: dict[str, Path]) -> None:
    target = PagedLM(tiny("llama"))
    loaded(SmallLlama(path=str(folders["other words"])), target)
    with pytest.raises(ValueError, match="90 and 96 tokens"):
        loaded(SmallLlama(path=str(folders["smaller"])), target)


# --- low precision


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
