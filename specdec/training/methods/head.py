"""What training of all heads has in common: sizes, vocabulary, and where weights begin,
fresh or as those of a head that is there."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from specdec.heads.formats import find_head, load_head
from specdec.models.paged import PagedLM
from specdec.models.quantised import output_of
from specdec.training.teacher import norm_weight
from specdec.training.trainee import Surroundings, TrainingMethod

# Of a head's configuration what need not be as the settings say, and how they name the rest.
FREE = ("layer", "mask", "target_vocab", "output_bias")
OF_LAYERS = ("num_hidden_layers", "rope_parameters")
SETTINGS = {
    "vocab_size": "draft_vocab",
    "windows": "window",
    "num_hidden_layers": "layers",
    "rope_parameters": "rope_theta",
}


STD = 0.02  # of fresh matrices


def layer_config(config: Any, *, layers: int, rope_theta: float, make: Any = LlamaConfig) -> Any:
    """Decoder layers of the sizes of a target's.

    Args:
        config: of the target.
        make: configuration of a type in `heads.layered.LAYERS`.
    """
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    return make(
        vocab_size=text.vocab_size,
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def frequent(counts: Tensor, size: int) -> Tensor:
    """The ids of the most frequent tokens, ascending; of equally frequent ones the lowest."""
    order = torch.argsort(counts, descending=True, stable=True)
    return order[:size].sort().values


@torch.no_grad()
def begin(head: Any, surroundings: Surroundings) -> None:
    """Fresh weights: what leads back into the residual stream is small; output head and final norm
    begin as the target's. (The embedding becomes the target's own, which is not trained.)"""
    target = surroundings.target
    generator = torch.Generator().manual_seed(surroundings.seed)
    for name, parameter in head.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = STD / math.sqrt(2 * len(head.layers)) if last else STD
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    rows = output_of(target.model).float().cpu()
    head.lm_head.weight.copy_(rows if head.names is None else rows[head.names])
    norm: Any = getattr(head, "norm", None)
    weight = norm_weight(target.model)
    if norm is not None and weight is not None:
        norm.weight.copy_(weight.cpu())


@dataclass(frozen=True, kw_only=True)
class HeadMethod(TrainingMethod):
    """Trains a head.

    Args:
        path: folder, hub id or zoo:NAME of a head to begin with, of the shape that the other
            settings say; None: fresh weights.

    Raises:
        ValueError: no such head.
    """

    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            find_head(self.path, "method.path")

    def config(self, target: PagedLM) -> Any:
        """Of its heads; a mask token is another one if texts say so."""
        raise NotImplementedError

    def fresh(self, surroundings: Surroundings) -> Any:
        """A head with fresh weights."""
        raise NotImplementedError

    def head(self, surroundings: Surroundings) -> Any:
        """What the training begins with."""
        if self.path is None:
            return self.fresh(surroundings)
        found = self._given(self.path, surroundings.target)
        for parameter in found.parameters():  # those that it was lent must stay as they are
            parameter.data = parameter.float().clone()
        return found.float().train().requires_grad_(True)

    def check(self, target: PagedLM) -> None:
        if self.path is not None:
            self._given(self.path, target)

    def _given(self, path: str, target: PagedLM) -> Any:
        """The head there.

        Raises:
            ValueError: it is none for the target, or of another shape.
        """
        found: Any = load_head(path, target, kinds=[self.drafter], setting="method.path")
        for name, ours, theirs in _pairs(self.config(target), found):
            if ours != theirs:
                setting = SETTINGS.get(name, name)
                mend = f"set method.{setting}" if hasattr(self, setting) else "take another head"
                raise ValueError(
                    f"method.path={path}: its {name} is {theirs}, where the settings of method "
                    f"make {ours}; {mend}"
                )
        if getattr(self, "tied", True) and not _ends_as(found, target.model):
            mend = "set method.tied=false" if hasattr(self, "tied") else "take another head"
            raise ValueError(
                f"method.path={path}: has an output head of its own, which is not trained "
                f"under the target's; {mend}"
            )
        return found


def _pairs(wanted: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """Names of what two heads must have in common, with the values of both."""
    names = [field.name for field in fields(wanted) if field.name not in FREE]
    kinds = [type(one).__name__.removesuffix("Config") for one in (wanted, found.config)]
    if kinds[0] != kinds[1]:
        return [("kind", kinds[0], kinds[1])]
    pairs = [(name, getattr(wanted, name), getattr(found.config, name)) for name in names]
    if hasattr(wanted, "layer"):
        layers = wanted.layer, found.config.layer
        pairs += [(name, *(getattr(one, name) for one in layers)) for name in OF_LAYERS]
        pairs.append(("further layers", 0, len(getattr(found, "later", ()))))
    return pairs


def _ends_as(head: Any, model: Any) -> bool:
    """Whether its output head is the target's."""
    return torch.equal(head.lm_head.weight, output_of(model))
