"""What training of all heads has in common: sizes, vocabulary, and where weights begin,
fresh or as those of a head that is there."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig

from specdec.heads.formats import find_head, load_head
from specdec.lab.values import shown
from specdec.models.paged import PagedLM
from specdec.models.quantised import output_of
from specdec.observation import Tap
from specdec.training.teacher import norm_weight
from specdec.training.trainee import Surroundings, TrainingMethod

# Of a head's configuration what need not be as the settings say, and what they may call the rest.
FREE = ("layer", "mask", "own_mask", "target_vocab", "output_bias")
SETTINGS = {
    "taps": ("taps", "tap"),
    "vocab_size": ("draft_vocab",),
    "windows": ("window",),
    "num_hidden_layers": ("layers",),
}

STD = 0.02  # of fresh matrices
NEAR = 0.01  # part of a row that rounding to 16 bits stays below, and learning does not


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


def sizes_of(
    target: PagedLM, taps: Sequence[Tap], *, layers: int, window: int | None = None, **how: Any
) -> dict[str, Any]:
    """What a `HeadConfig` says of a head that can name all tokens of a target.

    Args:
        window: of all its layers; None: they see all.
        how: `rope_theta` and `make` of `layer_config`.
    """
    return {
        "layer": layer_config(target.model.config, layers=layers, **how),
        "taps": tuple(taps),
        "state_size": target.config.hidden_size,
        "target_vocab": target.model.get_input_embeddings().weight.shape[0],
        "vocab_size": target.vocab_size,
        "windows": () if window is None else (window,) * layers,
    }


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

    Attributes:
        kind: of head.
        told: settings that a trainee is told, by name.

    Raises:
        ValueError: no such head.
    """

    kind: ClassVar[type[Any]]
    told: ClassVar[tuple[str, ...]] = ("loss", "steps", "decay")
    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            find_head(self.path, "method.path")

    def config(self, target: PagedLM) -> Any:
        """What a head of these settings is; which mask token it has, texts say."""
        raise NotImplementedError

    def fresh(self, surroundings: Surroundings) -> Any:
        """A head with fresh weights, which names the most frequent tokens; the rarest is its mask
        token, if it has one."""
        config, counts = self.config(surroundings.target), surroundings.counts
        if hasattr(config, "mask"):
            config = replace(config, mask=int(counts.argmin()))
        head = self.kind(config)
        if config.vocab_size < surroundings.target.vocab_size:
            head.names = frequent(counts, config.vocab_size)
        begin(head, surroundings)
        return head

    def head(self, surroundings: Surroundings) -> Any:
        """What the training begins with."""
        if self.path is None:
            return self.fresh(surroundings)
        found = self._given(self.path, surroundings.target)
        for parameter in found.parameters():  # those that it was lent must stay as they are
            parameter.data = parameter.to(torch.float32, copy=True)
        return found.float().train().requires_grad_(True)

    def _how(self) -> dict[str, Any]:
        """What a trainee is told besides."""
        return {name: getattr(self, name) for name in self.told}

    def check(self, target: PagedLM) -> None:
        if self.path is not None:
            self._given(self.path, target)

    def _given(self, path: str, target: PagedLM) -> Any:
        """The head there.

        Raises:
            ValueError: it is none for the target, or of another shape.
        """
        found: Any = load_head(path, target, kinds=[self.drafter], setting="method.path")
        if found.drafts < found.config.vocab_size:
            raise ValueError(
                f"method.path={path}: was widened for {target.name}, and norms of widened heads "
                f"cannot be written; train it for the model that it was made for"
            )
        for name, ours, theirs in _pairs(self.config(target), found):
            if ours != theirs:
                raise ValueError(
                    f"method.path={path}: its {name} is {theirs}, where the settings of method "
                    f"make {ours}; {self._mend(name, theirs)}"
                )
        embedding: Any = target.model.get_input_embeddings().weight
        if hasattr(found, "embed_tokens") and not _near(found.embed_tokens.weight, embedding):
            raise ValueError(
                f"method.path={path}: has an embedding of its own, and heads are trained with "
                f"the target's; take another head"
            )
        rows = output_of(target.model)
        rows = rows if found.names is None else rows[found.names]
        if getattr(self, "tied", True) and not _near(found.lm_head.weight, rows):
            mend = "set method.tied=false" if hasattr(self, "tied") else "take another head"
            raise ValueError(
                f"method.path={path}: has an output head of its own, which is not trained "
                f"under the target's; {mend}"
            )
        return found

    def _mend(self, name: str, theirs: Any) -> str:
        """What to do about a part of the configuration that is another in the head's."""
        known = SETTINGS.get(name, (name,))
        setting = next((one for one in known if hasattr(self, one)), None)
        if setting == "taps":
            theirs = json.dumps(theirs, separators=(",", ":"))
        elif isinstance(theirs, tuple):  # of layers, or of one state
            setting = setting if len({*theirs}) < 2 else None
            theirs = next(iter(theirs), None)
        return "take another head" if setting is None else f"set method.{setting}={shown(theirs)}"


def _pairs(wanted: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """Names of what two heads must have in common, with the values of both."""
    names = [field.name for field in fields(wanted) if field.name not in FREE]
    kinds = [type(one).__name__.removesuffix("Config") for one in (wanted, found.config)]
    if kinds[0] != kinds[1]:
        return [("kind", kinds[0], kinds[1])]
    pairs = [(name, getattr(wanted, name), getattr(found.config, name)) for name in names]
    if hasattr(wanted, "layer"):
        layers = wanted.layer, found.config.layer
        of_layers = ("hidden_size", "num_hidden_layers")
        pairs += [(name, *(getattr(one, name) for one in layers)) for name in of_layers]
        pairs.append(("rope_theta", *(one.rope_parameters["rope_theta"] for one in layers)))
        pairs.append(("further layers", 0, len(getattr(found, "later", ()))))
    return pairs


@torch.no_grad()
def _near(mine: Tensor, theirs: Tensor) -> bool:
    """Whether a matrix is the target's, whose embedding may have more rows, but for the type that
    it was written in."""
    theirs = theirs[: len(mine)]
    if mine.shape != theirs.shape:
        return False
    away = torch.linalg.vector_norm(mine - theirs, dim=1, dtype=torch.float32)
    size = torch.linalg.vector_norm(theirs, dim=1, dtype=torch.float32)
    return bool((away <= NEAR * size).all())
