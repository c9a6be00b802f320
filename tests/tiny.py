"""The smallest model there is to decode with."""

import torch
import transformers

PROMPT = [3, 1, 4, 1, 5]
MODEL_VOCAB = 8


def tiny_llama(seed: int, layers: int, vocab: int = MODEL_VOCAB) -> transformers.LlamaForCausalLM:
    """Random, with distributions far from uniform."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.45,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).float().eval()
