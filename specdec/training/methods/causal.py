"""What training of whole language models has in common: their weights in float32 beside those of
the loaded model, and how they are written."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from specdec.models.paged import PagedLM
from specdec.observation import Tap


def trained_copy(lm: PagedLM, *, fresh: int | None = None) -> Any:
    """A model of its own in float32, with attention of transformers' own.

    Args:
        fresh: seed of random weights; None for those of `lm`.

    Raises:
        ValueError: its weights are quantised.
    """
    if fresh is None and lm.quantised is not None:
        raise ValueError(
            f"{lm.name}: its weights are quantised by {lm.quantised}, and this method trains "
            f"them; take plain ones, with quantize=none"
        )
    config = deepcopy(lm.model.config)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fresh or 0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if fresh is None:
        model.load_state_dict({k: v.float() for k, v in lm.model.state_dict().items()})
    return model.float().to(lm.device)


class CausalTrainee:
    """A whole language model on its way.

    Args:
        model: as of `trained_copy`.
        tokenizer: is written beside it.
    """

    taps: tuple[Tap, ...] = ()

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.module, self.tokenizer = model, tokenizer

    @property
    def head(self) -> nn.Module:
        """Its output head."""
        head: nn.Module = self.module.get_output_embeddings()
        return head

    def matrices(self) -> list[nn.Parameter]:
        """Those inside: neither embedding nor output head."""
        outer = [self.module.get_input_embeddings().weight, self.head.weight]
        inside = [
            one for one in self.module.parameters() if not any(one is other for other in outer)
        ]
        return [one for one in inside if one.ndim == 2]

    def save(self, folder: Path, target_name: str) -> None:
        """Write model and tokenizer as transformers does, in bfloat16.

        Raises:
            ValueError: the folder cannot be written to.
        """
        copy = deepcopy(self.module).to(torch.bfloat16)
        try:
            copy.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            path = folder / "config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written, {error.strerror or error}") from error


def check_output(config: Any, setting: str) -> None:
    """Raise ValueError for models that do more than multiply at the end."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(config.get_text_config(), name, None)
        if value not in (None, 1, 1.0):
            raise ValueError(
                f"{setting}: its logits are changed by {name}={value}, which training does not "
                f"do; take another model"
            )
