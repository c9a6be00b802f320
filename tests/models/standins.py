"""Stand-ins that tests make of the built-in models."""

from typing import Any

import torch

from specdec.models.load import zoo_path
from specdec.models.standin import Shape, standin

# Of zoo:target, which has 6 layers and 4 query heads on 1 key-value head.
BASE = Shape(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=9001,
)


def build(shape: str | Shape, name: str = "target", **options: Any) -> Any:
    settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, **options}
    return standin(zoo_path(name), shape, **settings)
