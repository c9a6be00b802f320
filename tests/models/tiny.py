"""Small random models of any architecture, and what tests ask of them."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specdec.kernels import reference
from specdec.models.paged import PagedLM

VOCABULARY = 96
PROMPT = 24
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


WINDOW = 12  # longer than the probe at load, shorter than the prompts below
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


def disturbed(model: Any, amount: float) -> Any:
    """A copy that agrees with the original now and then."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.abs().mean() * noise.to(parameter))
    return other


def save(model: Any, folder: Path, *, word: str = "w") -> Path:
    """A model folder with a tokenizer of as many words as the model has tokens."""
    words = {f"{word}{i}": i for i in range(model.get_input_embeddings().weight.shape[0])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=f"{word}0")), unk_token=f"{word}0"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
